"""A confidence sequence for a chance that is found by sampling, and when to stop sampling.

``mixture`` holds at every number of samples at once, so that one may stop when one likes (docs/certify.md has the
proof). ``decide`` is the sampling of randomised smoothing that follows, for whoever draws the samples.
"""

import math
from collections.abc import Iterable, Sequence

from fdml.beta import beta_tail, log_beta, normal_quantile, normal_tail

SLACK = 1e-12
"""Relative slack by which every bound and radius is moved toward 0: more than the functions in it err by."""

LOOK = 128
"""Samples between two looks of the sequential method."""

GIVE_UP = 0.01
"""A radius whose forecast chance of being certified is below this is given up."""

_BISECTIONS = 60


def decide(
    looks: Iterable[tuple[int, int]], radii: Sequence[float], *, sigma: float, alpha: float, samples: int
) -> tuple[float, int, int]:
    """The radius that is certified, from as many looks as that needs, with the hits and the samples that it took.

    ``looks`` gives (hits, samples) of one look after the other, at most ``samples`` samples together. After each,
    ``mixture`` tells which of the ``radii`` are certified, and a forecast which have become hopeless; sampling ends
    when each is one or the other. The radius 0, on which it depends whether to abstain, is always among them.
    """
    undecided = [(r, probability_of(r, sigma)) for r in sorted({0.0, *radii})]
    radius, hits, count = 0.0, 0, 0
    for more_hits, more in looks:
        hits, count = hits + more_hits, count + more
        passed = [r for r, p in undecided if mixture(hits, count, p) >= -math.log(alpha)]
        radius = max([radius, *passed])
        undecided = undecided[len(passed) :]
        while undecided and chance(hits, count, undecided[-1][1], alpha, samples) < GIVE_UP:
            undecided.pop()
        if not undecided:
            break
    return max(radius, radius_of(mixture_lower(hits, count, alpha), sigma)), hits, count


def mixture(hits: int, count: int, p: float) -> float:
    """log M of the claim that the probability is above ``p`` (in [1/2, 1)), after ``hits`` of ``count`` samples.

    M is the likelihood of the samples averaged over the probabilities above p, by the Beta(1/2, 1/2) density, over
    their likelihood at p. Where the claim is false M is a supermartingale that begins at 1, so it ever reaches
    1 / alpha with a chance of at most alpha (Ville's inequality), whenever and however often one looks. −inf stands for
    a number too small to compute.
    """
    misses = count - hits
    if p >= 1:
        return -math.inf
    tail = beta_tail(hits + 0.5, misses + 0.5, p)
    if not tail > 0:
        return -math.inf
    log_odds = log_beta(hits + 0.5, misses + 0.5) - log_beta(0.5, 0.5)
    log_tails = math.log(tail) - math.log(beta_tail(0.5, 0.5, p))
    value = log_odds + log_tails - hits * math.log(p) - misses * math.log1p(-p)
    # Beside what the sums lose, the two tails err by 1e-10 of themselves.
    return value - SLACK * (abs(log_odds) + count) - 4e-10


def mixture_lower(hits: int, count: int, alpha: float) -> float:
    """The largest probability in [1/2, 1) that ``mixture`` shows to be passed at level 1 − ``alpha``; 0 for none."""
    wanted = -math.log(alpha)
    low, high = 0.5, hits / count if count else 0.5
    if high <= 0.5 or mixture(hits, count, low) < wanted:
        return 0.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if middle < 1 and mixture(hits, count, middle) >= wanted:
            low = middle
        else:
            high = middle
    return low


def chance(hits: int, count: int, p: float, alpha: float, end: int) -> float:
    """About how likely ``mixture`` is to show that the probability is above ``p`` by the ``end``-th sample.

    The samples to come are forecast by the beta-binomial distribution that follows from those seen, as a normal one.
    It decides only whether to go on: a forecast that errs costs a certificate, never its truth.
    """
    left = end - count
    if left <= 0:
        return 0.0
    needed = _needed(end, p, alpha)
    if hits + left < needed:
        return 0.0
    a, b = hits + 0.5, count - hits + 0.5
    mean = left * a / (a + b)
    variance = mean * b / (a + b) * (a + b + left) / (a + b + 1)
    return normal_tail((needed - 0.5 - mean - hits) / math.sqrt(variance))


_known: dict[tuple[int, float, float], int] = {}


def _needed(count: int, p: float, alpha: float) -> int:
    """The smallest number of hits among ``count`` samples that shows p to be passed."""
    key = (count, p, alpha)
    if key not in _known:
        low, high = math.floor(count * p), count + 1
        while high - low > 1:
            middle = (low + high) // 2
            if mixture(middle, count, p) >= -math.log(alpha):
                high = middle
            else:
                low = middle
        if len(_known) > 10_000:
            _known.clear()
        _known[key] = high
    return _known[key]


def radius_of(p: float, sigma: float) -> float:
    """R = sigma · Phi⁻¹(p), rounded toward 0: the smoothed answer is constant in the open L2 ball of this radius where
    the class has a probability of at least ``p`` > 1/2 (Cohen et al. 2019, theorem 1); 0 for p <= 1/2."""
    return sigma * normal_quantile(p) * (1 - SLACK) if p > 0.5 else 0.0


def probability_of(radius: float, sigma: float) -> float:
    """The probability that certifies ``radius``: Phi(radius / sigma), rounded up."""
    return 1 - normal_tail(radius / sigma) * (1 - 4 * SLACK)
