"""Data sets by name."""

import subprocess
import sys
from pathlib import Path

import pytest

from fdml.data import CATALOGUE, load
from fdml.errors import InputError


def test_the_catalogue_needs_no_torch() -> None:
    code = (
        "import sys; from fdml.data import CATALOGUE, load; assert 'digits' in CATALOGUE and load;"
        "print([name for name in ('torch', 'numpy', 'scipy', 'sklearn', 'PIL') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_one_line_each() -> None:
    assert all(line and "\n" not in line for line in CATALOGUE.values())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cifar11", "unknown data set 'cifar11': did you mean 'cifar10'"),
        ("MNIST", "did you mean 'mnist'"),
        ("folder:", "did you mean 'folder:PATH'"),
        ("imagenet-21k", "unknown data set"),
        ("", "unknown data set '': known: cifar10, cifar100, digits"),
        ("zip:somewhere", "unknown data set 'zip:somewhere'"),
    ],
)
def test_unknown_names(name: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        load(name)


def test_a_folder_without_its_prefix(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"write 'folder:{tmp_path}'"):
        load(str(tmp_path))


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_fractions_outside_0_and_1(fraction: float) -> None:
    with pytest.raises(InputError, match="val_fraction must lie between 0 and 1"):
        load("digits", val_fraction=fraction)
