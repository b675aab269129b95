import math
import random

import numpy as np
import pytest
from scipy import special

from fdml.beta import beta_tail, log_beta, normal_quantile, normal_tail


def grid() -> list[tuple[float, float, float]]:
    """Parameters of counts up to 10^6, with probabilities within eight deviations of the mean and anywhere."""
    draw = random.Random(0)
    points = []
    for _ in range(3000):
        count = round(10 ** draw.uniform(0, 6))
        hits = round(count * draw.choice([draw.random(), 0.5, 0.99, 0.999, 0.001, 0, 1]))
        a, b = hits + 0.5, count - hits + 0.5
        mean = a / (a + b)
        near = mean + draw.uniform(-8, 8) * math.sqrt(mean * (1 - mean) / (a + b))
        points.append((a, b, near if 1e-9 < near < 1 - 1e-9 else draw.random()))
    return points


def test_the_tail_is_scipys_to_ten_digits() -> None:
    a, b, p = np.array(grid()).T
    exact = special.betaincc(a, b, p)
    found = np.array([beta_tail(*point) for point in grid()])
    # Below these SciPy's own number has lost digits to underflow.
    kept = exact > 1e-290
    assert kept.mean() > 0.9
    assert np.abs(found[kept] / exact[kept] - 1).max() < 1e-10
    assert (found[~kept] < 1e-280).all()
    assert beta_tail(3.0, 2.0, 0.0) == 1
    assert beta_tail(3.0, 2.0, 1.0) == 0


def test_the_logarithm_of_beta_is_scipys() -> None:
    a, b, _ = np.array(grid()).T
    exact = special.betaln(a, b)
    found = np.array([log_beta(x, y) for x, y in zip(a, b, strict=True)])
    # SciPy itself loses digits to the size of the gammas.
    assert (np.abs(found - exact) < 1e-10 * np.abs(exact) + 1e-14 * (a + b)).all()
    assert log_beta(0.5, 0.5) == pytest.approx(math.log(math.pi), rel=1e-14)
    assert log_beta(1.0, 1e6) == pytest.approx(-math.log(1e6), rel=1e-14)


def test_the_normal_distribution_is_scipys() -> None:
    x = np.linspace(-30, 30, 4001)
    exact = special.ndtr(-x)
    found = np.array([normal_tail(float(value)) for value in x])
    assert np.abs(found / exact - 1).max() < 1e-12
    p = np.concatenate([np.geomspace(1e-300, 0.5, 2000), 1 - np.geomspace(1e-16, 0.5, 2000)])
    found = np.array([normal_quantile(float(value)) for value in p])
    assert np.abs(found - special.ndtri(p)).max() < 1e-12
    assert normal_quantile(0.0) == -math.inf
    assert normal_quantile(1.0) == math.inf
