"""White-box attacks by the gradient of the input: FGSM and its random variants, PGD.

Each returns images inside the threat model and in [0, 1], and leaves the model's mode, statistics and ``.grad`` as they
were. ``model`` is any callable from images (b, c, h, w) in [0, 1] to logits (b, classes).
"""

import torch

from fdml.attacks.objective import Best, Model, Objective, answer, check, look, objective_of
from fdml.errors import InputError, unknown
from fdml.inference import inference
from fdml.losses import Labels, Logits, PerImage, Targets, cross_entropy, kl_divergence, margin
from fdml.randomness import Generator, take, uniform
from fdml.threat import Images, Threat


def fgsm(
    model: Model,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    objective: str | Objective = "ce",
    random_start: bool = False,
    generator: Generator = None,
) -> Images:
    """One step of length eps (Goodfellow et al. 2015, section 4); with ``random_start``, R-FGSM (Wong et al. 2020) of
    step 1.25 eps from a random point, projected."""
    start = threat.random(x, generator) if random_start else x
    check(x, y)
    with inference(model):
        _, _, grad = look(model, start, y, objective_of(objective))
    return threat.project(threat.ascend(start, grad, threat.eps * (1.25 if random_start else 1.0)), x)


def n_fgsm(
    model: Model,
    x: Images,
    y: Targets,
    threat: Threat,
    *,
    noise: float = 2.0,
    start: Images | None = None,
    generator: Generator = None,
) -> Images:
    """N-FGSM for training (de Jorge et al. 2022, algorithm 1): uniform noise of ``noise`` · eps, then one step of eps.

    By design the result is *not* projected on the ball, only on [0, 1]: it may be up to (1 + noise) · eps away. Never
    an evaluation attack. ``start`` gives the noisy image instead. Raises ``InputError`` where the norm is not linf.
    """
    if threat.norm != "linf":
        raise InputError(f"n-fgsm is defined for linf only, got {threat.norm}")
    if start is None:
        start = x + (2 * uniform(x, generator, *x.shape[1:]) - 1) * (noise * threat.eps)
    with inference(model):
        _, _, grad = look(model, start, y, cross_entropy)
    return threat.ascend(start, grad, threat.eps).clamp_(0, 1)


def pgd(
    model: Model,
    x: Images,
    y: Targets,
    threat: Threat,
    *,
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 1,
    objective: str | Objective = "ce",
    target: Labels | None = None,
    random_start: bool = True,
    start: Images | None = None,
    keep: str = "first",
    generator: Generator = None,
) -> Images:
    """Projected gradient ascent (Madry et al. 2018, section 2.1).

    ``step_size`` is in pixel units of the norm (default 2.5 · eps / steps). ``objective`` is ``ce``, ``margin``,
    ``dlr``, ``kl`` (from the model's own answer to x, as TRADES attacks) or a function of logits and labels. With
    ``target`` it is the target's loss that descends, and an image is fooled once it is answered as its target.

    ``keep="first"`` lets an image go once it is fooled; one that never is comes back at its point of largest margin, so
    that no step or restart makes the attack weaker. ``keep="best"`` goes on, for the largest margin of all points
    visited. ``keep="last"`` returns the last point without looking at its answer, one forward pass less: for training,
    where ``y`` may be whatever the objective compares with, such as distributions (b, classes).
    Restarts after the first are spent on images that are not fooled yet. ``start`` replaces the random start of the
    first.

    Raises ``InputError`` for steps or restarts below 1, a step size that is not positive, an unknown objective or keep.
    """
    if steps < 1 or restarts < 1:
        raise InputError(f"steps and restarts must be at least 1, got steps={steps}, restarts={restarts}")
    if keep not in ("first", "best", "last"):
        raise unknown("keep", keep, ("first", "best", "last"))
    step_size = 2.5 * threat.eps / steps if step_size is None else step_size
    if not 0 <= step_size < float("inf"):
        raise InputError(f"step_size must be a finite number of at least 0, in pixel units, got {step_size}")
    if objective == "kl" and target is not None:
        raise InputError(
            "the kl objective leaves the clean answer, it cannot approach a target: take ce, margin or dlr"
        )
    labels = y if target is None else target
    if keep != "last":  # training knows its own images, and a check would wait for a GPU
        check(x, y)
    with inference(model):
        ascends, reference = (_kl_from, answer(model, x)) if objective == "kl" else (objective_of(objective), labels)
        fooled: Objective = margin
        if target is not None:
            ascends, fooled = _negative(ascends), _negative(margin)
        if start is None:
            start = threat.random(x, generator) if random_start else x
        if keep == "last":
            for _ in range(steps):
                start = threat.project(threat.ascend(start, look(model, start, reference, ascends)[2], step_size), x)
            return start
        best = Best(start)
        rows = torch.arange(len(x), device=x.device)
        for restart in range(restarts):
            if restart:
                rows = (best.value <= 0).nonzero().squeeze(1)
                start = threat.random(x[rows], take(generator, rows))
            state = [rows, start, x[rows], labels[rows], reference[rows]]
            for step in range(steps + 1):
                if not len(state[0]):
                    break
                rows, x_adv, clean, label, compared = state
                if step == steps:
                    best.see(rows, x_adv, fooled(answer(model, x_adv), label))
                    break
                logits, _, grad = look(model, x_adv, compared, ascends)
                value = fooled(logits, label)
                best.see(rows, x_adv, value)
                state = [rows, threat.project(threat.ascend(x_adv, grad, step_size), clean), clean, label, compared]
                if keep == "first" and bool((value > 0).any()):
                    state = [tensor[value <= 0] for tensor in state]
    return best.x


def _kl_from(logits: Logits, clean: Logits) -> PerImage:
    return kl_divergence(clean, logits)


def _negative(objective: Objective) -> Objective:
    return lambda logits, y: -objective(logits, y)
