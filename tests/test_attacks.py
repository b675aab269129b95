"""The attacks: against closed forms and the published algorithm, and what they must leave as it was."""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from fdml import data
from fdml.attacks import CLOSING, OBJECTIVES, Attack, apgd, apgd_targeted, fgsm, n_fgsm, pgd
from fdml.errors import InputError
from fdml.losses import margin
from fdml.models import build
from fdml.threat import NORMS, Threat

# Every code path at a few steps. n-fgsm, which leaves the ball by design, stands apart.
INSIDE: dict[str, Attack] = {
    "fgsm": fgsm,
    "fgsm-dlr": partial(fgsm, objective="dlr"),
    "r-fgsm": partial(fgsm, random_start=True),
    "pgd": partial(pgd, steps=3),
    "pgd-restarts": partial(pgd, steps=2, restarts=3, objective="margin"),
    "pgd-best": partial(pgd, steps=3, keep="best"),
    "pgd-kl": partial(pgd, steps=3, objective="kl"),
    "pgd-last": partial(pgd, steps=3, keep="last"),
    "pgd-clean-start": partial(pgd, steps=3, random_start=False),
    "apgd-ce": partial(apgd, steps=12),
    "apgd-dlr": partial(apgd, steps=12, objective="dlr"),
    "apgd-best": partial(apgd, steps=12, keep="best"),
    "apgd-t": partial(apgd_targeted, steps=8, targets=2),
}
EVERY: dict[str, Attack] = {**INSIDE, "n-fgsm": n_fgsm}
RADIUS: dict[str, float] = {"linf": 0.1, "l2": 0.5, "l1": 1.0}

every_attack = pytest.mark.parametrize("attack", EVERY.values(), ids=EVERY)
# (attack, norm) wherever the attack is defined for the norm.
everywhere = pytest.mark.parametrize(
    ("attack", "norm"),
    [pytest.param(attack, norm, id=f"{name}-{norm}") for name, attack in INSIDE.items() for norm in NORMS],
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rand(*shape: int, low: float = 0.0, high: float = 1.0, seed: int = 0) -> Tensor:
    return torch.empty(shape).uniform_(low, high, generator=seeded(seed))


def linear(classes: int = 2, shape: tuple[int, int, int] = (1, 8, 8), scale: float = 0.1) -> nn.Sequential:
    """logits = W x + b: what an attack may gain at most is known."""
    torch.manual_seed(1)
    layer = nn.Linear(math.prod(shape), classes)
    with torch.no_grad():
        layer.weight.normal_(0, scale)
    return nn.Sequential(nn.Flatten(), layer)


def weights(model: nn.Sequential) -> Tensor:
    layer = model[1]
    assert isinstance(layer, nn.Linear)
    return layer.weight.detach()


def smooth(classes: int = 4, shape: tuple[int, int, int] = (1, 3, 4)) -> nn.Module:
    """A small net in double precision without kinks, so that rounding decides no sign."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 10), nn.Tanh(), nn.Linear(10, classes))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.7)
    return net.double()


def labels(model: nn.Module, x: Tensor) -> Tensor:
    """The model's own answers: every attack begins at an image that is answered rightly."""
    with torch.no_grad():
        return model(x).argmax(1)


@torch.no_grad()
def margins(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return margin(model(x), y)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network that reads digits, and 100 test images that it answers rightly."""
    torch.manual_seed(0)
    digits = data.load("digits")
    model = build("cnn", input=digits.input, classes=10, mean=digits.mean, std=digits.std, options={"width": 8})
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = seeded()
    steps = [torch.randint(len(digits.train), (128,), generator=generator) for _ in range(60)]
    for batch in digits.train.batches(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch.x), batch.y).backward()
        optimizer.step()
    model.eval()
    _, x, y = digits.test.head(360).all()
    right = labels(model, x) == y
    assert right.double().mean() > 0.9
    return model, x[right][:100], y[right][:100]


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((labels(model, x) == y).double().mean())


# What is known in closed form


OPTIMAL: dict[str, Attack] = {
    "fgsm": fgsm,
    "fgsm-margin": partial(fgsm, objective="margin"),
    "pgd": partial(pgd, steps=20, step_size=0.3, keep="best"),
    "pgd-margin": partial(pgd, steps=20, step_size=0.3, objective="margin", keep="best"),
    "pgd-dlr": partial(pgd, steps=20, objective="dlr", random_start=False, keep="best"),
    "pgd-last": partial(pgd, steps=20, step_size=0.3, keep="last"),
    "apgd": partial(apgd, steps=30, keep="best"),
    "apgd-margin": partial(apgd, steps=30, objective="margin", keep="best"),
}


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2), ("l1", math.inf)])
@pytest.mark.parametrize("name", OPTIMAL)
def test_a_linear_model_is_attacked_optimally(name: str, norm: str, dual: float) -> None:
    model, eps = linear(), 0.3
    x = rand(20, 1, 8, 8, low=0.4, high=0.6)  # the ball lies inside the box
    y = torch.arange(20) % 2
    weight = weights(model)
    expected = margins(model, x, y) + eps * (weight[1] - weight[0]).norm(p=dual)
    x_adv = OPTIMAL[name](model, x, y, Threat(norm, eps), generator=seeded())
    torch.testing.assert_close(margins(model, x_adv, y), expected, atol=1e-3, rtol=0)


def test_n_fgsm_is_noise_and_one_step_of_eps_and_not_projected() -> None:
    model, x, y = linear(), rand(8, 1, 8, 8, low=0.4, high=0.6), torch.arange(8) % 2
    start = x + rand(*x.shape, low=-0.2, high=0.2)
    weight = weights(model)
    uphill = torch.stack([(weight[1 - label] - weight[label]).sign() for label in y]).view_as(x)
    x_adv = n_fgsm(model, x, y, Threat("linf", 0.1), start=start)
    torch.testing.assert_close(x_adv, start + 0.1 * uphill)
    drawn = n_fgsm(model, x, y, Threat("linf", 0.1), noise=2.0, generator=seeded())
    reach = float((drawn - x).abs().max())
    assert 0.2 < reach <= 0.3 + 1e-6


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("objective", ["ce", "margin", "dlr"])
def test_apgd_visits_the_points_of_the_published_algorithm(norm: str, objective: str) -> None:
    model, threat = smooth(), Threat(norm, {"linf": 0.15, "l2": 0.4}[norm])
    x, start = (rand(4, 1, 3, 4, seed=seed).double() for seed in (3, 4))
    y, start = labels(model, x), threat.project(start, x)
    seen: list[Tensor] = []

    def watched(images: Tensor) -> Tensor:
        seen.append(images.detach().clone())
        return model(images)

    found = apgd(watched, x, y, threat, steps=100, objective=objective, start=start, keep="best")
    assert len(seen) == 101
    for i in range(len(x)):
        points = algorithm_1(model, x[i : i + 1], y[i : i + 1], start[i : i + 1], norm, threat.eps, objective, 100)
        for step, (ours, theirs) in enumerate(zip(seen, points, strict=True)):
            torch.testing.assert_close(ours[i : i + 1], theirs, atol=1e-5, rtol=0, msg=f"image {i}, point {step}")
        best = max(points, key=lambda point: float(margins(model, point, y[i : i + 1])))
        torch.testing.assert_close(found[i : i + 1], best, atol=1e-5, rtol=0)


def algorithm_1(
    model: nn.Module, x: Tensor, y: Tensor, start: Tensor, norm: str, eps: float, objective: str, steps: int
) -> list[Tensor]:
    """Every point that Croce and Hein 2020, algorithm 1, evaluates for one image, in the paper's symbols.

    Where the paper leaves a choice it is the authors' code that decides: condition 1 holds at equality too, and an
    image set back to x_max is compared by the value of the point that it left.
    """

    @torch.no_grad()
    def f(point: Tensor) -> float:
        return float(OBJECTIVES[objective](model(point), y))

    def unit_gradient(point: Tensor) -> Tensor:
        point = point.detach().requires_grad_()
        (grad,) = torch.autograd.grad(OBJECTIVES[objective](model(point), y).sum(), point)
        return grad.sign() if norm == "linf" else grad / grad.norm()

    def projected(point: Tensor) -> Tensor:
        if norm == "linf":
            return torch.minimum(torch.maximum(point, x - eps), x + eps).clamp(0, 1)
        delta = point - x
        return (x + delta * min(1.0, eps / max(float(delta.norm()), 1e-12))).clamp(0, 1)

    p = [Fraction(0), Fraction(22, 100)]
    while p[-1] < 1:
        p.append(p[-1] + max(p[-1] - p[-2] - Fraction(3, 100), Fraction(6, 100)))
    w = [math.ceil(share * steps) for share in p]

    eta, rho, points, values = 2 * eps, Fraction(3, 4), [start], [f(start)]
    x_k, x_before, x_max, f_max = start, start, start, values[0]
    # At the first checkpoint the step counts as just halved: condition 2 is about a second failure in a row.
    eta_at_check, f_max_at_check, j = math.nan, f_max, 1
    for k in range(1, steps + 1):
        alpha = 0.75 if k > 1 else 1.0
        z = projected(x_k + eta * unit_gradient(x_k))
        x_k, x_before = projected(x_k + alpha * (z - x_k) + (1 - alpha) * (x_k - x_before)), x_k
        points.append(x_k)
        values.append(f(x_k))
        if values[-1] > f_max:
            x_max, f_max = x_k, values[-1]
        if k == w[j]:
            rises = sum(values[i + 1] > values[i] for i in range(w[j - 1], w[j]))
            condition_1 = rises <= rho * (w[j] - w[j - 1])
            condition_2 = eta == eta_at_check and f_max == f_max_at_check
            eta_at_check, f_max_at_check, j = eta, f_max, j + 1
            if condition_1 or condition_2:
                eta, x_k = eta / 2, x_max
    return points


# What every attack keeps


@everywhere
def test_the_result_is_in_the_threat_model_and_like_the_input(attack: Attack, norm: str) -> None:
    model, threat = linear(classes=3, shape=(3, 6, 6), scale=1.0), Threat(norm, RADIUS[norm])
    for x in (
        rand(7, 3, 6, 6),
        rand(7, 3, 6, 6).round(),
        rand(7, 3, 6, 6).contiguous(memory_format=torch.channels_last),
    ):
        before, y = x.clone(), labels(model, x)
        x_adv = attack(model, x, y, threat, generator=seeded())
        assert threat.contains(x_adv, x).all()
        assert torch.equal(x, before)
        assert not torch.equal(x_adv, x)
        assert x_adv.dtype == x.dtype
        assert x_adv.stride() == x.stride()
        assert not x_adv.requires_grad
        assert x_adv.data_ptr() != x.data_ptr()


@every_attack
def test_double_precision_is_kept(attack: Attack) -> None:
    model, x = smooth(), rand(4, 1, 3, 4).double()
    assert attack(model, x, labels(model, x), Threat("linf", 0.1), generator=seeded()).dtype == torch.float64


@pytest.mark.parametrize("name", CLOSING)
def test_the_named_attacks_are_inside_and_weaken_the_model(name: str) -> None:
    model, threat = linear(classes=3, scale=0.3), Threat("linf", 0.1)
    x = rand(10, 1, 8, 8)
    y = labels(model, x)
    x_adv = CLOSING[name](model, x, y, threat, generator=seeded())
    assert threat.contains(x_adv, x).all()
    assert (margins(model, x_adv, y) > margins(model, x, y)).all()


class Breaks(nn.Module):
    """Answers as ``inner`` does, until the given call."""

    def __init__(self, inner: nn.Module, at: int) -> None:
        super().__init__()
        self.inner, self.left = inner, at

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if not self.left:
            raise ArithmeticError("out of order")
        return self.inner(x)


@every_attack
@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_the_model_is_left_as_it_was(attack: Attack, fails_at: int) -> None:
    norm, dropout, linear = nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Linear(16, 3)
    inner = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Sequential(dropout, nn.ReLU()), nn.Flatten(), linear)
    model = Breaks(inner, fails_at)
    model.train()
    dropout.eval()
    linear.bias.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert len(set(modes)) == len(set(flags)) == 2

    x, y, state = rand(4, 1, 4, 4), torch.arange(4) % 3, torch.get_rng_state()
    run = partial(attack, model, x, y, Threat("linf", 0.1), generator=seeded())
    # The one-step attacks never get to a second call.
    if fails_at == 1 or (fails_at == 2 and attack not in (fgsm, n_fgsm, EVERY["fgsm-dlr"], EVERY["r-fgsm"])):
        with pytest.raises(ArithmeticError):
            run()
    else:
        run()
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(bool((parameter.grad == 0.5).all()) for parameter in model.parameters() if parameter.grad is not None)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not x.requires_grad
    assert torch.equal(torch.get_rng_state(), state)


@every_attack
def test_a_model_in_training_mode_is_attacked_as_it_infers(attack: Attack) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 3))
    x, y = rand(4, 1, 4, 4), torch.arange(4) % 3
    found = [attack(model.train(mode), x, y, Threat("linf", 0.1), generator=seeded()) for mode in (True, False)]
    assert torch.equal(*found)


@every_attack
def test_the_generator_decides(attack: Attack) -> None:
    model, x = linear(classes=3, scale=0.3), rand(4, 1, 8, 8)
    y = labels(model, x)
    first, again, other = (attack(model, x, y, Threat("linf", 0.05), generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    # On a linear model only the start can differ.
    if attack in (EVERY["r-fgsm"], n_fgsm):
        assert not torch.equal(first, other)


@every_attack
def test_a_caller_without_gradients_changes_nothing(attack: Attack) -> None:
    model, x = linear(classes=3), rand(4, 1, 8, 8)
    y = labels(model, x)
    run = partial(attack, model, x, y, Threat("linf", 0.05))
    expected = run(generator=seeded())
    with torch.no_grad():
        assert torch.equal(run(generator=seeded()), expected)
        assert not torch.is_grad_enabled()
    # Any callable is a model.
    assert torch.equal(attack(lambda x: model(x), x, y, Threat("linf", 0.05), generator=seeded()), expected)


@everywhere
def test_a_batch_of_none(attack: Attack, norm: str) -> None:
    x, y = torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64)
    assert attack(linear(classes=3), x, y, Threat(norm, 0.1), generator=seeded()).shape == x.shape


@everywhere
def test_a_radius_of_zero_changes_nothing(attack: Attack, norm: str) -> None:
    model, x = linear(classes=3), rand(4, 1, 8, 8)
    assert torch.equal(attack(model, x, labels(model, x), Threat(norm, 0.0), generator=seeded()), x)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("attack", [fgsm, partial(pgd, steps=10), partial(apgd, steps=10)])
def test_few_classes(attack: Callable, objective: str, classes: int) -> None:
    model, x = smooth(classes), rand(10, 1, 3, 4).double()
    y = labels(model, x)
    x_adv = attack(model, x, y, Threat("linf", 0.1), objective=objective, generator=seeded())
    assert (margins(model, x_adv, y) > margins(model, x, y)).all()


@pytest.mark.parametrize(
    "attack",
    [
        partial(pgd, steps=10),
        partial(pgd, steps=10, keep="last"),
        partial(apgd, steps=30),
        partial(apgd, steps=30, objective="dlr"),
        n_fgsm,
    ],
)
def test_an_image_is_attacked_as_if_it_were_alone(attack: Callable) -> None:
    model, threat, x = smooth(), Threat("linf", 0.1), rand(6, 1, 3, 4).double()
    y, start = labels(model, x), threat.random(x, seeded())
    together = attack(model, x, y, threat, start=start)
    alone = [attack(model, x[[i]], y[[i]], threat, start=start[[i]]) for i in range(6)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-9, rtol=0)


# The ladder: what must be stronger than what

Trained = tuple[nn.Module, Tensor, Tensor]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_keeping_the_best_point_is_never_weaker_than_the_last(trained: Trained, norm: str, objective: str) -> None:
    model, x, y = trained
    threat = Threat(norm, RADIUS[norm])
    run = partial(pgd, model, x, y, threat, steps=5, objective=objective, start=threat.random(x, seeded()))
    best, last, start = run(keep="best"), run(keep="last"), threat.random(x, seeded())
    assert (margins(model, best, y) >= margins(model, last, y) - 1e-5).all()
    assert (margins(model, best, y) >= margins(model, start, y) - 1e-5).all()


def test_restarts_lose_no_image_that_was_fooled(trained: Trained) -> None:
    model, x, y = trained
    fooled = []
    for restarts in (1, 2, 6):
        x_adv = pgd(model, x, y, Threat("linf", 0.1), steps=2, restarts=restarts, generator=seeded())
        fooled.append(labels(model, x_adv) != y)
    assert (fooled[1] >= fooled[0]).all()
    assert (fooled[2] >= fooled[1]).all()
    assert fooled[2].sum() > fooled[0].sum()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", [pgd, apgd])
def test_more_steps_are_no_weaker(trained: Trained, attack: Callable, norm: str) -> None:
    model, x, y = trained
    reached = []
    for steps in (1, 5, 20):
        x_adv = attack(model, x, y, Threat(norm, RADIUS[norm]), steps=steps, keep="best", generator=seeded())
        reached.append(float(margins(model, x_adv, y).mean()))
    assert reached[0] < reached[1] < reached[2]


def test_iterating_beats_one_step_and_one_step_beats_noise(trained: Trained) -> None:
    model, x, y = trained
    threat = Threat("linf", 0.1)
    noise = threat.random(x, seeded())
    one = fgsm(model, x, y, threat)
    for attack in (pgd, apgd):
        many = attack(model, x, y, threat, steps=20, keep="best")
        assert accuracy(model, many, y) <= accuracy(model, one, y) < accuracy(model, noise, y)
        assert margins(model, many, y).mean() > margins(model, one, y).mean() > margins(model, noise, y).mean()


@pytest.mark.parametrize(
    "attack", [partial(pgd, steps=10), partial(apgd, steps=10), partial(apgd, steps=10, objective="dlr")]
)
def test_accuracy_falls_with_eps_to_zero(trained: Trained, attack: Attack) -> None:
    model, x, y = trained
    swept = [
        accuracy(model, attack(model, x, y, Threat("linf", eps), generator=seeded()), y)
        for eps in (0.0, 0.05, 0.1, 0.2, 0.4, 1.0)
    ]
    assert swept[0] == 1
    assert swept[-1] == 0
    assert all(after <= before + 0.01 for before, after in pairwise(swept))
    assert swept[1] > 0


# What a user may get wrong


@pytest.mark.parametrize(
    ("attack", "norm", "message"),
    [
        (partial(pgd, steps=0), "linf", "steps=0"),
        (partial(pgd, steps=-3), "linf", "steps=-3"),
        (partial(pgd, restarts=0), "linf", "restarts=0"),
        (partial(pgd, keep="bset"), "linf", "'bset'.*'best'"),
        (partial(pgd, objective="drl"), "linf", "'drl'.*'dlr'"),
        (partial(fgsm, objective="margins"), "l2", "'margins'.*'margin'"),
        (partial(apgd, objective="cross"), "linf", "'cross'"),
        (partial(apgd, steps=0), "l2", "0"),
        (n_fgsm, "l2", "l2"),
    ],
)
def test_wrong_arguments_are_named(attack: Attack, norm: str, message: str) -> None:
    model = linear()
    with pytest.raises(InputError, match=message):
        attack(model, rand(2, 1, 8, 8), torch.tensor([0, 1]), Threat(norm, 0.1))
