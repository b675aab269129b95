"""How sure a count makes: bounds on the probability that a smoothed classifier answers its class.

These hold for one number of samples fixed beforehand (Cohen et al. 2019); those of ``fdml.sequence`` hold at every
number of samples at once.
"""

import numpy as np
from scipy import special

from fdml.sequence import SLACK


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
