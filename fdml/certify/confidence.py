"""How sure a count makes: lower bounds on the probability that a smoothed classifier answers its class.

Two of them. ``clopper_pearson`` holds for one number of samples fixed beforehand (Cohen et al. 2019). ``mixture``
holds at every number of samples at once, so that sampling may stop when it likes (docs/certify.md has the proof).
"""

import math

import numpy as np
from scipy import special

SLACK = 1e-12
"""Relative slack by which every bound and radius is moved toward 0: more than SciPy's functions err by."""

_BISECTIONS = 60


def clopper_pearson(hits: int | np.ndarray, count: int, alpha: float) -> np.ndarray:
    """The exact one-sided lower bound at level 1 − ``alpha`` on a probability that ``hits`` of ``count`` samples had:
    below the true probability but for a chance of at most ``alpha`` (Clopper and Pearson 1934)."""
    hits = np.asarray(hits, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        bound = special.betaincinv(hits, count - hits + 1, alpha)
    return np.where(hits > 0, bound, 0.0) * (1 - SLACK)


def clopper_pearson_upper(hits: int | np.ndarray, count: int, alpha: float) -> np.ndarray:
    """The exact one-sided upper bound, above the true probability but for a chance of at most ``alpha``."""
    return 1 - clopper_pearson(count - np.asarray(hits), count, alpha)


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
    tail = special.betaincc(hits + 0.5, misses + 0.5, p)
    if not tail > 0:
        return -math.inf
    log_odds = special.betaln(hits + 0.5, misses + 0.5) - special.betaln(0.5, 0.5)
    log_tails = math.log(tail) - math.log(special.betaincc(0.5, 0.5, p))
    value = log_odds + log_tails - hits * math.log(p) - misses * math.log1p(-p)
    return value - SLACK * (abs(log_odds) + count)


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
    return float(special.ndtr((mean + hits - needed + 0.5) / math.sqrt(variance)))


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
    return float(sigma * special.ndtri(p) * (1 - SLACK)) if p > 0.5 else 0.0


def probability_of(radius: float, sigma: float) -> float:
    """The probability that certifies ``radius``: Phi(radius / sigma), rounded up."""
    return float(1 - special.ndtr(-radius / sigma) * (1 - 4 * SLACK))
