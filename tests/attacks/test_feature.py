"""The attacks in feature space: what they drive at, how strong they are, and what they must leave as it was."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdml.attacks.feature import feature, feature_attacks, metric
from fdml.attacks.gradient import pgd
from fdml.errors import InputError
from fdml.losses import margin
from fdml.randomness import Streams
from fdml.threat import NORMS, Threat

SHAPE = (2, 5, 6)
THREATS = [Threat("linf", 0.1), Threat("l2", 0.6), Threat("l1", 3.0)]


class Seen(NamedTuple):
    logits: Tensor
    taps: dict[str, Tensor]


class Net(nn.Module):
    """Smooth, with a BatchNorm, a spatial tap and a pooled one, in training mode."""

    def __init__(self, channels: int = 2, width: int = 6, classes: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.deep = nn.Conv2d(width, width, 3, stride=2)
        self.head = nn.Linear(width, classes)

    def outputs(self, x: Tensor) -> Seen:
        early = torch.tanh(self.norm(self.conv(x)))
        features = torch.tanh(self.deep(early)).mean((2, 3))
        return Seen(self.head(features), {"early": early, "features": features})

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(x).logits


class Made:
    """A model of given logits and taps, which counts the images that it is asked of."""

    def __init__(self, logits: Callable[[Tensor], Tensor], **taps: Callable[[Tensor], Tensor]) -> None:
        self.logits, self.taps, self.asked = logits, taps, []

    def outputs(self, x: Tensor) -> Seen:
        self.asked.append(x.detach().clone())
        return Seen(self.logits(x), {name: tap(x) for name, tap in self.taps.items()})

    def __call__(self, x: Tensor) -> Tensor:
        return self.outputs(x).logits


def images(n: int = 6) -> Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64)


def net(classes: int = 4) -> Net:
    return Net(classes=classes).double()


def streams(index: Tensor) -> Streams:
    return Streams.of(index, 0)


def setting(classes: int = 4) -> tuple[Net, Tensor, Tensor, dict[str, Any]]:
    """A net, images with the labels that it gives them, and guides of every class."""
    model = net(classes)
    x, guides = images(), images(20)
    model.eval()
    y = model(x).argmax(1)
    model.train()
    return model, x, y, {"guides": guides, "guide_y": torch.arange(20) % classes}


NAMES = ["feature-all", "feature-early", "feature-features"] + [
    f"{kind}{mix}" for kind in ("feature", "metric") for mix in ("+ce", "+dlr")
]
every = pytest.mark.parametrize("name", [*NAMES, "metric"])


def test_the_names() -> None:
    attacks = feature_attacks(["early", "features"], images(2), torch.tensor([0, 1]), steps=7)
    assert set(attacks) == {*NAMES, "metric"}
    assert {attack.keywords["steps"] for attack in attacks.values()} == {7}


@every
@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_it_stays_inside_and_leaves_the_model_alone(name: str, threat: Threat) -> None:
    model, x, y, known = setting()
    model.norm.eval()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    attack = feature_attacks(["early", "features"], **known, steps=4)[name]
    x_adv = attack(model, x, y, threat, generator=streams(torch.arange(6)))
    assert threat.contains(x_adv, x).all()
    assert not x_adv.requires_grad
    assert [module.training for module in model.children()] == [True, False, True, True]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    model.eval()
    assert (margin(model(x_adv), y) >= margin(model(x), y)).all()
    assert (margin(model(x_adv), y) > margin(model(x), y)).any()


@every
def test_the_batch_changes_no_outcome(name: str) -> None:
    model, x, y, known = setting()
    threat = Threat("linf", 0.05)
    attack = feature_attacks(["early", "features"], **known, steps=5)[name]
    together = attack(model, x, y, threat, generator=streams(torch.arange(6)))
    for index in (torch.tensor([3]), torch.tensor([4, 0, 2])):
        alone = attack(model, x[index], y[index], threat, generator=streams(index))
        torch.testing.assert_close(alone, together[index], atol=1e-9, rtol=0)


def test_more_images_than_a_part_holds() -> None:
    model, _, _, known = setting()
    x = images(150)
    y = model.eval()(x).argmax(1)
    for attack in (partial(feature, targets=2), metric):
        run = partial(attack, model, threat=Threat("linf", 0.05), **known, steps=3)
        together = run(x=x, y=y, generator=streams(torch.arange(150)))
        alone = run(x=x[140:], y=y[140:], generator=streams(torch.arange(140, 150)))
        torch.testing.assert_close(together[140:], alone, atol=1e-9, rtol=0)


def flat(x: Tensor) -> Tensor:
    return x.flatten(1)


def never_fooled(direction: Tensor) -> Callable[[Tensor], Tensor]:
    """Class 1 grows along ``direction``, and class 0 is always far above it."""

    def logits(x: Tensor) -> Tensor:
        towards = F.cosine_similarity(flat(x), direction.flatten()[None], dim=1)
        return torch.stack([torch.full_like(towards, 9.0), towards], 1)

    return logits


def test_it_reaches_the_features_of_the_guide() -> None:
    """The tap is the image itself and the guide is within reach: the features become the guide's."""
    x = 0.3 + 0.4 * images(4)
    guide = (x[:1] + 0.1 * torch.randn(1, *SHAPE, dtype=torch.float64)).clamp(0.1, 0.9)
    model = Made(never_fooled(guide), pixels=flat)
    found = feature(
        model, x[:1], torch.tensor([0]), Threat("linf", 0.45), guides=guide, guide_y=torch.tensor([1]), steps=100
    )
    before, after = (float(F.cosine_similarity(flat(near), flat(guide))) for near in (x[:1], found))
    assert before < 0.99
    assert after > 0.9999


def test_metric_leaves_the_clean_features_for_those_of_the_guide() -> None:
    x, guides = images(3), images(8)
    guide_y = torch.tensor([0, 1, 2] * 2 + [1, 2])
    # Class 2 is always the confused one; the margin is the metric term itself, so the best point shows it.
    wanted = F.normalize(flat(guides[guide_y == 2]), dim=1)
    origin = F.normalize(flat(x), dim=1)

    def term(z: Tensor) -> Tensor:
        unit = F.normalize(flat(z), dim=1)
        return (unit @ wanted.T).amax(1) - (unit * origin).sum(1)

    def logits(z: Tensor) -> Tensor:
        value = term(z) if len(z) == 3 else torch.zeros(len(z), dtype=z.dtype)
        return torch.stack([torch.full_like(value, 9.0), torch.full_like(value, -9.0), value], 1)

    threat, y = Threat("linf", 0.2), torch.tensor([0, 0, 0])
    found = metric(Made(logits, pixels=flat), x, y, threat, guides=guides, guide_y=guide_y, steps=60)
    best = term(found)
    for seed in range(20):
        assert (best > term(threat.random(x, torch.Generator().manual_seed(seed)))).all()
    # What plain ascent of the term finds.
    point = x.clone()
    for _ in range(300):
        point.requires_grad_()
        (grad,) = torch.autograd.grad(term(point).sum(), point)
        point = threat.project(threat.ascend(point.detach(), grad, 0.004), x)
    assert (best > term(point) - 2e-3).all()


@pytest.mark.parametrize("attack", [feature, metric])
def test_a_mixed_objective_reaches_the_closed_form(attack: Callable) -> None:
    """The margin of a linear model, away from the border of [0, 1]: its optimum in linf is one corner of the cube."""
    slope = torch.randn(math.prod(SHAPE), dtype=torch.float64)
    model = Made(lambda z: torch.stack([50 + 0 * flat(z) @ slope, flat(z) @ slope], 1), pixels=flat)
    x, known = 0.4 + 0.2 * images(), {"guides": images(4), "guide_y": torch.tensor([0, 1, 0, 1])}
    found = attack(
        model, x, torch.zeros(6, dtype=torch.long), Threat("linf", 0.2), **known, mix="margin", weight=0.0, steps=10
    )
    torch.testing.assert_close(found, x + 0.2 * slope.sign().view(SHAPE))


def trained() -> tuple[Net, Tensor, Tensor, dict[str, Any]]:
    """A small net that tells apart four noisy patterns, 60 images that it has not seen, and guides."""
    patterns = 0.35 + 0.3 * torch.rand(4, 1, 8, 8).round()
    y = torch.arange(460) % 4
    x = (patterns[y] + 0.15 * torch.randn(460, 1, 8, 8)).clamp(0, 1)
    model = Net(channels=1, width=12)
    optimiser = torch.optim.Adam(model.parameters(), 0.03)
    for _ in range(25):
        loss = F.cross_entropy(model(x[60:]), y[60:])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return model.eval(), x[:60], y[:60], {"guides": x[60:160], "guide_y": y[60:160]}


@pytest.mark.parametrize("mix", ["ce", "dlr"])
def test_mixed_it_is_as_strong_as_pgd_on_the_same_objective(mix: str) -> None:
    """Like with like: on this net PGD on DLR is weaker than PGD on CE, and what is mixed with DLR inherits that."""
    model, x, y, known = trained()

    def standing(attack: Callable, **options: Any) -> int:
        x_adv = attack(model, x, y, Threat("linf", 0.065), steps=20, generator=streams(torch.arange(60)), **options)
        return int((model(x_adv).argmax(1) == y).sum())

    clean, baseline = int((model(x).argmax(1) == y).sum()), standing(pgd, objective=mix)
    assert 5 < baseline < clean - 10
    assert standing(feature, mix=mix, targets=1, **known) <= baseline
    assert standing(metric, mix=mix, **known) <= baseline


@pytest.mark.parametrize("attack", [feature, metric])
def test_features_alone_fool(attack: Callable) -> None:
    model, x, y, known = trained()
    right = model(x).argmax(1) == y
    x_adv = attack(model, x, y, Threat("linf", 0.07), steps=20, generator=streams(torch.arange(60)), **known)
    assert int((model(x_adv).argmax(1) == y).sum()) < int(right.sum()) // 2


def test_guides_are_the_nearest_of_the_nearest_classes_and_doubtful_ones_come_last() -> None:
    """In a plane of directions: the image at 0 degrees, the guides at these angles and of these classes."""
    angles, labels = [20.0, 40.0, 30.0, 5.0, 60.0, 10.0], [1, 1, 2, 0, 3, 3]
    guides = torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in angles])[:, None, None]

    def logits(z: Tensor) -> Tensor:
        """Every guide is answered as labelled but the last, which is taken for class 0."""
        answers = torch.zeros(len(z), 4)
        if len(z) == len(guides):
            answers[torch.arange(6), torch.tensor([1, 1, 2, 0, 3, 0])] = 1.0
        else:
            answers[:, 0] = 5.0
        return answers + 0 * z.sum()

    def run(targets: int) -> list[Tensor]:
        model = Made(logits, pixels=flat)
        image = torch.tensor([[[[1.0, 0.0]]]])
        known: dict[str, Any] = {"guides": guides, "guide_y": torch.tensor(labels)}
        feature(model, image, torch.tensor([0]), Threat("linf", 0.1), **known, targets=targets, steps=1)
        # The image, the guides, and for each target: its guide, one step, the last answer.
        assert len(model.asked) == 2 + 3 * targets
        return [guide.flatten() for guide in model.asked[2::3]]

    chosen = [next(place for place, guide in enumerate(guides) if torch.equal(guide.flatten(), g)) for g in run(3)]
    assert chosen == [0, 2, 4]


def test_what_is_fooled_is_asked_no_more() -> None:
    layer = nn.Linear(math.prod(SHAPE), 2).double()
    x, guides = images(), images(4)
    model = Made(lambda z: layer(flat(z)), pixels=flat)
    answers = layer(flat(x)).argmax(1)
    y = answers.clone()
    y[[1, 4]] = 1 - y[[1, 4]]
    known: dict[str, Any] = {"guides": guides, "guide_y": torch.tensor([0, 1, 0, 1])}
    for attack in (feature, metric):
        model.asked.clear()
        found = attack(model, x, y, Threat("linf", 1.0), **known, mix="ce", weight=0.0, steps=30)
        assert (layer(flat(found)).argmax(1) != y).all()
        assert torch.equal(found[[1, 4]], x[[1, 4]]), "what is answered wrongly already stays"
        assert sum(map(len, model.asked)) < 6 + 4 + 4 * 6


@pytest.mark.parametrize("classes", [2, 3])
@every
def test_few_classes(name: str, classes: int) -> None:
    model, x, y, known = setting(classes)
    attack = feature_attacks(["early", "features"], **known, steps=10)[name]
    x_adv = attack(model, x, y, Threat("linf", 0.3), generator=streams(torch.arange(6)))
    model.eval()
    assert (margin(model(x_adv), y) > margin(model(x), y)).any()


def test_more_targets_than_classes_are_restarts() -> None:
    """Guides of classes 1 and 2: an image of class 1 has one other class, and comes back to it."""
    guides, x = images(4), images(1)
    model = Made(lambda z: torch.tensor([0.0, 9.0, 0.0]) + 0 * flat(z).sum(1, keepdim=True), pixels=flat)
    known: dict[str, Any] = {"guides": guides, "guide_y": torch.tensor([1, 2, 1, 2])}
    feature(model, x, torch.tensor([1]), Threat("linf", 0.02), **known, targets=5, steps=1)
    # The image, the guides, and for each target: its guide, one step, the last answer.
    chosen = model.asked[2::3]
    assert len(chosen) == 2, "as many targets as classes"
    assert torch.equal(chosen[0], chosen[1])
    assert any(torch.equal(chosen[0][0], guide) for guide in guides[1::2])


def test_metric_trusts_no_guide_that_is_answered_wrongly() -> None:
    """Two guides of the confused class, along the axes: the nearer one is answered as another class."""
    guides = torch.eye(3)[:2, None, None]
    x, y = torch.tensor([[[[0.6, 0.2, 0.5]]]]), torch.tensor([0])

    def logits(z: Tensor) -> Tensor:
        if len(z) == 2:
            return torch.tensor([[9.0, 0.0], [0.0, 9.0]])
        # Fooled never, and the more of the second axis the better: what the guide that is trusted asks for.
        return torch.stack([torch.full_like(z[:, 0, 0, 0], 9.0), z[:, 0, 0, 1] - z[:, 0, 0, 0]], 1)

    model = Made(logits, pixels=flat)
    found = metric(model, x, y, Threat("linf", 0.15), guides=guides, guide_y=torch.tensor([1, 1]))
    torch.testing.assert_close(found[0, 0, 0, :2], torch.tensor([0.45, 0.35]))


def test_dead_features_give_no_nan() -> None:
    model = Made(lambda z: torch.stack([flat(z).sum(1), 1e3 + 0 * flat(z).sum(1)], 1), dead=lambda z: 0 * flat(z))
    x, y = images(), torch.ones(6, dtype=torch.long)
    for attack in (feature, metric):
        x_adv = attack(model, x, y, Threat("l2", 0.5), guides=images(2), guide_y=torch.tensor([0, 1]), steps=3)
        assert x_adv.isfinite().all()


@pytest.mark.parametrize("norm", NORMS)
def test_nothing_to_gain_returns_the_image(norm: str) -> None:
    model, x, y, known = setting()
    for attack in (feature, metric):
        assert torch.equal(attack(model, x, y, Threat(norm, 0.0), **known, steps=2), x)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (partial(feature, steps=0), "steps must be at least 1, got 0"),
        (partial(feature, targets=0), "targets must be at least 1, got 0"),
        (partial(metric, restarts=0), "restarts must be at least 1, got 0"),
        (partial(metric, step_size=-1.0), "step_size .* got -1"),
        (partial(feature, mix="dlrr"), "did you mean 'dlr'"),
        (partial(feature, layer="erly"), "unknown layer 'erly': did you mean 'early'"),
        (partial(metric, layer="erly"), "unknown layer 'erly': did you mean 'early'"),
    ],
)
def test_a_users_mistake_is_named(attack: partial, message: str) -> None:
    model, x, y, known = setting()
    with pytest.raises(InputError, match=message):
        attack(model, x, y, Threat("linf", 0.1), **known)


@pytest.mark.parametrize("attack", [feature, metric])
def test_guides_of_no_other_class_are_named(attack: Callable) -> None:
    model, x, _, known = setting()
    y = torch.tensor([1, 2, 1, 2, 1, 2])
    with pytest.raises(InputError, match="guides hold no class other than 2"):
        attack(model, x, y, Threat("linf", 0.1), guides=known["guides"][:3], guide_y=torch.tensor([2, 2, 2]))
