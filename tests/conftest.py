"""What every test runs under: few threads, a fixed seed, and annotated shapes that are checked at each call."""

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

# Before any of these is imported: from here on, a tensor of the wrong shape or dtype fails the test that passed it.
# Modules that are compiled with fullgraph=True must stay off this list.
install_import_hook(
    ["fdml.threat", "fdml.losses", "fdml.attacks", "fdml.models", "fdml.data"], typechecker="beartype.beartype"
)

torch.set_num_threads(min(2, torch.get_num_threads()))

# The same examples in every run; no time limit for each, since test machines are slow and shared.
settings.register_profile("fdml", deadline=None, derandomize=True)
settings.load_profile("fdml")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
