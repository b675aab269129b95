"""What the demo says, in words that need no knowledge of the field."""

import math
from typing import TYPE_CHECKING

from fdml.demo.choices import METHODS
from fdml.showing import percent, shorten

if TYPE_CHECKING:
    from fdml.demo.lab import Faced, Moment, Proof


def said(seen_class: str, confidence: float) -> str:
    """An answer: a class and how sure the model is of it."""
    return f"{shorten(seen_class)}, {percent(confidence)}"


def verdict(faced: "Faced", classes: tuple[str, ...], state: str) -> tuple[str, str]:
    """What became of one model: ``wrong``, ``fooled``, ``holds`` or ``clean``, and a sentence."""
    name, label = faced.side.name, classes[faced.label]
    before, after = faced.clean, faced.attacked
    if before.answer != faced.label:
        return (
            "wrong",
            f"{name}: wrong even before an attack. It says {said(classes[before.answer], before.confidence)}.",
        )
    if state == "clean":
        return "clean", f"{name}: says {said(label, before.confidence)}."
    now = said(classes[after.answer], after.confidence)
    if after.answer != faced.label:
        return "fooled", f"{name}: fooled. It now says {now}."
    return "holds", f"{name}: holds. It still says {now}."


def headline(moment: "Moment", classes: tuple[str, ...]) -> str:
    """The whole in one sentence."""
    if moment.state == "running":
        return f"{METHODS[moment.asked.method].partition(':')[0]} is looking for a change: picture {moment.looks:,} …"
    kinds = {faced.side.key: verdict(faced, classes, moment.state)[0] for faced in moment.faced}
    if len(kinds) == 1:
        kind = next(iter(kinds.values()))
        found = {"fooled": "The attack succeeds.", "holds": "The model withstands this attack."}
        whole = found.get(kind, "The model is wrong without any attack: there is nothing to attack.")
    elif set(kinds.values()) == {"holds"}:
        whole = "Both models withstand this attack."
    elif set(kinds.values()) == {"fooled"}:
        whole = "Both models are fooled: this attack is too strong for the defence, too."
    elif kinds == {"clean": "fooled", "defended": "holds"}:
        whole = "The clean model is fooled, the defended one holds."
    elif kinds == {"clean": "holds", "defended": "fooled"}:
        whole = "The defended model is fooled here, and the clean one is not: no defence holds always."
    else:
        whole = "A model is wrong without any attack."
    return f"Stopped. {whole}" if moment.state == "stopped" else whole


def cost(moment: "Moment") -> str:
    """What the attack took."""
    pictures = "1 picture" if moment.looks == 1 else f"{moment.looks:,} pictures"
    return f"The attack tried {pictures} in {moment.seconds:.2f} s."


def proved(proof: "Proof", classes: tuple[str, ...]) -> str:
    """What a certificate says so far."""
    certainty = f"{100 * (1 - proof.alpha):g}%"
    samples = f"{proof.count:,} of {proof.samples:,} noisy copies"
    if proof.answer is None:
        if proof.state in ("sampling", "stopped"):
            return f"Nothing is proved yet, after {samples}."
        return (
            f"Nothing is proved after {samples}: under this much noise no answer is frequent enough. Try less noise, or"
            " another picture."
        )
    radius = math.floor(1000 * proof.radius) / 1000  # what is said of it is then true
    what = (
        f"Proved with {certainty} confidence: no change smaller than {radius:.3f} (l2) makes the smoothed model"
        f" say anything but {shorten(classes[proof.answer])}."
    )
    if proof.state == "sampling":
        return f"{what} So far {samples}."
    if proof.broken is not None:
        return f"{what} An attack changes its answer at {proof.broken:.3f}: the truth lies between."
    if proof.state == "attacking":
        return f"{what} Now an attack looks for where it breaks …"
    if not proof.tried:
        return f"{what} It was stopped before an attack looked for where that breaks."
    return f"{what} No attack that was tried up to {proof.tried[-1]:.3f} changes its answer."
