import numpy as np
import pytest
import torch
from scipy import stats

from fdml import grid
from fdml.certify.noise import GridNoise
from fdml.grid import LEVELS

IMAGE = torch.full((1, 6, 5), 128, dtype=torch.uint8)


def grid_values(pixels: torch.Tensor) -> np.ndarray:
    values = pixels.double().numpy() * LEVELS
    assert np.abs(values - values.round()).max() < 1e-3
    return values.round().astype(int)


@pytest.mark.parametrize("sigma", [0.02, 0.12, 0.25, 1.0])
def test_the_noise_is_the_normal_distribution_rounded_to_the_grid(sigma: float) -> None:
    drawn = GridNoise(sigma, seed=3).draw(IMAGE, 7, 0, 20_000)
    assert drawn.sure.all()
    values = grid_values(drawn.pixels).ravel() - 128
    steps = np.unique(values)
    expected = stats.norm.cdf((steps + 0.5) / (LEVELS * sigma))
    found = np.searchsorted(np.sort(values), steps, side="right") / values.size
    inside = steps < (max(1, int(6 * sigma)) + 1) * LEVELS - 128  # beyond, all is clipped
    assert np.abs(found - expected)[inside].max() < 1.95 / np.sqrt(values.size), "Kolmogorov and Smirnov at 0.001"


def test_the_copies_of_an_image_depend_on_nothing_but_seed_number_and_place() -> None:
    noise = GridNoise(0.25, seed=1)
    whole = noise.draw(IMAGE, 5, 0, 60).pixels
    parts = torch.cat([noise.draw(IMAGE, 5, first, 20).pixels for first in (0, 20, 40)])
    assert torch.equal(whole, parts)
    for other in (noise.draw(IMAGE, 6, 0, 60), GridNoise(0.25, seed=2).draw(IMAGE, 5, 0, 60)):
        assert not torch.equal(whole, other.pixels)
    assert not torch.equal(whole, noise.draw(IMAGE, 5, 0, 60, "select").pixels)


def test_neither_pixels_nor_copies_are_correlated() -> None:
    pixels = GridNoise(0.25).draw(torch.zeros(1, 4, 7, dtype=torch.uint8), 0, 0, 20_000).pixels.flatten(1)
    matrix = np.corrcoef(pixels.T)
    assert np.abs(matrix - np.eye(28)).max() < 0.035
    assert abs(np.corrcoef(pixels[:-1].flatten(), pixels[1:].flatten())[0, 1]) < 0.01


def test_the_rare_draws_are_as_exact_as_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without its table every draw is resolved by comparing 60 bits with the thresholds: where the table decides, alike.
    monkeypatch.setattr(grid, "look_up", lambda thresholds, reach: np.full(1 << 16, grid.AMBIGUOUS, np.int16))
    slow = GridNoise(0.25, seed=3)
    monkeypatch.undo()
    fast = GridNoise(0.25, seed=3)
    assert torch.equal(slow.draw(IMAGE, 7, 11, 300).pixels, fast.draw(IMAGE, 7, 11, 300).pixels)


def test_a_draw_that_is_not_certain_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "UNSURE", 1 << 43)  # about one draw in a hundred is now too near a threshold
    drawn = GridNoise(0.25).draw(IMAGE, 0, 0, 2000)
    assert 0.1 < float((~drawn.sure).float().mean()) < 0.5


@pytest.mark.parametrize("sigma", [0.1, 0.25, 0.5])
def test_sums_are_clipped_far_away(sigma: float) -> None:
    beyond = max(1, int(6 * sigma))
    pixels = GridNoise(sigma).draw(torch.zeros(3, 16, 16, dtype=torch.uint8), 0, 0, 500).pixels
    assert pixels.shape == (500, 3, 16, 16)
    assert pixels.min() >= -beyond
    assert pixels.max() <= beyond + 1
    assert pixels.std() == pytest.approx(sigma, rel=0.02)
