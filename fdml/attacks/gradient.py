"""White-box attacks by the gradient of the input: FGSM and its random variants, PGD, APGD.

Each returns images inside the threat model and in [0, 1], and leaves the model's mode, statistics and ``.grad`` as they
were. ``model`` is any callable from images (b, c, h, w) in [0, 1] to logits (b, classes).
"""

import torch

from fdml.attacks.objective import Best, Model, Objective, look, objective_of
from fdml.errors import InputError, unknown
from fdml.inference import inference
from fdml.losses import Labels, PerImage, cross_entropy, margin
from fdml.threat import Images, Threat


def fgsm(
    model: Model,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    objective: str | Objective = "ce",
    random_start: bool = False,
    generator: torch.Generator | None = None,
) -> Images:
    """One step of length eps (Goodfellow et al. 2015, section 4); with ``random_start``, R-FGSM (Wong et al. 2020) of
    step 1.25 eps from a random point, projected."""
    start = threat.random(x, generator) if random_start else x
    with inference(model):
        _, _, grad = look(model, start, y, objective_of(objective))
    return threat.project(threat.ascend(start, grad, threat.eps * (1.25 if random_start else 1.0)), x)


def n_fgsm(
    model: Model,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    noise: float = 2.0,
    start: Images | None = None,
    generator: torch.Generator | None = None,
) -> Images:
    """N-FGSM for training (de Jorge et al. 2022, algorithm 1): uniform noise of ``noise`` · eps, then one step of eps.

    By design the result is *not* projected on the ball, only on [0, 1]: it may be up to (1 + noise) · eps away. Never
    an evaluation attack. ``start`` gives the noisy image instead. Raises ``InputError`` where the norm is not linf.
    """
    if threat.norm != "linf":
        raise InputError(f"n-fgsm is defined for linf only, got {threat.norm}")
    if start is None:
        start = x + torch.empty_like(x).uniform_(-noise * threat.eps, noise * threat.eps, generator=generator)
    with inference(model):
        _, _, grad = look(model, start, y, cross_entropy)
    return threat.ascend(start, grad, threat.eps).clamp_(0, 1)


def pgd(
    model: Model,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 1,
    objective: str | Objective = "ce",
    random_start: bool = True,
    start: Images | None = None,
    keep: str = "best",
    generator: torch.Generator | None = None,
) -> Images:
    """Projected gradient ascent (Madry et al. 2018, section 2.1).

    ``step_size`` is in pixel units of the norm (default 2.5 · eps / steps). ``keep="best"`` returns, per image, the
    point of largest margin among every point visited in every restart, the last one included: an image that was fooled
    anywhere is returned fooled. ``keep="last"`` returns the last point without looking at its answer, one forward pass
    less: for training. Restarts after the first are spent only on images that are not fooled yet. ``start`` replaces
    the random start of the first restart.

    Raises ``InputError`` for steps or restarts below 1, an unknown objective or keep.
    """
    if steps < 1 or restarts < 1:
        raise InputError(f"steps and restarts must be at least 1, got steps={steps}, restarts={restarts}")
    if keep not in ("best", "last"):
        raise unknown("keep", keep, ("best", "last"))
    step_size = 2.5 * threat.eps / steps if step_size is None else step_size
    ascends = objective_of(objective)
    with inference(model):
        if start is None:
            start = threat.random(x, generator) if random_start else x
        if keep == "last":
            return _climb(model, start, x, y, threat, steps, step_size, ascends)
        best, best_margin = _climb_best(model, start, x, y, threat, steps, step_size, ascends)
        for _ in range(restarts - 1):
            left = (best_margin <= 0).nonzero().squeeze(1)
            if not len(left):
                break
            start = threat.random(x[left], generator)
            found, found_margin = _climb_best(model, start, x[left], y[left], threat, steps, step_size, ascends)
            better = found_margin > best_margin[left]
            best[left[better]] = found[better]
            best_margin[left[better]] = found_margin[better]
    return best


def apgd(
    model: Model,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    steps: int = 100,
    objective: str | Objective = "ce",
    start: Images | None = None,
    generator: torch.Generator | None = None,
) -> Images:
    """Auto-PGD: momentum, and a step that halves where the objective stops growing (Croce and Hein 2020, alg. 1).

    Constants are the paper's: first step 2 eps, momentum 0.75, rho 0.75, checkpoints at 22% of the steps and then at
    intervals shrinking by 3% down to 6%. Returns, per image, the point of largest margin among those visited.

    Raises ``InputError`` for steps below 1, an unknown objective, and the l1 norm.
    """
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    if threat.norm == "l1":
        raise InputError("apgd supports linf and l2, got l1")
    ascends = objective_of(objective)
    interval = max(int(0.22 * steps), 1)
    shortest, shrink = max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)
    with inference(model):
        x_adv = _apgd_start(x, threat, generator) if start is None else start
        logits, value, grad = look(model, x_adv, y, ascends)
        kept = Best(x_adv, margin(logits, y))
        # The point of highest objective so far, where a halved step restarts from.
        top, top_value, top_grad = x_adv.clone(), value.clone(), grad.clone()
        step = torch.full((len(x), 1, 1, 1), 2 * threat.eps, dtype=x.dtype, device=x.device)
        previous, rises = x_adv, torch.zeros_like(value)
        value_at_check, halved = top_value.clone(), torch.ones_like(value, dtype=torch.bool)
        since_check = 0
        for index in range(steps):
            moved, previous = x_adv - previous, x_adv
            ahead = threat.project(x_adv + step * threat.ascend(torch.zeros_like(grad), grad, 1.0), x)
            mix = 0.75 if index else 1.0
            x_adv = threat.project(x_adv + mix * (ahead - x_adv) + (1 - mix) * moved, x)
            last_value = value
            if index == steps - 1:
                with torch.no_grad():
                    kept.see(x_adv, margin(model(x_adv), y))
                break
            logits, value, grad = look(model, x_adv, y, ascends)
            kept.see(x_adv, margin(logits, y))
            rises += value > last_value
            higher = value > top_value
            top[higher], top_grad[higher] = x_adv[higher], grad[higher]
            top_value = torch.maximum(top_value, value)
            since_check += 1
            if since_check == interval:
                stuck = ~halved & (value_at_check >= top_value)
                halved = (rises <= 0.75 * interval) | stuck
                value_at_check = top_value.clone()
                step[halved] /= 2
                x_adv = torch.where(halved[:, None, None, None], top, x_adv)
                grad = torch.where(halved[:, None, None, None], top_grad, grad)
                rises.zero_()
                since_check, interval = 0, max(interval - shrink, shortest)
    return kept.x


def _climb(
    model: Model,
    x_adv: Images,
    x: Images,
    y: Labels,
    threat: Threat,
    steps: int,
    step_size: float,
    objective: Objective,
    kept: Best | None = None,
) -> Images:
    """The last point; ``kept`` sees every point before it, whose logits are there anyway."""
    for _ in range(steps):
        logits, _, grad = look(model, x_adv, y, objective)
        if kept is not None:
            kept.see(x_adv, margin(logits, y))
        x_adv = threat.project(threat.ascend(x_adv, grad, step_size), x)
    return x_adv


def _climb_best(
    model: Model,
    start: Images,
    x: Images,
    y: Labels,
    threat: Threat,
    steps: int,
    step_size: float,
    objective: Objective,
) -> tuple[Images, PerImage]:
    kept = Best(start, torch.full((len(start),), -torch.inf, dtype=start.dtype, device=start.device))
    last = _climb(model, start, x, y, threat, steps, step_size, objective, kept)
    with torch.no_grad():
        kept.see(last, margin(model(last), y))
    return kept.x, kept.value


def _apgd_start(x: Images, threat: Threat, generator: torch.Generator | None) -> Images:
    """The reference's start: a random direction scaled to the boundary of the ball, clipped to [0, 1]."""
    if threat.norm == "linf":
        noise = torch.empty_like(x).uniform_(-1, 1, generator=generator)
        scale = noise.abs().flatten(1).amax(1)
    else:
        noise = torch.empty_like(x).normal_(generator=generator)
        scale = noise.flatten(1).norm(dim=1)
    return (x + threat.eps * noise / scale[:, None, None, None]).clamp_(0, 1)
