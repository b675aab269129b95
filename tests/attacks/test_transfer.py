"""MI-FGSM and DI-TI: against the published iterations written out, and what they must leave as it was."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdml.attacks.transfer import _shrink, _smooth, di_ti, mi_fgsm
from fdml.errors import InputError
from fdml.losses import cross_entropy
from fdml.randomness import Streams, uniform
from fdml.threat import Threat

EVERY = {
    "mi-fgsm": mi_fgsm,
    "di-ti": partial(di_ti, kernel=3),
    "di-ti-always": partial(di_ti, probability=1.0, smallest=0.5, kernel=5, decay=0.5),
}
every = pytest.mark.parametrize("attack", EVERY.values(), ids=EVERY)
each_norm = pytest.mark.parametrize("threat", [Threat("linf", 0.1), Threat("l2", 0.7)], ids=str)


def net(classes: int = 4) -> nn.Sequential:
    """A small smooth net in double precision, with a BatchNorm, in training mode."""
    layers = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(), nn.LazyLinear(classes))
    layers = layers.double()
    layers(torch.rand(4, 2, 8, 9, dtype=torch.float64))
    return layers


def images(n: int = 5) -> Tensor:
    return torch.rand(n, 2, 8, 9, dtype=torch.float64)


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(cross_entropy(model(x), y).sum(), x)[0]


@each_norm
def test_without_decay_it_is_iterated_fgsm(threat: Threat) -> None:
    model, x, y = net().eval(), images(), torch.tensor([0, 1, 2, 3, 0])
    expected = x
    for _ in range(4):
        expected = threat.project(threat.ascend(expected, gradient(model, expected, y), threat.eps / 4), x)
    torch.testing.assert_close(mi_fgsm(model, x, y, threat, steps=4, decay=0), expected)


@each_norm
def test_momentum_as_published(threat: Threat) -> None:
    model, x, y = net().eval(), images(), torch.tensor([0, 1, 2, 3, 0])
    expected, momentum = x, torch.zeros_like(x)
    for _ in range(4):
        grad = gradient(model, expected, y)
        momentum = 0.9 * momentum + grad / grad.abs().sum((1, 2, 3), keepdim=True)
        expected = threat.project(threat.ascend(expected, momentum, 0.05), x)
    torch.testing.assert_close(mi_fgsm(model, x, y, threat, steps=4, decay=0.9, step_size=0.05), expected)


@each_norm
def test_without_its_parts_di_ti_is_mi_fgsm(threat: Threat) -> None:
    model, x, y = net(), images(), torch.tensor([0, 1, 2, 3, 0])
    found = di_ti(model, x, y, threat, probability=0, kernel=1, steps=5)
    assert torch.equal(found, mi_fgsm(model, x, y, threat, steps=5))
    small = di_ti(model, x, y, threat, probability=0, steps=5)
    assert torch.equal(small, found), "images below 16 pixels are not smoothed by default"
    assert not torch.equal(di_ti(model, x, y, threat, kernel=1, probability=1, smallest=0.5, steps=5), found)


def test_one_step_is_along_the_gradient_through_the_transformation() -> None:
    model, x, y, threat = net().eval(), images(), torch.tensor([0, 1, 2, 3, 0]), Threat("l2", 0.5)
    draw = uniform(x, torch.Generator().manual_seed(3), 4)
    source = x.clone().requires_grad_()
    loss = cross_entropy(model(_shrink(source, draw[:, 1:], 0.6)), y).sum()
    grad = _smooth(torch.autograd.grad(loss, source)[0], 3)
    found = di_ti(
        model, x, y, threat, steps=1, probability=1, smallest=0.6, kernel=3, generator=torch.Generator().manual_seed(3)
    )
    torch.testing.assert_close(found, threat.project(threat.ascend(x, grad, threat.eps), x))


def test_shrinking_is_resizing_and_padding() -> None:
    x = torch.rand(40, 3, 8, 12, dtype=torch.float64)
    draw = torch.rand(40, 3, dtype=torch.float64)
    sizes = set()
    for image, (size, across, down), found in zip(x, draw.tolist(), _shrink(x, draw, 0.5), strict=True):
        height, width = round(8 * (0.5 + 0.5 * size)), round(12 * (0.5 + 0.5 * size))
        left, top = int(across * (12 - width + 1)), int(down * (8 - height + 1))
        small = F.interpolate(image[None], (height, width), mode="bilinear")[0]
        torch.testing.assert_close(found, F.pad(small, (left, 12 - width - left, top, 8 - height - top)))
        sizes.add((height, width))
    assert len(sizes) > 3


def test_smoothing_spreads_a_point_evenly() -> None:
    point = torch.zeros(1, 2, 9, 9, dtype=torch.float64)
    point[0, 1, 4, 4] = 1
    spread = _smooth(point, 5)
    assert not spread[0, 0].any()
    assert spread[0, 1].sum() == pytest.approx(1)
    assert (spread[0, 1] > 0).sum() == 25
    torch.testing.assert_close(spread, spread.flip(2))
    torch.testing.assert_close(spread, spread.transpose(2, 3))
    assert spread[0, 1, 4, 4] > spread[0, 1, 4, 5] > spread[0, 1, 4, 6]


def test_a_large_image_is_smoothed_by_default() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 2)).double()
    x, y, threat = torch.rand(2, 1, 16, 16, dtype=torch.float64), torch.tensor([0, 1]), Threat("l2", 0.1)
    five = di_ti(model, x, y, threat, probability=0, kernel=5)
    assert torch.equal(di_ti(model, x, y, threat, probability=0), five)
    assert not torch.equal(mi_fgsm(model, x, y, threat), five)


def test_a_fooled_surrogate_does_not_stop_it() -> None:
    """On a linear model every step is along one direction, so the corner of the cube is reached, fooled or not."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 2)).double()
    layer = model[1]
    assert isinstance(layer, nn.Linear)
    x = 0.25 + 0.5 * images(8)
    direction = (layer.weight[1] - layer.weight[0]).detach().sign().view(2, 8, 9)
    for label, towards in ((0, direction), (1, -direction)):
        y = torch.full((8,), label)
        torch.testing.assert_close(mi_fgsm(model, x, y, Threat("linf", 0.2)), x + 0.2 * towards)


@every
@each_norm
def test_it_stays_inside_and_leaves_the_model_alone(attack: partial, threat: Threat) -> None:
    model, x, y = net(), images(), torch.tensor([0, 1, 2, 3, 0])
    model[1].eval()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    x_adv = attack(model, x, y, threat, generator=Streams.of(torch.arange(5), 0))
    assert threat.contains(x_adv, x).all()
    assert not x_adv.requires_grad
    assert [module.training for module in model] == [True, False, True, True, True]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


@every
def test_the_batch_changes_no_outcome(attack: partial) -> None:
    model, x, y, threat = net(), images(), torch.tensor([0, 1, 2, 3, 0]), Threat("linf", 0.1)
    together = attack(model, x, y, threat, generator=Streams.of(torch.arange(5), 0))
    for index in (torch.tensor([3]), torch.tensor([4, 0, 2])):
        alone = attack(model, x[index], y[index], threat, generator=Streams.of(index, 0))
        torch.testing.assert_close(alone, together[index], atol=1e-9, rtol=0)


@pytest.mark.parametrize("classes", [2, 3])
@every
def test_few_classes(attack: partial, classes: int) -> None:
    model, x, y = net(classes), images(), torch.tensor([0, 1, 0, 1, 0])
    x_adv = attack(model, x, y, Threat("linf", 0.1), steps=20)
    model.eval()
    assert (cross_entropy(model(x_adv), y) > cross_entropy(model(x), y)).all()


@pytest.mark.parametrize(
    ("attack", "threat", "message"),
    [
        (mi_fgsm, Threat("l1", 1.0), "got l1"),
        (partial(mi_fgsm, steps=0), Threat("linf", 0.1), "steps=0|got 0"),
        (partial(mi_fgsm, decay=-1.0), Threat("linf", 0.1), "decay .* got -1"),
        (partial(mi_fgsm, step_size=float("nan")), Threat("linf", 0.1), "step_size .* got nan"),
        (partial(mi_fgsm, objective="cee"), Threat("linf", 0.1), "did you mean 'ce'"),
        (partial(di_ti, kernel=4), Threat("linf", 0.1), "odd .* got 4"),
        (partial(di_ti, probability=1.5), Threat("linf", 0.1), "probability .* got 1.5"),
        (partial(di_ti, smallest=0.0), Threat("linf", 0.1), "smallest .* got 0.0"),
    ],
)
def test_a_users_mistake_is_named(attack: partial, threat: Threat, message: str) -> None:
    with pytest.raises(InputError, match=message):
        attack(net(), images(), torch.tensor([0, 1, 2, 3, 0]), threat)
