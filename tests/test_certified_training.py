"""Training for certificates: what a student sees through noise, the attack through it, interval bounds as a loss."""

import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

import fdml
from fdml import losses
from fdml.adversary import attack_start, draw_noise, inner_attack, see_through
from fdml.data import load
from fdml.data.dataset import DataSet
from fdml.errors import Stopped
from fdml.guidance import Advice, Guided, Teacher
from fdml.interval import certified
from fdml.learner import Learner
from fdml.models import build
from fdml.objective import box_eps, objective
from fdml.recipe import Recipe
from fdml.recipes import recipe
from fdml.run import Run
from fdml.threat import Threat
from fdml.train import fit, validate
from fdml.train_batch import TrainBatch
from fdml.world import World

NOISY = Recipe(name="mine", norm="l2", eps=0.5, sigma=0.25, noise_copies=3, attack_steps=4)
L2 = Threat("l2", 0.5)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def digits() -> DataSet:
    return load("digits")


def tiny(name: str, **changes: object) -> Recipe:
    small = {"width": 4, "epochs": 2, "teacher_epochs": 1, "attack_steps": 1, "val_limit": 40}
    return replace(recipe(name, "digits"), **(small | changes))


def learn(chosen: Recipe, data: DataSet, out: Path) -> Run:
    """The training of ``train`` without its report; goes on where ``out`` holds a state."""
    run, world, quiet, guide = Run(out), World.join("cpu"), Console(quiet=True), None
    run.begin(chosen, {}, resume=True, overwrite=False)
    if chosen.needs_teacher:
        guide = Teacher.of(fit(chosen.teacher(), data, run, world, "teacher", None, quiet), chosen, data.train)
    fit(chosen, data, run, world, "student", guide, quiet)
    return run


# Noise


def test_noise_is_gaussian_and_drawn_only_where_there_is_a_sigma() -> None:
    x, stream = torch.rand(20, 1, 28, 28), generator()
    before = stream.get_state()
    assert draw_noise(replace(NOISY, sigma=0.0), x, stream) is None
    assert torch.equal(stream.get_state(), before)
    noise = draw_noise(NOISY, x, stream)
    assert noise is not None
    assert noise.shape == (3, *x.shape)
    assert float(noise.mean()) == pytest.approx(0, abs=0.005)
    assert float(noise.std()) == pytest.approx(0.25, rel=0.01)
    assert not torch.equal(noise[0], noise[1])


def test_a_batch_is_seen_through_every_draw() -> None:
    x, x_adv, y = torch.rand(4, 1, 8, 8), torch.rand(4, 1, 8, 8), torch.arange(4)
    noise = draw_noise(NOISY, x, generator())
    assert noise is not None
    advice = Advice(torch.rand(4, 10), {"stage": torch.rand(4, 2, 3, 3), "features": torch.rand(4, 5)})
    clean, adversarial, labels, repeated = see_through(noise, x, x_adv, y, advice)
    assert repeated is not None
    for draw in range(3):
        part = slice(4 * draw, 4 * draw + 4)
        assert torch.equal(clean[part], x + noise[draw])  # not clipped
        assert torch.equal(adversarial[part], x_adv + noise[draw])
        assert torch.equal(labels[part], y)
        assert torch.equal(repeated.logits[part], advice.logits)
        assert all(torch.equal(repeated.taps[name][part], tap) for name, tap in advice.taps.items())
    assert see_through(noise, x, x_adv, y, None)[3] is None


@pytest.mark.parametrize("base", ["ce", "trades"])
def test_the_attack_is_on_the_mean_answer_through_the_noise(base: str) -> None:
    """A network that is sure of itself one way or the other: the gradient of each draw's own loss is that of the draws
    that it answers wrongly; that of the mean answer is that of the draws at the boundary."""
    chosen = replace(NOISY, base=base, noise_copies=8)
    model = build("cnn", input=(1, 16, 16), classes=3, mean=(0.5,), std=(0.3,), options={"width": 2})
    for _ in range(3):
        model(torch.rand(16, 1, 16, 16))
    x = torch.rand(80, 1, 16, 16)
    noise = draw_noise(chosen, x, generator())
    assert noise is not None
    y = model.eval()(x).argmax(1)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start = attack_start(chosen, x, L2, generator(1))
    x_adv = inner_attack(chosen, model, x, start, y, L2, noise)
    assert bool(L2.contains(x_adv, x).all())
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # Parts of a batch are what they are in the whole.
    some = slice(50, 61)
    part = inner_attack(chosen, model, x[some], start[some], y[some], L2, noise[:, some])
    torch.testing.assert_close(part, x_adv[some], atol=1e-4, rtol=0)
    model.eval()
    with torch.no_grad():
        clean = model(see_through(noise, x, x, y, None)[0]).softmax(1).view(8, 80, 3).mean(0)

    def loss(images: torch.Tensor) -> float:
        seen, _, _, _ = see_through(noise, images, images, y, None)
        with torch.no_grad():
            mean = model(seen).softmax(1).view(8, 80, 3).mean(0)
        if base == "trades":
            return float(losses.kl_divergence(clean.log(), mean.log()).mean())
        return float(nn.functional.nll_loss(mean.log(), y))

    alone = inner_attack(chosen, model, x, start, y, L2)
    assert loss(x_adv) > loss(alone) > loss(x)


def test_the_attack_on_a_linear_network_has_its_closed_form() -> None:
    layer = nn.Linear(64, 2)
    model = nn.Sequential(nn.Flatten(), layer)
    x, y = torch.full((5, 1, 8, 8), 0.5), torch.tensor([0, 1, 0, 1, 1])
    noise = draw_noise(NOISY, x, generator())
    x_adv = inner_attack(NOISY, model, x, x, y, L2, noise)
    direction = (layer.weight[1] - layer.weight[0]).detach()
    wanted = 0.5 * direction / direction.norm() * (1 - 2 * y[:, None])
    torch.testing.assert_close((x_adv - x).flatten(1), wanted, atol=1e-5, rtol=0)


def test_validation_is_under_the_noise(digits: DataSet) -> None:
    model = build("cnn", input=(1, 8, 8), classes=10, mean=digits.mean, std=digits.std, options={"width": 4}).eval()
    _, x, _ = digits.val.head(40).all()
    y = model(x).argmax(1)
    faint = validate(tiny("fdml-smooth", sigma=1e-6), model, x, y, L2)
    assert faint == {"clean": 1.0, "noisy": 1.0}
    strong = validate(tiny("fdml-smooth", sigma=4.0), model, x, y, L2)
    assert strong["clean"] == 1.0
    assert 0 < strong["noisy"] < 1
    assert strong == validate(tiny("fdml-smooth", sigma=4.0), model, x, y, L2)


# Interval bounds


def test_the_box_grows_from_nothing_to_its_size() -> None:
    chosen = Recipe(name="mine", eps=0.1, attack_radius=1.5, ibp=1.0, ibp_warmup=0.5)
    sizes = [box_eps(chosen, done / 200) for done in range(201)]
    assert sizes[0] == 0
    assert sizes[100:] == pytest.approx([0.15] * 101)
    steps = [after - before for before, after in pairwise(sizes)][:100]
    assert all(step >= 0 for step in steps)
    assert all(later > earlier - 1e-9 for earlier, later in pairwise(steps))  # no kink
    assert box_eps(replace(chosen, ibp_warmup=0.0), 0.0) == pytest.approx(0.15)


def test_bounds_share_the_loss_with_the_other_terms(digits: DataSet) -> None:
    model = build("cnn", input=(1, 8, 8), classes=10, mean=digits.mean, std=digits.std, options={"width": 4}).train()
    guided, world = Guided(model, None, torch.rand(2, 1, 8, 8)), World.join("cpu")
    _, x, y = digits.train.head(32).all()
    batch = TrainBatch(x, x, y)
    plain = replace(tiny("ibp"), ibp=0.0)
    wanted = objective(plain, guided, guided, batch, 0.9, world).losses["ce"]
    for share in (0.25, 1.0):
        found = objective(replace(plain, ibp=share), guided, guided, batch, 0.9, world).losses
        assert found.keys() == ({"ce", "ibp"} if share < 1 else {"ibp"})
        assert bool(found["ibp"] > share * wanted)
        if share < 1:
            torch.testing.assert_close(found["ce"], (1 - share) * wanted)
    # The bounds of a box without size are the image itself; label smoothing is for the other terms.
    small = objective(replace(plain, ibp=1.0, eps=0.0), guided, guided, batch, 1.0, world).losses["ibp"]
    torch.testing.assert_close(small, nn.functional.cross_entropy(model(x), y), atol=1e-3, rtol=1e-3)


def test_bounds_are_learnt(digits: DataSet, tmp_path: Path) -> None:
    """Plain training certifies nothing."""
    _, x, y = digits.val.head(1000).all()
    shares = {}
    for name, epochs in (("ibp", 5), ("standard", 2)):
        run = learn(tiny(name, eps=0.02, epochs=epochs, batch_size=32, val_limit=100), digits, tmp_path / name)
        model = fdml.load(run.model("student"))
        shares[name] = float(certified(model, x, y, 0.02).double().mean())
        if name == "ibp":
            card = fdml.read_card(run.model("student"))
            assert card.threat == {"norm": "linf", "eps": 0.02}
            assert card.metrics["validation"]["certified"] == max(row["certified"] for row in run.rows())
    assert shares["standard"] < 0.05
    assert shares["ibp"] > 0.3


# Runs


@pytest.mark.parametrize("name", ["smooth-adv", "fdml-smooth", "fdml-ibp"])
def test_a_stopped_run_ends_with_the_same_weights(
    name: str, digits: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, few = tiny(name, val_limit=20, batch_size=64), replace(digits, train=digits.train.head(256))
    whole = learn(chosen, few, tmp_path / "whole")
    original = Learner.step

    def interrupted(self: Learner, *arguments, **keywords) -> dict:
        if self.recipe == chosen and self.steps == 5:  # the second of the second epoch
            signal.raise_signal(signal.SIGINT)
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(Learner, "step", interrupted)
    with pytest.raises(Stopped, match="epoch 2 of the student"):
        learn(chosen, few, tmp_path / "stopped")
    monkeypatch.undo()
    again = learn(chosen, few, tmp_path / "stopped")
    for file in ("student", "student-last"):
        one, other = (load_file(run.path / f"{file}.safetensors") for run in (whole, again))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_card_says_the_sigma(digits: DataSet, tmp_path: Path) -> None:
    run = learn(tiny("fdml-smooth", sigma=0.3, epochs=1), digits, tmp_path / "run")
    card = fdml.read_card(run.model("student"))
    assert card.recipe["sigma"] == 0.3
    assert card.threat == {"norm": "l2", "eps": 0.5}
    assert card.metrics["validation"].keys() == {"epoch", "clean", "noisy"}
    assert fdml.read_card(run.model("teacher")).recipe["sigma"] == 0
