"""From what the lab found to what the page shows."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from fdml.card import threat_words
from fdml.demo import words
from fdml.demo.draw import Line, Mark, chart, render, ring
from fdml.demo.exhibit import Exhibit
from fdml.showing import change, magnification, percent, pixels, shorten

if TYPE_CHECKING:
    from fdml.demo.lab import Distances, Faced, Lab, Moment, Proof
    from fdml.threat import Threat

SIDE = 320
"""Pixels of the longest side of a picture on the page; a larger one is averaged down."""

BARS = 4
"""Classes that the bars show at least: the likeliest before, then those after."""


def thumbs(exhibit: Exhibit, chosen: int | None, each: int = 2) -> Markup:
    """Buttons of the first ``each`` pictures of every class, and of the chosen one wherever it stands."""
    seen: dict[int, int] = {}
    shown = []
    for place, label in enumerate(exhibit.labels.tolist()):
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= each or place == chosen:
            shown.append((label, place))
    rows = [
        {
            "place": place,
            "name": f"{exhibit.classes[label]}, picture {place + 1}",
            "uri": _picture(exhibit.images[place]),
            "chosen": place == chosen,
        }
        for label, place in sorted(shown)
    ]
    return render("thumbs.html.jinja", thumbs=rows)


def headline(text: str, kind: str = "", more: str = "") -> Markup:
    """The box above the models."""
    return render("verdict.html.jinja", words=text, kind=kind, more=more)


def verdict(moment: "Moment", exhibit: Exhibit) -> Markup:
    """The headline of an attack."""
    lines = words.headline(moment, exhibit.classes)
    return headline(lines, moment.state, "" if moment.state == "running" else words.cost(moment))


def compared(moment: "Moment", exhibit: Exhibit) -> Markup:
    """Both models side by side, before and after the attack."""
    return render(
        "compare.html.jinja", sides=[_side(faced, exhibit, moment.asked.threat, moment.state) for faced in moment.faced]
    )


def unattacked(faced: "Sequence[Faced]", exhibit: Exhibit) -> Markup:
    """Both models side by side on a picture that nobody has attacked."""
    return render("compare.html.jinja", sides=[_side(each, exhibit, None, "clean") for each in faced])


def _side(faced: "Faced", exhibit: Exhibit, threat: "Threat | None", state: str) -> dict[str, object]:
    classes, before, after = exhibit.classes, faced.clean, faced.attacked
    kind, sentence = words.verdict(faced, classes, state)
    answer = words.said(classes[before.answer], before.confidence)
    pictures = [
        {
            "uri": pixels(before.x.numpy(), SIDE),
            "alt": f"the picture as the model sees it; its answer: {answer}",
            "caption": "the picture",
            "kind": "",
        }
    ]
    if threat is not None:
        delta = (after.x - before.x).numpy()
        scale = magnification([delta], threat)
        sizes = faced.distances
        shown = ", ".join(f"{norm} {size:.3g}" for norm, size in sizes.items())
        now = words.said(classes[after.answer], after.confidence)
        pictures += [
            {
                "uri": pixels(after.x.numpy(), SIDE),
                "alt": f"the attacked picture; the answer: {now}",
                "caption": f"attacked: {sizes[threat.norm]:.3g} of {threat_words(threat.norm, threat.eps)}",
                "kind": kind,
            },
            {
                "uri": change(delta, scale, SIDE),
                "alt": f"the change, magnified {scale:g} times around grey",
                "caption": f"the change, {scale:g} times larger: {shown}",
                "kind": "",
            },
        ]
    return {
        "key": faced.side.key,
        "kind": kind,
        "name": faced.side.name,
        "about": faced.side.about,
        "pictures": pictures,
        "verdict": sentence,
        "attacked": threat is not None,
        "bars": _bars(faced, classes),
    }


def _bars(faced: "Faced", classes: tuple[str, ...]) -> list[dict[str, object]]:
    before, after = faced.clean.probabilities.numpy(), faced.attacked.probabilities.numpy()
    count = min(BARS, len(classes))
    order = [faced.label, *np.argsort(-np.maximum(before, after), kind="stable").tolist()]
    chosen = list(dict.fromkeys(order))[:count]
    return [
        {
            "name": shorten(classes[index], 14),
            "full": classes[index],
            "true": index == faced.label,
            "before": round(float(before[index]), 4),
            "before_text": percent(float(before[index])),
            "after": round(float(after[index]), 4),
            "after_text": percent(float(after[index])),
        }
        for index in chosen
    ]


def losses(moment: "Moment") -> Markup:
    """The loss along the attack, of each model that was attacked."""
    lines = [Line(faced.side.key, faced.side.name, faced.trace) for faced in moment.faced if faced.trace]
    if not lines:
        return Markup("")
    title = "Loss along the attack: how wrong each model becomes about the true class"
    return chart(title, lines, across="pictures tried", up="loss (cross-entropy)")


def distances(lab: "Lab", moment: "Moment") -> Markup:
    """The distances in each model's features, before and after."""
    found: dict[str, list[Distances]] = {
        faced.side.key: lab.distances(moment, faced.side.key) for faced in moment.faced
    }
    if not all(found.values()):
        return Markup("")
    others = {lab.exhibit.classes[each.other] for rows in found.values() for each in rows}

    def pair(scale: float, to_self: float, to_other: float) -> dict[str, object]:
        return {
            "self_at": round(6 + scale * to_self, 1),
            "other_at": round(6 + scale * to_other, 1),
            "self_text": f"{to_self:.2g}",
            "other_text": f"{to_other:.2g}",
        }

    def both(each: "Distances") -> list[dict[str, object]]:
        scale = 148 / max(each.before_other, each.after_self, each.after_other, 1e-6)
        before = pair(scale, each.before_self, each.before_other)
        return [before, pair(scale, each.after_self, each.after_other)]

    rows = [
        {
            "key": faced.side.key,
            "name": faced.side.name,
            "tap": each.tap,
            "pairs": both(each),
        }
        for faced in moment.faced
        for each in found[faced.side.key]
    ]
    other = f"picture of {others.pop()}" if len(others) == 1 else "picture of the class it is mistaken for"
    return render("distances.html.jinja", rows=rows, other=other)


def accuracy(found: Mapping[str, list[tuple[float, float]]], exhibit: Exhibit, norm: str) -> Markup:
    """Accuracy over eps of the models so far."""
    lines = [Line(side.key, side.name, found[side.key]) for side in exhibit.sides if side.key in found]
    marks = [Mark(exhibit.eps, "trained for")] if norm == exhibit.norm else []
    count = len(exhibit.images)
    title = f"Accuracy on {count} test pictures under PGD-20 of each model against itself"
    return chart(
        title, lines, across=f"eps: how much the attack may change ({norm})", up="accuracy", marks=marks, percent=True
    )


def proof(found: "Proof", image: np.ndarray, exhibit: Exhibit) -> Markup:
    """A certificate as far as it has come: the drawing, the sentence, how many samples there are."""
    sentence = words.proved(found, exhibit.classes)
    tried = found.tried[-1] if found.tried else None
    drawing = ring(found.radius, found.broken, tried, _picture(image), sentence)
    share = f"{found.hits:,} of {found.count:,} noisy copies were answered alike; noise of sigma {found.sigma:g}, "
    share += f"chance of an error {found.alpha:g}, seed {found.seed}."
    return headline(sentence, "proof", share) + drawing


def leaderboard(exhibits: Sequence[Exhibit]) -> Markup:
    """What evaluations found of all the models that are loaded."""
    rows = [row for exhibit in exhibits for row in exhibit.scores]
    return render("leaderboard.html.jinja", rows=sorted(rows, key=lambda row: (row["data"], -row["worst"])))


def _picture(image: np.ndarray) -> str:
    return pixels(image.astype(np.float32) / 255, SIDE)
