"""What an evaluation is about when the user says no more than a model: its own data and threat."""

from pathlib import Path

from fdml import bundle
from fdml.card import Card, read_card
from fdml.errors import InputError
from fdml.recipe import override
from fdml.recipes import recipe
from fdml.threat import Threat


def target(model: Path, norm: str | None, eps: str | None, data: str | None) -> tuple[Threat, str]:
    """The threat model and the name of the data set: those given, else those of the model's card, else the recipe's.

    ``eps`` is text: a number in pixel units or a fraction such as ``8/255``. Raises ``InputError`` for a value out of
    range, and where neither the user nor the card says which data set.
    """
    card = _card(model)
    if data is None:
        if card is None:
            raise InputError(f"{model} says nothing of its data: give --data NAME (fdml datasets lists them)")
        data = str(card.data["name"])
    usual = recipe("fdml", data)
    trained = card.threat if card is not None else None
    if norm is not None and eps is None and norm != (trained["norm"] if trained else usual.norm):
        raise InputError(f"--norm {norm} needs an --eps in its own units: 0.5 is usual for l2, 12 for l1")
    kind = norm or (str(trained["norm"]) if trained else usual.norm)
    if eps is None:
        return Threat(kind, float(trained["eps"] if trained else usual.eps)), data
    return Threat(kind, override(usual, [f"eps={eps}"]).eps), data


def _card(model: Path) -> Card | None:
    if (model / bundle.CARD).exists():
        return bundle.read(model).card
    file = model / "student.safetensors" if model.is_dir() else model
    return read_card(file) if file.suffix == ".safetensors" else None
