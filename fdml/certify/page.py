"""The report of certificates as one page that needs nothing but itself."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fdml import showing
from fdml.certify.certificate import Certificate, unpack
from fdml.data.dataset import DataSet
from fdml.evaluate import pictures
from fdml.evaluate.pages import duration, pages
from fdml.evaluate.pictures import DARK, LIGHT, Line
from fdml.files import write_whole

_EACH = 3
"""Images of each kind in the gallery."""

_WORDS = {
    "smoothing": "randomised smoothing, with as many samples as each image needs",
    "cohen": "randomised smoothing as published, with a fixed number of samples",
    "bounds": "bounds on the network's outputs",
}


def write_page(report: Mapping[str, Any], path: Path, cards: Sequence[Mapping[str, Any]] = ()) -> None:
    """Writes ``report.html``. ``report`` is what ``summary.report`` gives, ``cards`` what ``gallery`` gives.

    Strings from outside are shown as they are written. Raises ``InputError`` where the system refuses to write.
    """
    write_whole(path, page(report, cards))


def page(report: Mapping[str, Any], cards: Sequence[Mapping[str, Any]]) -> str:
    """The text of the page."""
    settings, smoothing = report["settings"], report["method"] != "bounds"
    norm = "l2" if smoothing else settings["norm"]
    lines, legend = _lines(report)
    return (
        pages("fdml.certify")
        .get_template("certificates.html.jinja")
        .render(
            report=report,
            words=_WORDS[report["method"]],
            chance=f", but for a chance of {settings['alpha']:g} an image" if smoothing else "",
            smoothing=smoothing,
            norm=norm,
            light=LIGHT,
            dark=DARK,
            picture=pictures.certified_chart(lines, norm),
            legend=legend,
            facts=_facts(report),
            cards=cards,
            settings=json.dumps(settings),
        )
    )


def gallery(certificates: Sequence[Certificate], data: DataSet) -> list[dict[str, Any]]:
    """A few images of every kind: as data URIs, with what was proved of them."""
    right = sorted((c for c in certificates if c.correct and c.status == "certified"), key=lambda c: c.radius)
    other = [c for c in certificates if c.correct and c.status in ("falsified", "unknown")]
    abstained = [c for c in certificates if c.status == "abstain"]
    wrong = [c for c in certificates if not c.correct and c.status != "abstain"]
    shown = [*right[: -_EACH - 1 : -1], *right[:-_EACH][:_EACH], *other[:_EACH], *abstained[:_EACH], *wrong[:_EACH]]
    return [_card(certificate, data) for certificate in shown]


def _card(c: Certificate, data: DataSet) -> dict[str, Any]:
    _, x, _ = next(iter(data.test.batches([torch.tensor([c.index])])))
    clean = x[0].cpu().numpy()
    found = [{"uri": showing.pixels(clean, 200), "alt": f"test image {c.index}"}]
    if c.counterexample is not None:
        x_adv = unpack(c.counterexample, clean.size).reshape(clean.shape)
        found.append({"uri": showing.pixels(x_adv, 200), "alt": "the counter-example"})
    elif c.sigma:
        noise = np.random.default_rng(c.index).normal(scale=c.sigma, size=clean.shape)
        found.append({"uri": showing.pixels(clean + noise, 200), "alt": f"under noise of sigma {c.sigma:g}"})
    reach = f"{c.status} up to {c.radius:.4g}" if c.status == "certified" else c.status
    if c.hits is not None and c.n:
        reach += f", {100 * c.hits / c.n:.1f}% of {c.n:,} samples"
    if c.fooled_at is not None:
        reach += f", fooled at {c.fooled_at:.4g}"
    return {
        "index": c.index,
        "label": "no label" if c.label is None else data.classes[c.label],
        "answer": "abstains" if c.answer < 0 else data.classes[c.answer],
        "right": c.correct,
        "words": reach,
        "pictures": found,
    }


def _lines(report: Mapping[str, Any]) -> tuple[list[Line], list[dict[str, Any]]]:
    curve = report["curve"]
    lines = [Line(0, 0, curve["radius"], curve["certified"])]
    names = ["certified"]
    attacked = [row for row in report["table"] if row["stands"] is not None]
    if attacked:
        lines.append(Line(0, 1, [row["radius"] for row in attacked], [row["stands"] for row in attacked]))
        names.append("stands under attack")
    legend = [
        {"name": name, "what": "share of all images", "colour": line.place, "dashes": _dashes(line)}
        for name, line in zip(names, lines, strict=True)
    ]
    return lines, legend


def _dashes(line: Line) -> str:
    return " ".join(f"{2 * part:g}" for part in line.dashes)


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = [("average certified radius", f"{report['average_radius']:.4g}, an image answered wrongly counting as 0")]
    facts.append(("verdicts", ", ".join(f"{count} {status}" for status, count in report["statuses"].items())))
    if len(report["methods"]) > 1 or report["method"] == "bounds":
        facts.append(("methods", ", ".join(f"{count} by {name}" for name, count in report["methods"].items())))
    if (samples := report["samples"]) is not None:
        words = f"{samples['mean']:,.0f} an image, median {samples['median']:,.0f}, {samples['largest']:,} at most"
        facts.append(("samples", words))
    seconds = report["seconds"]["images"]
    words = f"{duration(seconds['total'])} for all images, median {seconds['median']:.3g} s an image"
    return [*facts, ("time", f"{words}, {seconds['largest']:.3g} s at most")]
