"""Whether what is deployed is still what was evaluated: logits, answers and robustness, before and after export."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fdml.attacks import Model, pgd, square
from fdml.randomness import Streams
from fdml.threat import Threat

TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2}
"""The largest difference of a logit that the precision allows."""

POINTS = 1.0
"""Points of robust accuracy that eight bits may cost."""

STEPS, QUERIES = 10, 100
BATCH = 64


@dataclass(frozen=True)
class Parity:
    """How far two models' logits are apart on the same images: the largest and the mean difference, the share of images
    that both answer alike, and the images (of ``places``) where that is largest and where the answers differ."""

    largest: float
    mean: float
    agreement: float
    worst: int
    differ: tuple[int, ...]

    @classmethod
    def of(cls, before: Tensor, after: Tensor, places: Tensor) -> "Parity":
        """Of logits (b, classes) for the images at ``places`` (b,)."""
        apart = (before - after).abs()
        differ = before.argmax(1) != after.argmax(1)
        # What is no number is infinitely far.
        rows = torch.nan_to_num(apart, nan=torch.inf).amax(1)
        worst = int(places[rows.argmax()])
        found = tuple(places[differ].tolist())
        return cls(float(rows.max()), float(apart.mean()), 1 - len(found) / len(before), worst, found)

    def to_dict(self) -> dict[str, Any]:
        return {
            "largest": _number(self.largest),
            "mean": _number(self.mean),
            "agreement": self.agreement,
            "worst_image": self.worst,
            "differ": list(self.differ[:20]),
        }


def gather(
    source: Model,
    artefact: Model,
    index: Tensor,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    precision: str,
    *,
    seed: int = 0,
    watch: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """The evidence on images x (b, c, h, w) with labels y at places ``index`` of the test split, as JSON values.

    Adversarial images are made on the source (PGD, ``STEPS`` steps) and shown to both; then each is attacked by Square
    (``QUERIES`` queries) for itself, for what is deployed is attacked as it is. An image is robust where it is answered
    rightly through all of that. ``passed`` and ``reason`` say whether that is within what the precision allows.
    """
    watch("clean images")
    before, after = logits_of(source, x), logits_of(artefact, x)
    clean = Parity.of(before, after, index)
    accuracy = {"source": _share(before, y), "artefact": _share(after, y)}
    watch("adversarial images")
    x_adv = torch.cat(
        [
            pgd(source, a, b, threat, steps=STEPS, keep="best", generator=Streams.of(i, seed=seed))
            for a, b, i in _parts(x, y, index)
        ]
    )
    before, after = logits_of(source, x_adv), logits_of(artefact, x_adv)
    adversarial = Parity.of(before, after, index)
    robust = {}
    for name, model, logits in (("source", source, before), ("artefact", artefact, after)):
        watch(f"Square on the {name}")
        stands = logits.argmax(1) == y
        left = stands.nonzero().flatten()
        fell = [
            square(model, a, b, threat, budget=QUERIES, generator=Streams.of(i, seed=seed))
            for a, b, i in _parts(x[left], y[left], index[left])
        ]
        if fell:
            stands[left] = logits_of(model, torch.cat(fell)).argmax(1) == y[left]
        robust[name] = stands.float().mean().item()
    found = {
        "precision": precision,
        "images": len(x),
        "threat": {"norm": threat.norm, "eps": threat.eps},
        "attacks": [f"PGD, {STEPS} steps, on the source", f"Square, {QUERIES} queries, on each"],
        "clean": clean.to_dict(),
        "adversarial": adversarial.to_dict(),
        "accuracy": accuracy,
        "robust_accuracy": robust,
        "tolerance": TOLERANCE.get(precision, POINTS),
    }
    reason = _fault(clean, adversarial, robust, precision)
    return found | {"passed": reason is None, "reason": reason}


def most_different_layer(source: Mapping[str, Tensor], artefact: Mapping[str, Tensor]) -> tuple[str, float]:
    """The layer whose features (1, …) differ most, relative to their own size, and by how much."""
    apart = {
        name: float((value - artefact[name]).abs().max() / value.abs().max().clamp_min(1e-12))
        for name, value in source.items()
    }
    worst = max(apart, key=lambda name: apart[name])
    return worst, apart[worst]


def _fault(clean: Parity, adversarial: Parity, robust: Mapping[str, float], precision: str) -> str | None:
    """What is beyond the tolerance, or None."""
    if precision in TOLERANCE:
        for name, parity in (("clean", clean), ("adversarial", adversarial)):
            if not parity.largest <= TOLERANCE[precision]:
                return (
                    f"the logits of {name} image {parity.worst} differ by {parity.largest:.3g}, more than"
                    f" {TOLERANCE[precision]:g} ({precision})"
                )
            if precision == "fp32" and parity.differ:
                return f"{name} image {parity.differ[0]} is answered otherwise"
        return None
    lost = 100 * (robust["source"] - robust["artefact"])
    if abs(lost) > POINTS + 1e-9:
        before, after = (100 * robust[name] for name in ("source", "artefact"))
        return f"robust accuracy is {after:.1f}%, before it was {before:.1f}%: more than {POINTS:g} point ({precision})"
    return None


def _share(logits: Tensor, y: Tensor) -> float:
    return (logits.argmax(1) == y).float().mean().item()


def logits_of(model: Model, x: Tensor) -> Tensor:
    """The logits (b, classes) of images x (b, c, h, w), float32 on the CPU, without a graph."""
    with torch.no_grad():
        return torch.cat([model(part).float().cpu() for part in x.split(BATCH)])


def _parts(x: Tensor, y: Tensor, index: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    return list(zip(x.split(BATCH), y.split(BATCH), index.split(BATCH), strict=True)) if len(x) else []


def _number(value: float) -> float | None:
    return value if value < torch.inf else None
