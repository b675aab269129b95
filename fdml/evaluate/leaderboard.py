"""A report's figures in the form in which the RobustBench leaderboard takes them."""

from collections.abc import Mapping
from typing import Any

from fdml.card import threat_words
from fdml.errors import unknown


def leaderboard(report: Mapping[str, Any], model_name: str) -> dict[str, Any]:
    """The fields of a ``model_info/DATA/NORM/NAME.json`` of RobustBench, as far as the report knows them; else null.

    As there, accuracies and eps are strings, accuracies in percent. ``autoattack_acc`` is that of the attack named
    ``autoattack`` where it was run on every image, never of a shorter cascade. ``external`` is there only where the
    worst case is lower than that. ``unreliable`` says whether a red flag of level ``fail`` was raised.

    Raises ``InputError`` for a model that the report does not have.
    """
    models = {model["name"]: model for model in report["models"]}
    if model_name not in models:
        raise unknown("model", model_name, models)
    model, data = models[model_name], report["data"]
    card = model["card"] or {}
    autoattack = _autoattack(model)
    entry = {
        "link": None,
        "name": model_name,
        "authors": None,
        "additional_data": None,
        # A model with a card is one network of ours; what is behind another file is not known.
        "number_forward_passes": 1 if card else None,
        "dataset": data["name"],
        "venue": None,
        "architecture": card.get("architecture"),
        "eps": threat_words(**report["threat"]).split()[1],
        "clean_acc": _percent(model["clean"]["accuracy"]),
        "reported": None,
        "autoattack_acc": None if autoattack is None else _percent(autoattack),
        "footnote": f"Evaluated by fdml {report['fdml']} on {data['n']:,} test images, seed {report['seed']}.",
        "unreliable": any(flag["level"] == "fail" for flag in model["flags"]),
    }
    if autoattack is not None and model["worst"]["accuracy"] < autoattack:
        entry["external"] = _percent(model["worst"]["accuracy"])
    return entry


def _autoattack(model: Mapping[str, Any]) -> float | None:
    for attack in model["attacks"]:
        # A blank in the outcomes is an image that it was not run on; one crafted on another model is a transfer attack.
        if attack["name"] == "autoattack" and attack["source"] is None and " " not in attack["outcomes"]:
            return attack["accuracy"]
    return None


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"
