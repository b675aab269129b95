"""The models: shapes, sizes, taps, folded normalisation, and pixels in [0, 1] at the door."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fdml.errors import InputError
from fdml.interval import box
from fdml.models import ARCHITECTURES, Outputs, RobustModel, build, wrap
from fdml.models.norm import BatchNorm2d, ConvNorm

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
# What would take seconds at full width is built narrow; the graph is the same.
SMALL: list[tuple[str, dict[str, object]]] = [
    ("cnn", {"width": 4}),
    ("resnet18", {"width": 4}),
    ("resnet18", {"width": 4, "preact": True}),
    ("wrn-10-1", {}),
    ("wrn-16-2", {}),
]
small = pytest.mark.parametrize(("architecture", "options"), SMALL)


def make(
    architecture: str, options: dict[str, object] | None = None, channels: int = 3, size: int = 32, classes: int = 5
) -> RobustModel:
    mean, std = MEAN[:channels], STD[:channels]
    return build(architecture, input=(channels, size, size), classes=classes, mean=mean, std=std, options=options)


def images(b: int, c: int, h: int, w: int | None = None, seed: int = 0) -> Tensor:
    return torch.rand(b, c, h, w or h, generator=torch.Generator().manual_seed(seed))


def shake(model: nn.Module) -> None:
    """Statistics and scales as after training: nothing is 0 or 1 by accident."""
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            for tensor, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.3, 3.0),
                (module.weight.detach(), 0.5, 1.5),
                (module.bias.detach(), -0.5, 0.5),
            ):
                tensor.uniform_(low, high, generator=generator)


@small
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 28), (3, 32), (3, 64)])
@pytest.mark.parametrize("mode", [True, False])
def test_logits_and_taps(architecture: str, options: dict[str, object], channels: int, size: int, mode: bool) -> None:
    model = make(architecture, options, channels, size).train(mode)
    x = images(2, channels, size)
    logits, taps = model.outputs(x)
    assert logits.shape == (2, 5)
    assert logits.isfinite().all()
    assert tuple(taps) == model.tap_names
    *stages, features = taps.values()
    assert model.tap_names == (*(f"stage{i + 1}" for i in range(len(stages))), "features")
    sides = [stage.shape[2] for stage in stages]
    assert all(stage.shape[0] == 2 and stage.shape[2] == stage.shape[3] for stage in stages)
    assert sides == sorted(sides, reverse=True)
    assert size // 8 <= sides[-1] <= sides[0] <= size
    torch.testing.assert_close(features, stages[-1].mean((2, 3)))


@small
def test_features_are_what_the_last_linear_layer_reads(architecture: str, options: dict[str, object]) -> None:
    model = make(architecture, options).eval()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(linear) == 1
    logits, taps = model.outputs(images(2, 3, 32))
    torch.testing.assert_close(linear[0](taps["features"]), logits)
    assert torch.equal(model(images(2, 3, 32)), logits)


@small
def test_a_tap_is_what_the_next_stage_reads(architecture: str, options: dict[str, object]) -> None:
    # Activations are in place: a tap that the next stage writes into would hold another tensor than it was handed.
    model = make(architecture, options).eval()
    shake(model)
    backbone: Any = model.backbone
    followers = [backbone.stage2[0], backbone.stage3] if architecture == "cnn" else list(backbone.stages)[1:]
    read: list[Tensor] = []
    for module in followers:
        module.register_forward_pre_hook(lambda _module, args: read.append(args[0].detach().clone()))
    stages = list(model.outputs(images(2, 3, 32)).taps.values())[:-1]
    assert len(read) == len(stages) - 1
    for seen, tap in zip(read, stages, strict=False):
        assert torch.equal(seen, tap)


@small
def test_every_parameter_and_the_image_get_a_gradient(architecture: str, options: dict[str, object]) -> None:
    model = make(architecture, options)
    x = images(4, 3, 32).requires_grad_()
    model(x).square().sum().backward()
    for name, parameter in (*model.named_parameters(), ("image", x)):
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def unfolded(layer: ConvNorm, x: Tensor) -> Tensor:
    """What ``layer`` means: torch's own convolution, then torch's own normalisation with the layer's numbers."""
    norm = nn.BatchNorm2d(layer.norm.num_features)
    norm.load_state_dict(layer.norm.state_dict())
    norm.train(layer.training)
    return norm(layer.conv(x))


LAYERS = pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1), (1, 2)])


@LAYERS
def test_folded_inference_is_convolution_then_normalisation(kernel: int, stride: int) -> None:
    torch.manual_seed(4)
    layer = ConvNorm(3, 6, kernel, stride).eval()
    shake(layer)
    x = images(4, 3, 9).requires_grad_()
    found, expected = layer(x), unfolded(layer, x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    # Weighted, so that every output's gradient counts on its own.
    ahead = torch.randn(found.shape, generator=torch.Generator().manual_seed(6))
    grads = [torch.autograd.grad((out * ahead).sum(), (x, layer.conv.weight))[:2] for out in (found, expected)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


@LAYERS
def test_in_training_the_layers_are_those_of_torch(kernel: int, stride: int) -> None:
    layer = ConvNorm(3, 6, kernel, stride).train()
    shake(layer)
    reference = nn.Sequential(copy.deepcopy(layer.conv), nn.BatchNorm2d(6))
    reference[1].load_state_dict(layer.norm.state_dict())
    for step in range(3):
        x = images(4, 3, 9, seed=step)
        assert torch.equal(layer(x), reference(x))
    for name, value in reference[1].state_dict().items():
        assert torch.equal(layer.norm.state_dict()[name], value), name


def test_inference_is_of_the_weights_as_they_are_now() -> None:
    # Nothing folded may outlive a change of what was folded.
    layer, x = ConvNorm(3, 6).eval(), images(2, 3, 8)
    before = layer(x)
    shake(layer)
    assert not torch.allclose(layer(x), before)
    torch.testing.assert_close(layer(x), unfolded(layer, x), atol=1e-5, rtol=1e-5)


@small
def test_a_folded_network_is_the_network(architecture: str, options: dict[str, object]) -> None:
    model = make(architecture, options).eval()
    shake(model)
    x = images(2, 3, 32)
    found = model(x)
    for module in model.modules():
        if isinstance(module, ConvNorm):
            module.forward = lambda x, module=module: unfolded(module, x)
    torch.testing.assert_close(found, model(x), atol=1e-4, rtol=1e-4)


def test_the_affine_of_inference() -> None:
    norm, x = BatchNorm2d(3).eval(), images(2, 3, 4)
    shake(norm)
    scale, shift = norm.affine_of_inference()
    torch.testing.assert_close(scale[:, None, None] * x + shift[:, None, None], norm(x))


@pytest.mark.parametrize(
    ("architecture", "channels", "size", "low", "high"),
    [
        ("cnn", 1, 8, 30_000, 200_000),
        ("cnn", 1, 28, 30_000, 200_000),
        ("resnet18", 3, 32, 11.16e6, 11.18e6),
        ("wrn-28-10", 3, 32, 36.4e6, 36.6e6),
        ("wrn-16-8", 3, 32, 10.9e6, 11.1e6),
    ],
)
def test_sizes(architecture: str, channels: int, size: int, low: float, high: float) -> None:
    with torch.device("meta"):
        model = make(architecture, channels=channels, size=size, classes=10)
    assert low <= sum(parameter.numel() for parameter in model.parameters()) <= high


def test_every_architecture_that_is_listed_is_built() -> None:
    for architecture in ARCHITECTURES:
        with torch.device("meta"):
            assert make(architecture).tap_names[-1] == "features"


def test_normalisation_is_inside_and_in_the_state() -> None:
    model, x = make("cnn", {"width": 4}).eval(), images(2, 3, 32)
    normal = torch.stack([(x[:, c] - MEAN[c]) / STD[c] for c in range(3)], 1)
    torch.testing.assert_close(model(x), model.backbone(normal).logits)
    state = model.state_dict()
    assert state["mean"].flatten().tolist() == pytest.approx(MEAN)
    assert state["std"].flatten().tolist() == pytest.approx(STD)
    assert not {"mean", "std"} & {name for name, _ in model.named_parameters()}


def test_images_need_not_be_square() -> None:
    model = build("cnn", input=(3, 16, 40), classes=4, mean=MEAN, std=STD, options={"width": 4})
    assert model(images(2, 3, 16, 40)).shape == (2, 4)


@pytest.mark.parametrize("architecture", ["cnn", "resnet18", "wrn-10-1"])
def test_the_seed_decides_the_weights(architecture: str) -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(make(architecture, {} if architecture.startswith("wrn") else {"width": 4}).state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not all(torch.equal(value, states[2][name]) for name, value in states[0].items())


@pytest.mark.parametrize(
    ("architecture", "options", "shape", "message"),
    [
        ("resnet81", {}, (3, 32, 32), "'resnet81'.*'resnet18'"),
        ("vit", {}, (3, 32, 32), "'vit'.*cnn.*resnet18"),
        ("wrn-27-10", {}, (3, 32, 32), r"'wrn-27-10'.*6n \+ 4"),
        ("wrn-4-1", {}, (3, 32, 32), "'wrn-4-1'.*at least 10"),
        ("wrn-28-0", {}, (3, 32, 32), "'wrn-28-0'.*width at least 1"),
        ("wrn-28", {}, (3, 32, 32), "'wrn-28'"),
        ("cnn", {"depth": 3}, (3, 32, 32), "'cnn'.*depth"),
        ("resnet18", {"with": 3}, (3, 32, 32), "'resnet18'.*with"),
        ("wrn-28-10", {"preact": False}, (3, 32, 32), "'wrn-28-10'.*preact"),
        ("cnn", {}, (3, 7, 32), "7x32.*8x8"),
        ("resnet18", {}, (3, 32, 4), "32x4.*8x8"),
        ("cnn", {}, (1, 32, 32), "3 channel means.* 1 channels"),
    ],
)
def test_what_cannot_be_built_is_named(
    architecture: str, options: dict[str, object], shape: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(InputError, match=message), torch.device("meta"):
        build(architecture, input=shape, classes=5, mean=MEAN, std=STD, options=options)


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.5,), (0.2, 0.2)), ((0.5,), (0.0,)), ((0.5,), (-0.1,)), ((0.5,), (float("nan"),))],
)
def test_statistics_that_cannot_be_are_refused(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="std"):
        wrap(users_own(), ["0"], mean=mean, std=std)


# A user's own network


def users_own() -> nn.Sequential:
    torch.manual_seed(7)
    block = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2), nn.ReLU())
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


def test_a_users_own_network_is_wrapped() -> None:
    module, x = users_own(), images(2, 1, 9)
    model = wrap(module, ["1", "2.1", "4"])
    assert model.tap_names == ("1", "2.1", "4")
    assert torch.equal(model(x), module(x))
    normal = wrap(module, ["4"], mean=[0.5], std=[0.25])
    torch.testing.assert_close(normal(x), module((x - 0.5) / 0.25))

    logits, taps = model.outputs(x)
    assert isinstance(model.outputs(x), Outputs)
    assert [tuple(taps[name].shape) for name in model.tap_names] == [(2, 4, 7, 7), (2, 6, 3, 3), (2, 6)]
    assert torch.equal(taps["1"], F.relu(module[0](x)))
    assert torch.equal(module[5](taps["4"]), logits)
    # Guidance flows through a tap, and nothing is kept from one image to the next.
    grads = torch.autograd.grad(taps["4"].sum(), list(module[0].parameters()))
    assert all(grad.abs().sum() > 0 for grad in grads)
    assert tuple(model.outputs(images(5, 1, 9)).taps["1"].shape) == (5, 4, 7, 7)


@pytest.mark.parametrize(("name", "message"), [("2.11", r"'2\.11'.*'2\.1'"), ("head", "'head'.*known"), ("", "''")])
def test_a_tap_that_is_no_module_is_named(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        wrap(users_own(), ["1", name])


def test_a_tap_that_is_no_tensor_is_named() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def forward(self, x: Tensor) -> Tensor:
            return self.pair(x)[0].mean((2, 3))

    with pytest.raises(InputError, match="'pair' returns tuple"):
        wrap(Model(), ["pair"])(images(1, 1, 8))


@pytest.fixture
def group() -> Iterator[None]:
    """This process as a group of one, which takes the path of several."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("laid", [torch.contiguous_format, torch.channels_last])
def test_synchronised_statistics_are_those_of_double_precision(laid: torch.memory_format) -> None:
    """A large mean beside a small variance, where one pass over the squares would lose it."""
    torch.manual_seed(0)
    x = (0.1 * torch.randn(32, 4, 7, 5) + torch.tensor([0.0, 1.0, -30.0, 200.0])[:, None, None]).contiguous(
        memory_format=laid
    )
    grad = torch.randn_like(x)
    exact, ours = nn.BatchNorm2d(4).double(), BatchNorm2d(4)
    with torch.no_grad():
        for norm in (exact, ours):
            norm.weight.copy_(torch.tensor([0.5, 1.0, 2.0, -1.0]))
            norm.bias.copy_(torch.arange(4.0))
    found = []
    for norm, images_ in ((exact, x.double()), (ours, x.clone())):
        images_.requires_grad_()
        out = norm.train()(images_)
        out.backward(grad.to(out.dtype))
        assert norm.weight.grad is not None
        found.append([out, images_.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var])
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), wanted, atol=2e-3, rtol=1e-3)
    assert int(ours.num_batches_tracked or 0) == 1
    ours.synchronised = False
    torch.testing.assert_close(ours(x), nn.BatchNorm2d.forward(ours, x))


@pytest.mark.usefixtures("group")
def test_an_interval_is_normalised_as_its_nominal_images() -> None:
    torch.manual_seed(0)
    norm, x = BatchNorm2d(3).train(), torch.rand(8, 3, 4, 4)
    plain = copy.deepcopy(norm)(x)
    bounds = norm(box(x, x, 0.1))
    torch.testing.assert_close(bounds.nominal, plain, atol=1e-5, rtol=1e-5)
    lower, upper = bounds.ends
    assert bool((lower <= plain + 1e-5).all())
    assert bool((upper >= plain - 1e-5).all())
