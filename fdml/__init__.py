"""Train, attack and certify image classifiers that withstand adversarial examples.

    model = fdml.load("student.safetensors")
    logits = model(x)  # x: [b c h w], pixels in [0, 1]

The names below are loaded when they are first used: importing fdml imports neither torch nor numpy. The rest is in the
submodules: ``fdml.train.train``, ``fdml.recipes``, ``fdml.attacks``, ``fdml.data``.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fdml.card import Card as Card
    from fdml.card import read_card as read_card
    from fdml.checkpoint import load as load
    from fdml.checkpoint import save as save
    from fdml.errors import InputError as InputError
    from fdml.models import Outputs as Outputs
    from fdml.models import RobustModel as RobustModel
    from fdml.models import wrap as wrap
    from fdml.recipe import Recipe as Recipe
    from fdml.runtime import RobustClassifier as RobustClassifier
    from fdml.threat import Threat as Threat

    __version__: str

# No name here may be that of a submodule: importing the submodule would put the module in its place.
_HOME = {
    "Card": "fdml.card",
    "InputError": "fdml.errors",
    "Outputs": "fdml.models",
    "Recipe": "fdml.recipe",
    "RobustClassifier": "fdml.runtime",
    "RobustModel": "fdml.models",
    "Threat": "fdml.threat",
    "load": "fdml.checkpoint",
    "read_card": "fdml.card",
    "save": "fdml.checkpoint",
    "wrap": "fdml.models",
}

__all__ = [*_HOME, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name == "__version__":
        value = _version()
    elif name in _HOME:
        value = _load(name)
    else:
        raise AttributeError(f"module 'fdml' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _load(name: str) -> object:
    try:
        return getattr(import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "fdml":
            raise
        message = f"fdml.{name} needs {error.name}, of the training extra: pip install 'fdml[train]'"
        raise ImportError(message, name=error.name) from error


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fdml")
    except PackageNotFoundError:  # run from a clone without an installation
        return "0+unknown"
