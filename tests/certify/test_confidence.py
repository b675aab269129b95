import math

import numpy as np
import pytest
from scipy import stats

from fdml import sequence
from fdml.certify.confidence import clopper_pearson, clopper_pearson_upper
from fdml.sequence import chance, mixture, mixture_lower, probability_of, radius_of


@pytest.mark.parametrize("n", [1, 2, 100, 1000, 100_000])
@pytest.mark.parametrize("alpha", [0.001, 0.05])
def test_clopper_pearson_is_scipys_exact_interval_for_every_count(n: int, alpha: float) -> None:
    hits = np.arange(n + 1)
    exact = np.concatenate([[0.0], stats.beta.ppf(alpha, hits[1:], n - hits[1:] + 1)])
    found = clopper_pearson(hits, n, alpha)
    assert np.abs(found - exact).max() < 1e-9
    assert (found <= exact).all(), "rounded toward 0"
    for k in {0, 1, n // 2, n}:
        low, high = stats.binomtest(k, n).proportion_ci(1 - 2 * alpha, method="exact")
        assert float(clopper_pearson(k, n, alpha)) == pytest.approx(low, abs=1e-9)
        assert float(clopper_pearson_upper(k, n, alpha)) == pytest.approx(high, abs=1e-9)


def test_the_radius_is_cohens_and_rounds_toward_zero() -> None:
    p = np.linspace(0.5001, 0.99999, 500)
    exact = 0.25 * stats.norm.ppf(p)
    found = np.array([radius_of(float(q), 0.25) for q in p])
    assert np.abs(found - exact).max() < 1e-9
    assert (found <= exact).all()
    assert radius_of(0.5, 0.25) == radius_of(0.3, 0.25) == 0
    for radius in (0.0, 0.1, 0.75, 1.5):
        assert radius_of(probability_of(radius, 0.25), 0.25) == pytest.approx(radius, abs=1e-8)


@pytest.mark.parametrize(("hits", "n", "p"), [(990, 1000, 0.975), (600, 1000, 0.5), (500, 500, 0.99), (50, 100, 0.6)])
def test_the_mixture_is_the_likelihood_averaged_over_the_claim(hits: int, n: int, p: float) -> None:
    # By numbers: q = sin² t makes the density of Beta(1/2, 1/2) uniform in t.
    edges = np.linspace(math.asin(math.sqrt(p)), math.pi / 2, 400_001)
    q = np.sin((edges[1:] + edges[:-1]) / 2) ** 2
    ratio = hits * (np.log(q) - math.log(p)) + (n - hits) * (np.log1p(-q) - math.log1p(-p))
    expected = math.log(np.exp(ratio - ratio.max()).mean()) + ratio.max()
    assert mixture(hits, n, p) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_the_mixture_decreases_where_it_convinces() -> None:
    # The proof that one bound serves all radii at once needs this (docs/certify.md).
    for hits, n in [(100, 100), (995, 1000), (700, 1000), (99_990, 100_000), (60_000, 100_000)]:
        values = np.array([mixture(hits, n, p) for p in np.linspace(0.5, hits / n - 1e-9, 400)])
        convincing = values[values >= -math.log(0.05)]
        assert (np.diff(convincing) < 0).all()


@pytest.mark.parametrize("alpha", [0.001, 0.01])
def test_the_lower_bound_is_where_the_mixture_convinces(alpha: float) -> None:
    for hits, n in [(100, 100), (995, 1000), (700, 1000), (99_000, 100_000)]:
        lower = mixture_lower(hits, n, alpha)
        assert 0.5 < lower < float(clopper_pearson(hits, n, alpha)), "the price of looking whenever one likes"
        assert mixture(hits, n, lower) >= -math.log(alpha)
        assert mixture(hits, n, lower + 1e-6) < -math.log(alpha)
    assert mixture_lower(50, 100, alpha) == mixture_lower(0, 0, alpha) == mixture_lower(3, 100, alpha) == 0


def test_no_number_is_lost_at_the_ends() -> None:
    assert mixture(10, 10, 1.0) == -math.inf
    assert mixture(0, 10_000_000, 0.999999) < 0
    assert mixture(10_000_000, 10_000_000, 0.999999) > 0


def test_the_forecast_knows_what_is_impossible_and_what_is_sure() -> None:
    p = probability_of(0.75, 0.25)
    assert chance(100, 200, p, 0.001, 100_000) == 0
    assert chance(5000, 5000, p, 0.001, 100_000) > 0.9
    assert chance(10, 10, p, 0.001, 10) == 0


def _sequential_error(p: float, claim: float, alpha: float, trials: int, end: int, look: int) -> int:
    """How many of the trials ever show, at any look, that the probability p is above the claim."""
    random = np.random.default_rng(0)
    hits = np.zeros(trials, dtype=np.int64)
    wrong = np.zeros(trials, dtype=bool)
    for n in range(look, end + 1, look):
        hits += random.binomial(look, p, trials)
        wrong |= hits >= sequence._needed(n, claim, alpha)
    return int(wrong.sum())


@pytest.mark.parametrize("claim", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("alpha", [0.01, 0.05])
def test_type_one_errors_stay_below_alpha(claim: float, alpha: float) -> None:
    # At the border of the claim, where errors are most frequent. The reference method's level is nearly alpha itself,
    # so the count may exceed the mean by what chance allows once in a thousand times.
    trials, n = 10_000, 2000
    hits = np.random.default_rng(1).binomial(n, claim, trials)
    errors = int((clopper_pearson(hits, n, alpha) > claim).sum())
    assert errors <= stats.binom.ppf(0.999, trials, alpha)
    assert _sequential_error(claim, claim, alpha, trials, 4000, 32) <= alpha * trials


def test_the_error_test_can_fail() -> None:
    # Clopper and Pearson's bound looked at again and again is not a confidence sequence: what peeking costs.
    random = np.random.default_rng(0)
    hits = np.zeros(2000, dtype=np.int64)
    wrong = np.zeros(2000, dtype=bool)
    for n in range(32, 4001, 32):
        hits += random.binomial(32, 0.5, 2000)
        wrong |= clopper_pearson(hits, n, 0.01) > 0.5
    assert wrong.sum() > 3 * 0.01 * 2000
