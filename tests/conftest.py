"""What every test runs under: few threads, a fixed seed, and annotated shapes that are checked at each call."""

import os
from collections.abc import Callable

import pytest
import torch
from beartype import BeartypeConf, beartype
from hypothesis import settings
from jaxtyping import install_import_hook

_check: Callable[[Callable], Callable] = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable) -> Callable:
    """beartype, except for constructors: those answer a user's wrong value themselves, and tests want to see how."""
    return function if function.__name__ == "__init__" else _check(function)


# Before any of these is imported: from here on, a tensor of the wrong shape or dtype fails the test that passed it.
# Modules that are compiled with fullgraph=True must stay off this list.
install_import_hook(
    ["fdml.threat", "fdml.losses", "fdml.attacks", "fdml.models", "fdml.data"], typechecker=f"{__name__}.check"
)

# Workers of pytest-xdist share the cores; a worker by itself may have two.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))

# The same examples in every run; no time limit for each, since test machines are slow and shared.
settings.register_profile("fdml", deadline=None, derandomize=True)
settings.load_profile("fdml")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
