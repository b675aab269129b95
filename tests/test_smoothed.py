"""The smoothing of the runtime draws, answers and stops as that of fdml.certify does."""

import math

import numpy as np
import pytest
import torch
from scipy import special

from fdml import grid
from fdml.certify.noise import GridNoise
from fdml.certify.smoothing import ABSTAIN, Smoother
from fdml.grid import LEVELS, UNSURE, ArrayNoise, thresholds
from fdml.sequence import decide
from fdml.smoothed import ArraySmoother, Smoothing


@pytest.mark.parametrize("sigma", [0.001, 0.02, 0.12, 0.25, 0.5, 1.0, 4.0])
def test_the_thresholds_are_scipys_within_the_slack(sigma: float) -> None:
    _, _, reach = grid.reach(sigma)
    half = np.arange(reach, dtype=np.float64)
    tail = np.rint(special.ndtr(-(2 * half + 1) / (2 * LEVELS * sigma)) * 2.0**60).astype(np.int64)
    exact = np.concatenate([tail[::-1], (1 << 60) - tail])
    found = thresholds(sigma, reach)
    assert found.dtype == np.int64
    assert np.abs(found - exact).max() < UNSURE / 2


@pytest.mark.parametrize("shape", [(1, 6, 5), (3, 8, 8)])
@pytest.mark.parametrize("sigma", [0.05, 0.25, 1.0])
def test_the_noise_is_the_same_bit_for_bit(sigma: float, shape: tuple[int, int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for seed, number, first, part in [(0, 0, 0, ""), (7, 3, 100, "select"), ((1 << 63) - 1, 10**9, 5, "count")]:
        theirs = GridNoise(sigma, seed).draw(torch.from_numpy(image), number, first, 300, part)
        pixels, sure = ArrayNoise(sigma, seed).draw(image, number, first, 300, part)
        assert pixels.dtype == np.float32
        assert np.array_equal(pixels.view(np.uint32), theirs.pixels.numpy().view(np.uint32))
        assert np.array_equal(sure, theirs.sure.numpy())


def test_the_rare_draws_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    # All draws take the slow way, and many are not sure.
    monkeypatch.setattr(grid, "look_up", lambda thresholds, reach: np.full(1 << 16, grid.AMBIGUOUS, np.int16))
    monkeypatch.setattr(grid, "UNSURE", 1 << 43)
    image = np.full((1, 6, 5), 128, np.uint8)
    theirs = GridNoise(0.25, 3).draw(torch.from_numpy(image), 7, 11, 500)
    pixels, sure = ArrayNoise(0.25, 3).draw(image, 7, 11, 500)
    assert 0.1 < sure.mean() < 0.9
    assert np.array_equal(sure, theirs.sure.numpy())
    assert np.array_equal(pixels[sure], theirs.pixels.numpy()[sure])


def classifier(bias: float) -> tuple:
    """A linear classifier of three classes, for numpy and for torch: the weights are whole numbers of eighths and the
    images lie on a grid, so that no order of summation changes an answer."""
    weight = np.random.default_rng(1).integers(-8, 9, (3, 16)).astype(np.float64) / 8
    offset = np.array([bias, 0.0, -1.0])

    def for_numpy(x: np.ndarray) -> np.ndarray:
        return np.rint(x.reshape(len(x), -1) * np.float64(LEVELS)) @ weight.T + offset * LEVELS

    def for_torch(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(for_numpy(x.numpy()))

    return for_numpy, for_torch


@pytest.mark.parametrize("bias", [-2.0, 0.0, 0.3, 3.0])
@pytest.mark.parametrize("batch", [128, 512])
def test_the_outcome_is_the_same(bias: float, batch: int) -> None:
    for_numpy, for_torch = classifier(bias)
    images = np.random.default_rng(2).integers(0, 256, (6, 1, 4, 4), dtype=np.uint8)
    how = Smoothing(sigma=0.25, n=3000, alpha=0.001, radii=(0.25, 0.5, 0.75), seed=5)
    ours = ArraySmoother(for_numpy, ("a", "b", "c"), how, batch)
    theirs = Smoother(for_torch, 3, GridNoise(0.25, 5), alpha=0.001)
    for number, image in enumerate(images):
        found = ours.certify(image.astype(np.float32) / np.float32(LEVELS), number)
        expected = theirs.sequential(torch.from_numpy(image), number, how.radii, samples=how.n)
        answer = ABSTAIN if found.index is None else found.index
        assert (answer, found.radius, found.hits, found.n) == (
            expected.answer,
            expected.radius,
            expected.hits,
            expected.count,
        )


def test_an_image_off_the_grid_pays_the_distance() -> None:
    for_numpy, _ = classifier(3.0)
    how = Smoothing(sigma=0.25, n=1000, alpha=0.001, radii=(), seed=0)
    smoother = ArraySmoother(for_numpy, ("a", "b", "c"), how, 256)
    on = np.full((1, 4, 4), 128, np.float32) / np.float32(LEVELS)
    off = on + np.float32(0.3 / LEVELS)
    assert smoother.certify(off, 0).radius == pytest.approx(smoother.certify(on, 0).radius - 4 * 0.3 / LEVELS, abs=1e-6)


def test_a_copy_that_is_not_finite_is_a_miss() -> None:
    def broken(x: np.ndarray) -> np.ndarray:
        logits = np.tile(np.array([1.0, 0.0, np.nan]), (len(x), 1))
        logits[::2, 2] = -1
        return logits

    how = Smoothing(sigma=0.25, n=1000, alpha=0.001, radii=(0.1,), seed=0)
    found = ArraySmoother(broken, ("a", "b", "c"), how, 256).certify(np.zeros((1, 4, 4), np.float32), 0)
    assert found.abstained
    assert (found.label, found.index, found.radius) == (None, None, 0)
    assert found.hits == found.n / 2


def test_sampling_ends_when_all_is_decided() -> None:
    taken = []

    def looks(hits: int):
        for _ in range(1000):
            taken.append(hits)
            yield hits, 128

    radius, hits, count = decide(looks(128), (0.25,), sigma=0.25, alpha=0.001, samples=128_000)
    assert radius > 0.25
    assert hits == count == 128 * len(taken) < 1000
    taken.clear()
    radius, _, count = decide(looks(20), (0.25,), sigma=0.25, alpha=0.001, samples=128_000)
    assert radius == 0
    assert count < 1000
    assert math.isfinite(radius)


@pytest.mark.parametrize("calls", [0, 1, 2, 4])
def test_sampling_that_is_ended_gives_what_was_shown(calls: int) -> None:
    """The first call chooses the class, the others look at 128 copies each."""
    left = calls

    def classify(pixels: np.ndarray) -> np.ndarray | None:
        nonlocal left
        left -= 1
        return None if left < 0 else np.tile([1.0, 0.0], (len(pixels), 1))

    how = Smoothing(sigma=0.25, n=100_000, alpha=0.001, radii=(0.7,), seed=0)
    found = ArraySmoother(classify, ("a", "b"), how, 1).certify(np.zeros((1, 4, 4), np.float32), 0)
    looked = 128 * max(calls - 1, 0)
    assert (found.n, found.hits) == (looked, looked)
    assert found.abstained == (looked == 0)
    radius, _, _ = decide([(128, 128)] * max(calls - 1, 0), (0.7,), sigma=0.25, alpha=0.001, samples=100_000)
    assert found.radius == radius
    assert 0 <= found.radius < 0.7
