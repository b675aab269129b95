"""Red flags: signs that a model masks its gradients, or that an evaluation is too weak to say how robust it is.

docs/flags.md has a section for each: what is measured, from where it is raised, what to do next.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fdml.attacks.gradient import pgd
from fdml.attacks.objective import Model, answer, look
from fdml.errors import InputError, unknown
from fdml.inference import inference
from fdml.losses import Labels, Logits, cross_entropy, margin
from fdml.randomness import Generator, signs, take
from fdml.threat import Images, Threat

KINDS = ("one-step", "iterative", "white", "query", "transfer", "control")
"""What an attack is to the flags: ``white`` is any other use of gradients. A ``control`` may leave the threat model (a
rotation, a corruption) and is not judged."""

LEVELS: dict[str, tuple[float, float]] = {
    "one-step-beats-iterative": (0, 0),
    "black-box-beats-white-box": (0.03, 0.10),
    "more-steps-still-gain": (0.04, 0.10),
    "more-restarts-still-gain": (0.04, 0.10),
    "gap": (0.06, 0.10),
    "random-model": (0, 0),
    "zero-gradients": (0.05, 0.50),
    "non-finite-gradients": (0, 0),
    "wrong-gradients": (0.50, 0.50),
    "huge-eps": (0, 0),
}
"""Every flag: the figure above which it warns, and above which it fails."""

_HUGE = Threat("linf", 0.5)  # within it lies the plain grey image, of which no model can tell what it was
_PASSES = 8  # a model that draws one of two sizes for the whole batch shows it in all but 1 of 128 probes
_STEP = 1 / 255  # one level of an 8-bit pixel: a model that rounds to these changes as its gradient says
_DIRECTIONS = 4


@dataclass(frozen=True)
class Flag:
    """A finding. ``level`` is "warn" (accuracies may be too high) or "fail" (they are no evidence of robustness).

    ``figure`` is a share of the images in [0, 1], ``meaning`` one line, ``page`` the section that explains the flag.
    """

    name: str
    level: str
    figure: float
    meaning: str
    page: str


def from_outcomes(standing: Mapping[str, Tensor], kinds: Mapping[str, str]) -> list[Flag]:
    """The flags that the outcomes of an evaluation raise.

    ``standing``: for ``clean`` and each attack, (n,) booleans, whether the image withstands it; False where the clean
    answer is wrong. An attack that ran on the survivors of others is given with what withstands it and them. Run the
    one-step attacks and the first iterative one by themselves, and white-box attacks before black-box ones: what went
    before an attack hides what it would have found. ``kinds``: which of ``KINDS`` each attack is.

    Iterative attacks are known by their steps and restarts, as in ``pgd20``, ``pgd100x5`` or ``apgd50-ce``; the two of
    most effort are compared in each family. The gap is from ``pgd20``, or else the first iterative attack.

    Raises ``InputError`` where ``clean`` is missing, an attack has no kind or an unknown one, or the lengths differ.
    """
    of = _by_kind(standing, kinds)
    if not len(standing["clean"]):
        return []
    return [*_one_step(of), *_black_box(of), *_effort(of["iterative"]), *_gap(of)]


def probe(
    model: Model, x: Images, y: Labels, threat: Threat, *, generator: Generator = None, limit: int = 64
) -> list[Flag]:
    """The flags that the model itself raises: at most ``limit`` images are looked at, spread evenly over ``x``.

    Some 40 forward and 25 backward passes of each, fewer where PGD soon fools it. Gradients are judged on the images
    answered rightly, at the image itself and at a random point of ``threat``; a model cut off from autograd counts as
    one whose gradients are zero. Mode, statistics and ``.grad`` stay as they were.

    Raises ``InputError`` for a limit below 1.
    """
    if limit < 1:
        raise InputError(f"limit must be at least 1, got {limit}")
    count = min(limit, len(x))
    rows = torch.arange(count, device=x.device) * len(x) // max(count, 1)
    with inference(model):
        logits = answer(model, x[rows])
        random = _random(model, x[rows], logits)
        rows = rows[margin(logits, y[rows]) <= 0]
        if not len(rows):
            return random
        x, y, generator = x[rows], y[rows], take(generator, rows)
        model = _connected(model)
        flags = random + _gradients(model, [x, threat.random(x, generator)], y)
        if not random:  # two passes would differ by more than the gradient says
            flags += _differences(model, x, y, generator)
        stands = margin(answer(model, pgd(model, x, y, _HUGE, generator=generator)), y) <= 0
        return flags + _huge(int(stands.sum()) / count, logits.shape[1])


def _by_kind(standing: Mapping[str, Tensor], kinds: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
    """kind -> name -> outcomes."""
    if "clean" not in standing:
        raise InputError(f"the outcomes must hold clean, got {', '.join(standing) or 'none'}")
    of: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
    for name, stands in standing.items():
        if len(stands) != len(standing["clean"]):
            raise InputError(f"{name} has {len(stands)} outcomes, but clean has {len(standing['clean'])}")
        if name == "clean":
            continue
        if name not in kinds:
            raise InputError(f"attack {name} has no kind: one of {', '.join(KINDS)}")
        if kinds[name] not in KINDS:
            raise unknown("kind", kinds[name], KINDS)
        of[kinds[name]][name] = stands
    return of


def _gain(weak: Tensor, strong: Tensor) -> float:
    """The share of images by which ``strong`` fools more than ``weak``; 0 where chance may have done it.

    McNemar's test (1947) of the images that fell to one of the two alone, one-sided at 1%, corrected for continuity: it
    takes a lead of eight images or more.
    """
    won, lost = int((weak & ~strong).sum()), int((strong & ~weak).sum())
    return (won - lost) / len(weak) if won - lost - 1 > 2.326 * math.sqrt(won + lost) else 0.0


def _one_step(of: dict[str, dict[str, Tensor]]) -> list[Flag]:
    gains = {
        (one, many): _gain(stands, of["one-step"][one])
        for one in of["one-step"]
        for many, stands in of["iterative"].items()
    }
    if not gains:
        return []
    (one, many), gain = max(gains.items(), key=lambda item: item[1])
    return _raised(
        "one-step-beats-iterative", gain, f"{one} fools {_points(gain)} more than {many}, which takes many steps"
    )


def _black_box(of: dict[str, dict[str, Tensor]]) -> list[Flag]:
    white = {**of["one-step"], **of["iterative"], **of["white"]}
    black = {**of["query"], **of["transfer"]}
    if not white or not black:
        return []
    left = _all(white)
    best = min(black, key=lambda name: int((left & black[name]).sum()))
    gain = _gain(left, left & _all(black))
    return _raised(
        "black-box-beats-white-box",
        gain,
        f"{_points(gain)} withstand every white-box attack and fall to a black-box one, most of them to {best}",
    )


def _effort(iterative: Mapping[str, Tensor]) -> list[Flag]:
    families: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
    for name in iterative:
        if named := re.fullmatch(r"(.*?)(\d+)(?:x(\d+))?(\D.*)?", name):
            family, steps, restarts, variant = named.groups("")
            families.setdefault((family, variant), []).append((int(steps), int(restarts or 1), name))
    flags: list[Flag] = []
    for members in families.values():
        if len(members) > 1:
            weak, strong = sorted(members, key=lambda member: member[0] * member[1])[-2:]
            flag = "more-restarts-still-gain" if weak[0] == strong[0] else "more-steps-still-gain"
            gain = _gain(iterative[weak[2]], iterative[strong[2]])
            flags += _raised(flag, gain, f"{strong[2]} fools {_points(gain)} more than {weak[2]}; more may follow")
    return flags


def _gap(of: dict[str, dict[str, Tensor]]) -> list[Flag]:
    if not of["iterative"]:
        return []
    base = "pgd20" if "pgd20" in of["iterative"] else next(iter(of["iterative"]))
    stands = of["iterative"][base]
    every = _all({name: found for kind in KINDS if kind != "control" for name, found in of[kind].items()})
    gap = int((stands & ~every).sum()) / len(stands)
    return _raised("gap", gap, f"the worst case is {_points(gap)} below {base}, which alone says too much")


def _random(model: Model, x: Images, logits: Logits) -> list[Flag]:
    slack = 1e-4 * logits.abs().amax(1, keepdim=True)
    differs = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for _ in range(_PASSES - 1):
        other = answer(model, x)
        same = (other == logits) | ((other - logits).abs() <= slack) | (other.isnan() & logits.isnan())
        differs |= ~same.all(1)
    share = int(differs.sum()) / max(len(x), 1)
    return _raised("random-model", share, f"{_percent(share)} of the images get other logits when asked again")


def _gradients(model: Model, places: list[Images], y: Labels) -> list[Flag]:
    """By the cross-entropy, which most attacks ascend, at the worse of the places."""
    grads = [look(model, x, y, cross_entropy)[2].flatten(1) for x in places]
    zero = max(int((grad == 0).all(1).sum()) for grad in grads) / len(y)
    bad = max(int((~grad.isfinite()).any(1).sum()) for grad in grads) / len(y)
    return [
        *_raised("zero-gradients", zero, f"{_percent(zero)} of the images have a gradient of zero: nothing to follow"),
        *_raised("non-finite-gradients", bad, f"{_percent(bad)} of the images have gradients that are no numbers"),
    ]


def _differences(model: Model, x: Images, y: Labels, generator: Generator) -> list[Flag]:
    """What the gradient of the margin says of a small random step, beside what the step does."""
    x = x.clamp(_STEP, 1 - _STEP)
    grad = look(model, x, y, margin)[2]
    error, change = torch.zeros_like(grad[:, 0, 0, 0]), torch.zeros_like(grad[:, 0, 0, 0])
    for _ in range(_DIRECTIONS):
        step = _STEP * signs(x, generator, *x.shape[1:])
        done = margin(answer(model, x + step), y) - margin(answer(model, x - step), y)
        error += (done - 2 * (grad * step).flatten(1).sum(1)).square()
        change += done.square()
    # Where there is no gradient at all, another flag says so.
    wrong = (error > 0.25 * change) & (grad != 0).flatten(1).any(1)
    share = int(wrong.sum()) / len(y)
    return _raised(
        "wrong-gradients", share, f"on {_percent(share)} of the images the answer does not change as its gradient says"
    )


def _huge(accuracy: float, classes: int) -> list[Flag]:
    return _raised(
        "huge-eps",
        accuracy if accuracy > 1 / classes else 0.0,
        f"{_percent(accuracy)} of the images withstand PGD at {_HUGE}, where nothing is left of them",
    )


def _connected(model: Model) -> Model:
    """The same answers; where no gradient reaches the input it is zero, instead of an error from autograd."""
    return lambda x: model(x) + 0 * x.flatten(1).sum(1, keepdim=True)


def _raised(name: str, figure: float, meaning: str) -> list[Flag]:
    warn, fail = LEVELS[name]
    if figure <= warn:
        return []
    return [Flag(name, "fail" if figure > fail else "warn", figure, meaning, f"docs/flags.md#{name}")]


def _all(standing: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(standing.values())).all(0)


def _points(share: float) -> str:
    return f"{100 * share:.1f} points"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"
