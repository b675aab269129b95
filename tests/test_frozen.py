"""The attacked form of a model: the same function, the same for an image in any company, and a copy."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdml.models import Frozen, RobustModel, build, wrap
from fdml.models.conv import convolution


def network(architecture: str = "cnn", channels: int = 1) -> RobustModel:
    torch.manual_seed(0)
    input_ = (channels, 16, 16)
    model = build(
        architecture, input=input_, classes=5, mean=(0.4,) * channels, std=(0.3,) * channels, options={"width": 4}
    )
    with torch.no_grad():
        for _ in range(3):  # statistics that are not those of a fresh network
            model.train()(torch.rand(32, *input_))
    return model.eval()


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)
    return grad


def case(channels: int = 1, count: int = 20) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(count, channels, 16, 16), torch.randint(0, 5, (count,))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("architecture", ["cnn", "resnet18"])
def test_it_is_the_same_function(architecture: str, channels: int) -> None:
    model = network(architecture, channels)
    x, y = case(channels)
    frozen = Frozen(model)
    torch.testing.assert_close(frozen(x), model(x).detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient(frozen, x, y), gradient(model, x, y), atol=1e-5, rtol=1e-4)
    taps = frozen.outputs(x).taps
    for name, tap in model.outputs(x).taps.items():
        torch.testing.assert_close(taps[name], tap.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 5, 8, 13])
def test_company_does_not_change_a_bit(count: int) -> None:
    frozen = Frozen(network())
    x, y = case()
    with torch.no_grad():
        assert torch.equal(frozen(x[:count]), frozen(x)[:count])
    assert torch.equal(gradient(frozen, x[:count], y[:count]), gradient(frozen, x, y)[:count])


def test_it_is_a_copy() -> None:
    model = network()
    x, _ = case()
    frozen = Frozen(model)
    before = frozen(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(frozen(x), before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_a_wrapped_network_taps_its_own_copy() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(256, 7), nn.ReLU(), nn.Linear(7, 5))
    model = wrap(module, taps=["1"])
    x, _ = case()
    frozen = Frozen(model)
    torch.testing.assert_close(frozen.outputs(x).taps["1"], model.outputs(x).taps["1"].detach())
    assert not any("_tapped" in child.__dict__ for child in module.modules())


@pytest.mark.parametrize(("channels", "kernel"), [(1, 3), (3, 3), (2, 1), (3, 5)])
def test_the_gradient_of_the_first_layer(channels: int, kernel: int) -> None:
    """Against torch's own, in double precision, on images that are not square."""
    torch.manual_seed(0)
    x, weight = torch.rand(3, channels, 7, 9).double(), torch.randn(4, channels, kernel, kernel).double()
    bias, grad = torch.randn(4).double(), torch.randn(3, 4, 7, 9).double()
    padding = (kernel // 2, kernel // 2)
    found = []
    for conv in (
        lambda x: convolution(x, weight, bias, (1, 1), padding),
        lambda x: F.conv2d(x, weight, bias, 1, padding),
    ):
        leaf = x.clone().requires_grad_()
        out = conv(leaf)
        found.append((out.detach(), torch.autograd.grad(out, leaf, grad)[0]))
    torch.testing.assert_close(found[0], found[1])


def test_grey_images_stay_channels_last() -> None:
    model = network()
    with torch.no_grad():
        for name, tap in model.outputs(case()[0]).taps.items():
            assert tap.ndim == 2 or tap.is_contiguous(memory_format=torch.channels_last), name


def test_no_images_have_no_logits() -> None:
    model = Frozen(network())
    nothing = torch.rand(0, 1, 16, 16)
    assert model(nothing).shape == (0, 5)
    assert model.outputs(nothing).taps["features"].shape[0] == 0
