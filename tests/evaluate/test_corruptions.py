"""The common corruptions: what each does at each severity, exactly where that can be said."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fdml.errors import InputError
from fdml.evaluate.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from fdml.randomness import Streams

every = pytest.mark.parametrize("name", CORRUPTIONS)
at_each = pytest.mark.parametrize("severity", SEVERITIES)
RANDOM = {"gaussian-noise", "shot-noise", "impulse-noise", "fog", "occlusion"}


def streams(n: int = 60, seed: int = 0) -> Streams:
    return Streams.of(torch.arange(n), seed)


def pictures(n: int = 60, side: int = 8) -> Tensor:
    """Soft spots, alike everywhere, so that no grid of cells fits them better than another."""
    noise = torch.rand(n, 1, side + 2, side + 2, generator=torch.Generator().manual_seed(0))
    return (0.5 + 1.5 * (F.avg_pool2d(noise, 3, stride=1) - 0.5)).clamp(0.1, 0.9)


def plain(value: float, n: int = 3) -> Tensor:
    return torch.full((n, 3, 12, 10), value)


@every
@pytest.mark.parametrize("side", [8, 9, 28])
def test_severity_grows(name: str, side: int) -> None:
    x = pictures(side=side)
    changes = [float((corrupt(name, x, severity, streams()) - x).square().mean()) for severity in SEVERITIES]
    assert changes == sorted(changes)
    assert 0 < changes[0] < changes[2] < changes[4] < 0.3


@every
@at_each
def test_shape_range_and_type(name: str, severity: int) -> None:
    torch.manual_seed(0)
    for x in (torch.rand(4, 3, 9, 14), torch.rand(2, 1, 8, 8, dtype=torch.float64), plain(0.0), plain(1.0)):
        before = x.clone()
        found = corrupt(name, x, severity, streams(len(x)))
        assert found.shape == x.shape
        assert found.dtype == x.dtype
        assert found.min() >= 0
        assert found.max() <= 1
        assert torch.equal(x, before), "the images given are left as they were"


@every
def test_the_batch_changes_no_outcome(name: str) -> None:
    x = pictures(6)
    together = corrupt(name, x, 3, Streams.of(torch.arange(6), 1))
    index = torch.tensor([4, 1])
    torch.testing.assert_close(corrupt(name, x[index], 3, Streams.of(index, 1)), together[index])


@every
def test_randomness_is_each_images_own(name: str) -> None:
    x = pictures(1).expand(8, -1, -1, -1)
    found = corrupt(name, x, 4, streams(8))
    assert (len(found.unique(dim=0)) > 4) == (name in RANDOM)
    assert torch.equal(found, corrupt(name, x, 4, streams(8)))
    assert torch.equal(found, corrupt(name, x, 4, streams(8, seed=9))) == (name not in RANDOM)


@every
def test_global_randomness_is_untouched(name: str) -> None:
    x, before = pictures(2), torch.get_rng_state()
    corrupt(name, x, 2, streams(2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["gaussian-blur", "contrast", "pixelate"])
@at_each
def test_an_even_image_stays_as_it_is(name: str, severity: int) -> None:
    torch.testing.assert_close(corrupt(name, plain(0.3), severity), plain(0.3))


@at_each
def test_black_has_no_shot_noise_and_white_gets_no_brighter(severity: int) -> None:
    assert torch.equal(corrupt("shot-noise", plain(0.0), severity, streams(3)), plain(0.0))
    assert torch.equal(corrupt("brightness", plain(1.0), severity), plain(1.0))


def test_noise_has_its_size() -> None:
    x = torch.full((50, 1, 20, 20), 0.5)

    def of(name: str, severity: int) -> Tensor:
        return corrupt(name, x, severity, streams(50)) - x

    assert float(of("gaussian-noise", 2).std()) == pytest.approx(0.08, rel=0.03)
    assert float(of("shot-noise", 2).std()) == pytest.approx((0.5 / 25) ** 0.5, rel=0.03)
    struck = of("impulse-noise", 5)
    assert float((struck == 0.5).float().mean()) == pytest.approx(0.135, abs=0.01)
    assert float((struck == -0.5).float().mean()) == pytest.approx(0.135, abs=0.01)
    assert ((struck == 0) | (struck.abs() == 0.5)).all()


def test_contrast_draws_towards_the_mean_of_the_channel() -> None:
    x = torch.rand(3, 2, 7, 7)
    mean = x.mean((2, 3), keepdim=True)
    torch.testing.assert_close(corrupt("contrast", x, 5), mean + 0.15 * (x - mean))


def test_brightness_adds() -> None:
    torch.testing.assert_close(corrupt("brightness", plain(0.3), 4), plain(0.7))


def test_blur_keeps_the_light_and_is_round() -> None:
    x = torch.zeros(1, 1, 29, 29)
    x[0, 0, 14, 14] = 1
    found = corrupt("gaussian-blur", x, 3)
    assert float(found.sum()) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(found, found.transpose(2, 3))
    torch.testing.assert_close(found, found.flip(3))
    places = torch.arange(29) - 14.0
    assert float((found[0, 0].sum(0) * places**2).sum()) ** 0.5 == pytest.approx(0.05 * 29, rel=0.05)


def test_pixelate_has_fewer_pixels() -> None:
    found = corrupt("pixelate", torch.rand(1, 1, 8, 8), 3)
    assert len(found.unique()) == 16
    torch.testing.assert_close(found, found[..., ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_occlusion_is_one_rectangle_somewhere() -> None:
    found = corrupt("occlusion", plain(0.0, n=60), 3, streams()) == 0.5
    rows, columns = found.any(3).any(1), found.any(2).any(1)
    assert (rows.sum(1) == round(0.375 * 12)).all()
    assert (columns.sum(1) == round(0.375 * 10)).all()
    assert (found == (rows[:, None, :, None] & columns[:, None, None, :])).all()
    assert rows.any(0).all(), "every place is reached, the border as well"
    assert columns.any(0).all()


def test_fog_is_bright_and_smooth() -> None:
    found = corrupt("fog", torch.zeros(20, 3, 28, 28), 5, streams(20))
    assert 0.2 < float(found.mean()) < 0.5
    assert float(found.std()) > 0.02
    assert float((found[..., 1:] - found[..., :-1]).abs().max()) < 0.1
    assert torch.equal(found[:, 0], found[:, 2]), "grey"


def test_a_users_mistake_is_named() -> None:
    x = plain(0.5)
    with pytest.raises(InputError, match="unknown corruption 'gausian-blur': did you mean 'gaussian-blur'"):
        corrupt("gausian-blur", x, 1)
    for severity in (0, 6):
        with pytest.raises(InputError, match=f"from 1 to 5, got {severity}"):
            corrupt("fog", x, severity)
