"""DeepFool: the nearest misclassified image, by steps to the linearised boundary (Moosavi-Dezfooli et al. 2016)."""

import torch

from fdml.attacks.fab import likely, nearest_boundary
from fdml.attacks.objective import Model, answer, check
from fdml.attacks.projection import DUAL, length
from fdml.errors import InputError
from fdml.inference import inference
from fdml.losses import Labels
from fdml.randomness import Generator
from fdml.threat import Images


def deepfool(
    model: Model,
    x: Images,
    y: Labels,
    norm: str,
    *,
    steps: int = 50,
    overshoot: float = 0.02,
    candidates: int = 10,
    enough: float | None = None,
    generator: Generator = None,
) -> Images:
    """Steps to the nearest linearised boundary until the answer is wrong (Moosavi-Dezfooli et al. 2016, algorithm 2).

    The sum of the steps is kept inside [0, 1], a pixel at its end of it takes no share of the next, and the sum is
    overshot by the share ``overshoot`` wherever the model looks, as in the published code. ``candidates`` are the most
    likely classes of the clean image, its own among them, whose boundaries are looked at. For linf and l2.

    Returns the first misclassified image found, in [0, 1]; the image itself where none was, and where it is
    misclassified already. The first being the last, ``enough`` changes nothing; nor does ``generator``.

    Raises ``InputError`` for another norm, steps below 1 and candidates below 2.
    """
    if norm not in ("linf", "l2"):
        raise InputError(f"deepfool supports linf and l2, got {norm}")
    if steps < 1 or candidates < 2:
        raise InputError(f"steps must be at least 1 and candidates at least 2, got {steps} and {candidates}")
    check(x, y)
    with inference(model), torch.no_grad():
        logits = answer(model, x)
        classes = likely(logits, y)[:, : candidates - 1]
        x_adv = x.clone()
        going = (logits.argmax(1) == y).nonzero().squeeze(1)
        x, y, classes = x[going], y[going], classes[going]
        point, moved = x, torch.zeros_like(x)
        for _ in range(steps):
            if not len(going):
                break
            gap, w = nearest_boundary(model, point, y, classes, norm)
            # A pixel at its end of [0, 1] would take its share of the step in vain, and the boundary never be crossed.
            here, goes = point.flatten(1), -gap.sign()[:, None] * w
            w = w.masked_fill(((here <= 0) & (goes < 0)) | ((here >= 1) & (goes > 0)), 0)
            size = length(w, DUAL[norm]).clamp(min=1e-30)[:, None]
            direction = w.sign() if norm == "linf" else w / size
            moved = moved - (direction * (gap[:, None] / size)).view(x.shape)
            moved = (x + moved).clamp_(0, 1).sub_(x)
            point = (x + (1 + overshoot) * moved).clamp_(0, 1)
            wrong = answer(model, point).argmax(1) != y
            x_adv[going[wrong]] = point[wrong]
            on = (~wrong).nonzero().squeeze(1)
            going, x, y, classes, point, moved = (rows[on] for rows in (going, x, y, classes, point, moved))
    return x_adv
