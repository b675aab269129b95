"""What every test runs under: few threads, a fixed seed, and annotated shapes that are checked at each call."""

import os
from collections.abc import Callable
from pathlib import Path

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


@pytest.fixture(scope="session")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a small model of the digits that was trained under noise of sigma 0.25."""
    import torch.nn.functional as F

    import fdml
    from fdml import data
    from fdml.card import Card
    from fdml.models import build

    digits = data.load("digits")
    torch.manual_seed(0)
    model = build("cnn", input=(1, 8, 8), classes=10, mean=(0.3,), std=(0.37,), options={"width": 4})
    _, x, y = digits.train.head(len(digits.train)).all()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for index in torch.randperm(8 * len(y)).remainder(len(y)).split(64):
        optimizer.zero_grad()
        F.cross_entropy(model(x[index] + 0.25 * torch.randn_like(x[index])), y[index]).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("certify") / "noisy.safetensors"
    card = Card(
        architecture="cnn",
        options={"width": 4},
        classes=digits.classes,
        input=(1, 8, 8),
        mean=(0.3,),
        std=(0.37,),
        threat={"norm": "linf", "eps": 0.01},
        role="student",
        recipe={"name": "smooth", "sigma": 0.25},
        seed=0,
        data={"name": "digits", "fingerprint": digits.fingerprint},
        metrics={},
        versions={},
    )
    fdml.save(model.eval(), card, path)
    return path
