"""What a visitor may choose among, in the words of the page. Nothing here imports torch."""

from fdml.demo.exhibit import Exhibit

METHODS: dict[str, str] = {
    "fgsm": "FGSM: one step",
    "pgd-best": "PGD: many small steps",
    "apgd-ce": "APGD: steps that adapt",
    "cw": "CW: steps on the margin",
    "square1000": "Square: no gradient, only answers",
    "feature+ce": "Feature: changes what the model sees",
    "noise": "Random noise: no attack at all",
}
"""The attacks of the demo by their names in ``fdml attack``."""

USUAL_STEPS = {"fgsm": 1, "pgd-best": 20, "apgd-ce": 50, "cw": 50, "square1000": 500, "feature+ce": 30, "noise": 100}
"""Steps, queries or draws that each begins with; FGSM has one step and no choice."""

MAX_STEPS = 2000
MAX_SAMPLES = 100_000

NORMS: dict[str, str] = {
    "linf": "the largest change of any pixel (linf)",
    "l2": "all changes together (l2)",
    "l1": "the sum of all changes (l1)",
}
"""The norms."""

WHOM: dict[str, str] = {
    "each": "each model, by itself",
    "clean": "the clean model; then try the picture on both",
    "defended": "the defended model; then try the picture on both",
}
"""Whom to attack: each, or one of them for both to be tried with (gray-box)."""


def usual_eps(norm: str, exhibit: Exhibit) -> float:
    """The eps to begin with: the trained one, or in another norm one of about the same look."""
    if norm == exhibit.norm:
        return exhibit.eps
    c, h, w = exhibit.input
    per_pixel = exhibit.eps if exhibit.norm == "linf" else 0.1
    found = {"linf": per_pixel, "l2": per_pixel * (c * h * w) ** 0.5 / 2, "l1": per_pixel * c * h * w / 8}[norm]
    return float(f"{found:.2g}")


def most_eps(norm: str, exhibit: Exhibit) -> float:
    """The largest eps that the page offers: three times the usual one, for linf at most 1."""
    most = float(f"{3 * usual_eps(norm, exhibit):.2g}")
    return min(1.0, most) if norm == "linf" else most
