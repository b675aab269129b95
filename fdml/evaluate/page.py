"""A report as one page that needs nothing but itself: no request leaves it, and no script runs in it."""

import json
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fdml.card import threat_words
from fdml.evaluate import pictures
from fdml.evaluate.pages import pages
from fdml.evaluate.pictures import DARK, LIGHT, Line
from fdml.evaluate.suites import OUTSIDE
from fdml.evaluate.table import NO_GRADIENTS, sections
from fdml.files import write_whole
from fdml.showing import change, magnification, pixels
from fdml.threat import Threat

_TABLE_CLASSES = 20
"""Up to so many classes their confusion is a table of numbers, beyond a picture."""

_LISTED = 15
"""Of more classes the weakest are shown, and of more than that many kinds of error the most frequent."""

_SHOWN = 8
"""Images of the gallery, for each model."""

_PIXELS = 1_500_000
"""Values that all images of the gallery have together: larger images are reduced, so that the page stays small."""

_CARD = 20_000
"""Characters of a card that are shown."""


def write_page(
    report: Mapping[str, Any], path: Path, examples: Mapping[str, Mapping[str, Any] | None] | None = None
) -> None:
    """Writes ``report.html``. ``report`` is what docs/report.md describes; parts that it has no data for are left out.

    ``examples`` has, for some or all models by name, a few attacked images: ``x`` and ``x_adv`` (k, c, h, w) in [0, 1],
    their labels ``y`` (k,), the model's ``answers`` (k,) to ``x_adv``, -1 for none, and the ``attack`` that made each.

    The page stays below 3 MB whatever the number of images. All strings may be hostile: they are shown as they are
    written, and only an address of the web becomes a link. Raises ``InputError`` where the system refuses to write.
    """
    write_whole(path, page(report, examples or {}))


def page(report: Mapping[str, Any], examples: Mapping[str, Mapping[str, Any] | None]) -> str:
    """The text of the page."""
    template = pages().get_template("report.html.jinja")
    models = report["models"]
    attacks = sections(models)
    return template.render(
        report=report,
        models=models,
        threat=threat_words(**report["threat"]),
        no_gradients=NO_GRADIENTS,
        light=LIGHT,
        dark=DARK,
        which=_which(report["images"]),
        attacks=attacks,
        outside=OUTSIDE,
        strongest=[
            min((attack["accuracy"] for attack in model["attacks"] if attack["name"] not in OUTSIDE), default=None)
            for model in models
        ],
        settings=[_settings(row.label, row.cells) for part in attacks for row in part.rows if not row.step],
        robustness=_robustness(models, report["threat"]),
        distances=_distances(report),
        classes=_classes(models),
        confusion=[_confusion(model, report["data"]["classes"]) for model in models if model["confusion"]],
        corruptions=_corruptions(models),
        gallery=_gallery(report, examples),
        cards=[_card(model["card"]) for model in models],
        command=_command(report),
    )


def _which(images: Sequence[int]) -> str:
    first, last = min(images), max(images)
    if list(images) == list(range(first, last + 1)):
        return f"images {first:,} to {last:,} of the split"
    return f"{len(images):,} images drawn from the split (their numbers are in report.json)"


def _settings(label: str, cells: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """What an attack was run with, and what it cost on each model."""
    # Mostly the same for all models.
    distinct = dict.fromkeys(_words(cell["settings"]) for cell in cells if cell)
    queries = [_queries(cell) if cell else None for cell in cells]
    return {
        "label": label,
        "words": "; ".join(distinct),
        "seconds": [cell["seconds"] if cell else None for cell in cells],
        "queries": queries if any(found is not None for found in queries) else None,
    }


def _words(settings: Mapping[str, Any]) -> str:
    parts = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            parts.append(f"{name} ({_words(value)})" if value else name)
        else:
            parts.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(parts)


def _queries(attack: Mapping[str, Any]) -> float | None:
    """The median number of queries that fooling an image took."""
    if attack["queries"] is None:
        return None
    spent = [number for number, outcome in zip(attack["queries"], attack["outcomes"], strict=True) if outcome == "x"]
    return statistics.median(spent) if spent else None


def _robustness(models: Sequence[Mapping[str, Any]], threat: Mapping[str, Any]) -> dict[str, Any] | None:
    drawn = [(place, model, curve) for place, model in enumerate(models) for curve in model["curves"]]
    if not drawn:
        return None
    lines = [Line(m, n, curve["eps"], curve["accuracy"], curve["intervals"]) for n, (m, _, curve) in enumerate(drawn)]
    legend = [_entry(line, model["name"], curve["attack"]) for line, (_, model, curve) in _zip(lines, drawn)]
    every = sorted({eps for line in lines for eps in line.x})
    rows = [(eps, [line.y[list(line.x).index(eps)] if eps in line.x else None for line in lines]) for eps in every]
    return {"picture": pictures.robustness_chart(lines, threat), "legend": legend, "rows": rows}


def _distances(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A chart for each norm. An image that is answered wrongly when clean has fallen at distance 0."""
    charts = []
    models = report["models"]
    for norm in dict.fromkeys(found["norm"] for model in models for found in model["minimal"]):
        lines, legend = [], []
        for place, model in enumerate(models):
            right = [answer == y for answer, y in _zip(model["clean"]["predictions"], report["labels"])]
            for found in (each for each in model["minimal"] if each["norm"] == norm):
                first = right[: len(found["distances"])]
                x, y = pictures.standing([d if ok else 0.0 for d, ok in _zip(found["distances"], first)])
                lines.append(Line(place, len(lines), x, y))
                median = "none" if found["median"] is None else f"{found['median']:.4g}"
                legend.append(_entry(lines[-1], model["name"], f"{found['attack']}: median {median}"))
        charts.append(
            {"norm": norm, "picture": pictures.distance_chart(lines, report["threat"], norm), "legend": legend}
        )
    return charts


def _entry(line: Line, name: str, what: str) -> dict[str, Any]:
    """A line of a legend; the name stands apart, since the page keeps its direction of writing to itself."""
    colour = line.model % len(LIGHT.lines)
    return {"name": name, "what": what, "colour": colour, "dashes": " ".join(f"{2 * part:g}" for part in line.dashes)}


def _classes(models: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Rows of name, number of images, and clean and worst accuracy by model; of many classes the weakest come first."""
    if not any(model["classes"] for model in models):
        return None
    rows = [
        {"name": own[0]["name"], "n": own[0]["n"], "cells": own}
        for own in zip(*(model["classes"] for model in models), strict=True)
    ]
    many = len(rows) > _TABLE_CLASSES
    if many:
        rows.sort(key=lambda row: sum(cell["worst"] for cell in row["cells"]))
    return {"rows": rows[:_LISTED] if many else rows, "rest": rows[_LISTED:] if many else []}


def _confusion(model: Mapping[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    """A table whose cells are (number, shade from 0 to 20), or a picture and the most frequent errors."""
    counts = np.asarray(model["confusion"])
    found = {"model": model["name"], "names": classes, "table": None}
    if len(classes) > _TABLE_CLASSES:
        wrong = np.where(np.eye(len(classes), dtype=bool), 0, counts)
        most = np.argsort(-wrong, axis=None, kind="stable")[:_LISTED]
        errors = [(classes[at // len(classes)], classes[at % len(classes)], int(wrong.flat[at])) for at in most]
        return found | {"picture": pictures.confusion_picture(counts), "errors": [each for each in errors if each[2]]}
    # The square root: one image in a hundred should be seen.
    shades = np.rint(20 * np.sqrt(counts / np.maximum(counts.sum(1, keepdims=True), 1))).astype(int)
    rows = [list(_zip(*each)) for each in _zip(counts.tolist(), shades.tolist())]
    return found | {"table": list(_zip(classes, rows))}


def _corruptions(models: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Rows of corruptions; for each model a column a severity, and the mean of all in the last row."""
    cells = [{(each["name"], each["severity"]): each["accuracy"] for each in model["corruptions"]} for model in models]
    if not any(cells):
        return None
    names = list(dict.fromkeys(name for found in cells for name, _ in found))
    severities = sorted({severity for found in cells for _, severity in found})
    return {
        "severities": severities,
        "rows": [(name, [found.get((name, s)) for found in cells for s in severities]) for name in names],
        "means": [statistics.mean(found.values()) if found else None for found in cells],
    }


def _gallery(report: Mapping[str, Any], examples: Mapping[str, Mapping[str, Any] | None]) -> list[dict[str, Any]]:
    """For each model with examples its images as data URIs, each beside the image attacked and the change between."""
    classes, threat = report["data"]["classes"], Threat(**report["threat"])
    shown = [(model["name"], found) for model in report["models"] if (found := examples.get(model["name"]))]
    shown = [(name, found) for name, found in shown if len(found["y"])]
    if not shown:
        return []

    def named(answer: int) -> str:
        return classes[answer] if 0 <= answer < len(classes) else "nothing: not a number"

    count = sum(min(_SHOWN, len(found["y"])) for _, found in shown)
    channels = 3 if report["data"]["input"][0] == 3 else 1
    side = max(16, int((_PIXELS / (3 * channels * count)) ** 0.5))
    changes = [found["x_adv"][:_SHOWN] - found["x"][:_SHOWN] for _, found in shown]
    scale = magnification([np.asarray(each) for each in changes], threat)
    parts = []
    for (name, found), delta in zip(shown, changes, strict=True):
        cards = [
            {
                "clean": pixels(found["x"][k], side),
                "attacked": pixels(found["x_adv"][k], side),
                "change": change(delta[k], scale, side),
                "label": named(int(found["y"][k])),
                "answer": named(int(found["answers"][k])),
                "right": int(found["y"][k]) == int(found["answers"][k]),
                "attack": found["attack"][k],
            }
            for k in range(len(delta))
        ]
        parts.append({"model": name, "scale": f"{scale:g}", "cards": cards})
    return parts


def _card(card: Mapping[str, Any] | None) -> str | None:
    if card is None:
        return None
    text = json.dumps(card, indent=1, ensure_ascii=False)
    return text if len(text) <= _CARD else text[:_CARD] + "\n… (the rest is in report.json)"


def _command(report: Mapping[str, Any]) -> str | None:
    """The command that gives the same figures; None where a model came from no file."""
    files = [model["file"] for model in report["models"]]
    if not all(files):
        return None
    words = ["fdml", "evaluate", *files, "--suite", report["suite"], "--data", report["data"]["name"]]
    option, names = ("--attack", report["attacks"]) if report["attacks"] else ("--protocol", report["protocols"])
    words += [word for name in names for word in (option, name)]
    words += ["--norm", report["threat"]["norm"], "--eps", repr(report["threat"]["eps"])]
    words += ["--limit", str(report["data"]["n"]), "--seed", str(report["seed"])]
    words += ["--rng", report["rng"]] if report["rng"] != "image" else []
    return shlex.join(words)


def _zip(one: Sequence, other: Sequence) -> zip:
    return zip(one, other, strict=True)
