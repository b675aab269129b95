"""Red flags: honest models raise none, masked ones do, and every threshold on both of its sides."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdml.attacks import Model, fgsm, pgd
from fdml.data import load
from fdml.errors import InputError
from fdml.evaluate import predictions
from fdml.evaluate.flags import KINDS, LEVELS, Flag, from_outcomes, probe
from fdml.losses import margin
from fdml.randomness import Streams
from fdml.threat import Threat

THREAT = Threat("linf", 0.1)
PAGE = Path(__file__).parents[2] / "docs" / "flags.md"


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    batch = load("digits").test.head(200).all()
    return batch.x, batch.y


@pytest.fixture(scope="module", params=["plain", "defended"])
def honest(request: pytest.FixtureRequest) -> nn.Module:
    """A small network, trained on clean digits or on PGD's."""
    torch.manual_seed(0)
    data = load("digits").train.head(2000).all()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    for _ in range(150):
        index = torch.randint(len(data.x), (128,))
        x, y = data.x[index], data.y[index]
        if request.param == "defended":
            x = pgd(model, x, y, THREAT, steps=3, keep="last")
        # By hand: an optimizer of torch imports its compiler, which takes longer than all of this.
        parameters = list(model.parameters())
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
        with torch.no_grad():
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter -= 0.5 * grad
    return model.eval()


def quantised(model: Model) -> Model:
    return lambda x: model((x * 3).round() / 3)


def cold(model: Model) -> Model:
    return lambda x: model(x) / 1e-3


def stopped(model: Model) -> Model:
    return lambda x: model(x.detach())


def without_graph(model: Model) -> Model:
    return torch.inference_mode()(lambda x: model(x))


def half_stopped(model: Model) -> Model:
    return lambda x: model(torch.cat([x[..., :4], x[..., 4:].detach()], 3))


def not_a_number(model: Model) -> Model:
    return lambda x: model(x + 0 * x.sqrt())


def noisy(model: Model) -> Model:
    return lambda x: model(x + 0.1 * torch.randn_like(x))


def resized(model: Model) -> Model:
    def answer(x: Tensor) -> Tensor:
        small = F.interpolate(x, size=int(torch.randint(6, 8, ())), mode="bilinear")
        return model(F.interpolate(small, size=8, mode="bilinear"))

    return answer


def off_the_lattice(model: Model) -> Model:
    """Gradients at 8-bit images only: one step from the image finds its way, every later point is lost."""

    def answer(x: Tensor) -> Tensor:
        levels = 255 * x
        on = ((levels - levels.round()).abs() < 1e-2).flatten(1).all(1)[:, None, None, None]
        return model(torch.where(on, x, x.detach()))

    return answer


def eight_bits(model: Model) -> Model:
    """What a model trained for 8-bit deployment does: it masks nothing."""
    return lambda x: model(x + ((255 * x).round() / 255 - x).detach())


def search(
    model: Model, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator | Streams | None = None
) -> Tensor:
    """A query attack: random corners of the ball for a tenth of the pixels, kept where the margin rises."""

    def corner() -> Tensor:
        return threat.project(x + threat.eps * (2 * torch.randint(2, x.shape) - 1), x)

    with torch.no_grad():
        best = corner()
        value = margin(model(best), y)
        for _ in range(200):
            ahead = torch.where(torch.rand(x.shape) < 0.1, corner(), best)
            found = margin(model(ahead), y)
            best[found > value], value = ahead[found > value], value.maximum(found)
    return best


ATTACKS = {"fgsm": fgsm, "pgd20": pgd, "pgd50x3": partial(pgd, steps=50, restarts=3), "search": search}
KIND = {"fgsm": "one-step", "pgd20": "iterative", "pgd50x3": "iterative", "search": "query"}


def outcomes(model: Model, x: Tensor, y: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
    clean = predictions(model, x) == y
    standing = {"clean": clean}
    rows = clean.nonzero().squeeze(1)
    for name in names:
        x_adv = ATTACKS[name](model, x[rows], y[rows], THREAT, generator=Streams.of(rows, 0, name))
        standing[name] = clean.clone()
        standing[name][rows] = predictions(model, x_adv) == y[rows]
    return standing


def probed(model: Model, x: Tensor, y: Tensor, threat: Threat = THREAT) -> dict[str, Flag]:
    return {flag.name: flag for flag in probe(model, x, y, threat, generator=Streams.of(torch.arange(len(x)), 0))}


def seen(model: Model, x: Tensor, y: Tensor, names: Iterable[str] = KIND) -> list[str]:
    return [flag.name for flag in from_outcomes(outcomes(model, x, y, names), KIND)]


# Honest models


@pytest.mark.parametrize("wrap", [lambda model: model, eight_bits], ids=["as it is", "8 bits"])
def test_an_honest_model_raises_nothing(
    honest: nn.Module, digits: tuple[Tensor, Tensor], wrap: Callable[[Model], Model]
) -> None:
    assert not seen(wrap(honest), *digits)
    for threat in (THREAT, Threat("linf", 0.01), Threat("linf", 1.0), Threat("l2", 1.0), Threat("l1", 5.0)):
        assert not probed(wrap(honest), *digits, threat)


def test_a_sure_model_is_not_a_saturated_one(honest: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    """Margins of up to about 50 leave the cross-entropy its gradient in float32."""
    x, y = digits
    factor = 50 / float(-margin(honest(x), y).min().detach())
    assert not probed(lambda x: factor * honest(x), x, y)


def test_two_classes(digits: tuple[Tensor, Tensor]) -> None:
    x, _ = digits
    weight = torch.randn(64, generator=torch.Generator().manual_seed(0))

    def linear(x: Tensor) -> Tensor:
        value = x.flatten(1) @ weight
        return torch.stack([-value, value], 1)

    y = linear(x).argmax(1)
    assert not probed(linear, x, y)
    assert set(probed(cold(linear), x, y)) >= {"zero-gradients"}


def test_nothing_answered_rightly_raises_nothing(honest: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    x, y = digits
    wrong = (predictions(honest, x) + 1) % 10
    assert not probed(honest, x, wrong)
    assert not probed(honest, x[:0], y[:0])
    assert set(probed(noisy(honest), x, wrong)) == {"random-model"}


def test_an_answer_that_is_no_number_is_not_random(honest: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    assert not probed(lambda x: honest(x) * torch.nan, *digits)


# Masked models


@pytest.mark.parametrize(
    ("mask", "name"),
    [
        (quantised, "zero-gradients"),
        (quantised, "huge-eps"),
        (cold, "zero-gradients"),
        (cold, "huge-eps"),
        (stopped, "zero-gradients"),
        (stopped, "huge-eps"),
        (without_graph, "zero-gradients"),
        (off_the_lattice, "zero-gradients"),
        (half_stopped, "wrong-gradients"),
        (not_a_number, "non-finite-gradients"),
        (noisy, "random-model"),
        (resized, "random-model"),
    ],
)
def test_the_probe_finds_what_masks(
    honest: nn.Module, digits: tuple[Tensor, Tensor], mask: Callable[[Model], Model], name: str
) -> None:
    found = probed(mask(honest), *digits)
    assert found[name].level == "fail"
    assert found[name].figure > 0.1
    # One cause is not told as two: only what follows from it may stand beside it.
    assert set(found) <= {name, "huge-eps", "zero-gradients"}


def test_gradients_are_judged_where_the_answer_is_right(honest: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    x, y = digits
    y = torch.where(torch.arange(len(y)) % 2 == 0, y, (y + 1) % 10)
    assert probed(cold(honest), x, y)["zero-gradients"].figure == 1


@pytest.mark.parametrize(
    ("mask", "names"),
    [
        (quantised, {"black-box-beats-white-box", "gap"}),
        (cold, {"black-box-beats-white-box", "gap"}),
        (half_stopped, {"black-box-beats-white-box", "gap"}),
        (off_the_lattice, {"one-step-beats-iterative", "gap"}),
    ],
)
def test_the_outcomes_show_what_masks(
    honest: nn.Module, digits: tuple[Tensor, Tensor], mask: Callable[[Model], Model], names: set[str]
) -> None:
    assert names <= set(seen(mask(honest), *digits, ["fgsm", "pgd20", "search"]))


def test_a_random_model_gains_by_restarts(honest: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    """Each restart is one more draw of what the model adds; an image stands if it does so in every one of them."""
    x, y = digits
    clean = predictions(honest, x) == y

    def standing(draws: int) -> Tensor:
        each = [predictions(lambda x: honest(x + 0.5 * torch.randn_like(x)), x) == y for _ in range(draws)]
        return clean & torch.stack(each).all(0)

    flags = from_outcomes(
        {"clean": clean, "pgd20": standing(1), "pgd20x5": standing(5)}, {"pgd20": "iterative", "pgd20x5": "iterative"}
    )
    assert flags[0].name == "more-restarts-still-gain"


# Figures and thresholds


def stands(*fooled: range | int, n: int = 1000) -> Tensor:
    """n images, of which those in ``fooled`` do not stand; a number stands for that many of the first."""
    standing = torch.ones(n, dtype=torch.bool)
    for part in fooled:
        standing[list(range(part) if isinstance(part, int) else part)] = False
    return standing


def raised(kinds: Mapping[str, str], **standing: Tensor) -> dict[str, tuple[str, float]]:
    flags = from_outcomes({"clean": stands(n=len(next(iter(standing.values())))), **standing}, kinds)
    return {flag.name: (flag.level, flag.figure) for flag in flags}


def test_one_step_beats_iterative_beyond_chance() -> None:
    kinds = {"fgsm": "one-step", "pgd20": "iterative", "pgd50": "iterative"}
    assert not raised(kinds, fgsm=stands(500), pgd20=stands(500))
    assert not raised(kinds, fgsm=stands(507), pgd20=stands(500))
    assert raised(kinds, fgsm=stands(508), pgd20=stands(500)) == {"one-step-beats-iterative": ("fail", 0.008)}
    # Eight images of 408 that differ are chance.
    assert not raised(kinds, fgsm=stands(range(208)), pgd20=stands(range(300, 500))).keys() - {"gap"}
    assert "one-step-beats-iterative" not in raised(kinds, fgsm=stands(400), pgd20=stands(500))
    # The attack that loses is named, and one that wins beside it changes nothing.
    (flag,) = from_outcomes({"clean": stands(), "fgsm": stands(520), "pgd20": stands(500), "pgd50": stands(530)}, kinds)
    assert flag.meaning == "fgsm fools 2.0 points more than pgd20, which takes many steps"


def test_black_box_beats_all_white_box_together() -> None:
    kinds = {"fgsm": "one-step", "cw": "white", "square": "query", "teacher": "transfer"}

    def with_white(**black: Tensor) -> dict[str, tuple[str, float]]:
        return raised(kinds, fgsm=stands(300), cw=stands(range(200, 400)), **black)

    name = "black-box-beats-white-box"
    assert not with_white(square=stands(400), teacher=stands(range(100, 300)))
    assert not with_white(square=stands(range(400, 430)))
    assert with_white(square=stands(range(400, 431))) == {name: ("warn", 0.031)}
    assert with_white(square=stands(range(400, 420)), teacher=stands(range(410, 440))) == {name: ("warn", 0.04)}
    assert with_white(teacher=stands(range(400, 500))) == {name: ("warn", 0.1)}
    assert with_white(teacher=stands(range(400, 501))) == {name: ("fail", 0.101)}
    # Seven of a hundred images are many points, and too few images.
    assert not raised(kinds, fgsm=stands(n=100), square=stands(7, n=100))
    assert raised(kinds, fgsm=stands(n=100), square=stands(8, n=100)) == {name: ("warn", 0.08)}


def test_a_query_attack_on_survivors_is_judged_the_same() -> None:
    kinds = {"pgd20": "iterative", "square": "query"}
    alone = raised(kinds, pgd20=stands(300), square=stands(range(200, 350)))
    assert alone == raised(kinds, pgd20=stands(300), square=stands(350)) != {}


def test_without_gradients_there_is_nothing_to_beat() -> None:
    assert not raised({"square": "query", "noise": "control"}, square=stands(500), noise=stands(900))


@pytest.mark.parametrize(
    ("weak", "strong", "name"),
    [
        ("pgd20", "pgd100", "more-steps-still-gain"),
        ("pgd20", "pgd100x5", "more-steps-still-gain"),
        ("pgd50", "pgd50x3", "more-restarts-still-gain"),
        ("apgd50-dlr", "apgd100-dlr", "more-steps-still-gain"),
    ],
)
def test_more_effort_still_gains(weak: str, strong: str, name: str) -> None:
    kinds = {weak: "iterative", strong: "iterative"}

    def gain(images: int) -> tuple[str, float] | None:
        return raised(kinds, **{strong: stands(500 + images), weak: stands(500)}).get(name)

    assert gain(-50) is None
    assert gain(40) is None
    assert gain(41) == ("warn", 0.041)
    assert gain(100) == ("warn", 0.1)
    assert gain(101) == ("fail", 0.101)


def test_more_effort_is_compared_within_a_family_and_at_its_end() -> None:
    fooled = {"pgd100x5": 160, "pgd20": 100, "pgd50x3": 155, "apgd100-ce": 160, "apgd50-dlr": 0, "mi-fgsm": 0}
    kinds = dict.fromkeys(map(str, fooled), "iterative")
    assert not raised(kinds, **{name: stands(count) for name, count in fooled.items()})


def test_the_gap_is_from_pgd20_to_the_worst_case() -> None:
    kinds = {"apgd": "iterative", "pgd20": "iterative", "cw": "white", "turned": "control"}

    def gap(images: int) -> tuple[str, float] | None:
        cw = stands(range(400, 500 + images))
        return raised(kinds, apgd=stands(), pgd20=stands(500), cw=cw, turned=stands(1000)).get("gap")

    assert gap(60) is None
    assert gap(61) == ("warn", 0.061)
    assert gap(100) == ("warn", 0.1)
    assert gap(101) == ("fail", 0.101)
    # Without pgd20 it is from the first iterative attack.
    assert raised(kinds, apgd=stands(100), cw=stands(200)) == {"gap": ("warn", 0.1)}
    assert raised(kinds, pgd20=stands(20, n=100), cw=stands(26, n=100)) == {}


@pytest.mark.parametrize(("count", "level"), [(3, None), (4, "warn"), (32, "warn"), (33, "fail")])
def test_the_share_of_zero_gradients(count: int, level: str | None) -> None:
    """A linear model with no gradient for images that carry a mark, which no perturbation of eps makes or removes."""
    weight = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    x = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    x[:, 0, 0, 0] = (torch.arange(64) < count).float()

    def model(x: Tensor) -> Tensor:
        marked = x[:, :1, :1, :1] > 0.5
        return torch.where(marked, x.detach(), x).flatten(1) @ weight

    flag = probed(model, x, model(x).argmax(1)).get("zero-gradients")
    assert (flag and (flag.level, flag.figure)) == (level and (level, count / 64))


@pytest.mark.parametrize("count", [0, 1])
def test_one_image_is_enough(count: int) -> None:
    """Of a gradient that is no number, and of an answer that changes; here both for an image with a black corner."""
    weight = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    x = 0.2 + 0.6 * torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    x[:count, 0, 0, 0] = 0

    def rooted(x: Tensor) -> Tensor:
        return (x + 0 * x.sqrt()).flatten(1) @ weight

    def drawn(x: Tensor) -> Tensor:
        return x.flatten(1) @ weight * torch.where(x[:, 0, 0, :1] == 0, torch.rand(len(x), 1), 1)

    y = (x.flatten(1) @ weight).argmax(1)
    found = {**probed(rooted, x, y, Threat("linf", 0.01)), **probed(drawn, x, y, Threat("linf", 0.01))}
    assert {name: flag.figure for name, flag in found.items()} == (
        {"non-finite-gradients": 1 / 64, "random-model": 1 / 64} if count else {}
    )


@pytest.mark.parametrize(("share", "raises"), [(0.4, False), (0.6, True)])
def test_the_share_of_wrong_gradients(share: float, raises: bool) -> None:
    """A linear model whose gradient is turned round for the images that carry a mark."""
    weight = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    x = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    x[:, 0, 0, 0] = (torch.arange(60) < share * 60).float()

    def model(x: Tensor) -> Tensor:
        marked = x[:, :1, :1, :1] > 0.5
        return torch.where(marked, 2 * x.detach() - x, x).flatten(1) @ weight

    found = probed(model, x, model(x).argmax(1))
    assert ("wrong-gradients" in found) == raises
    assert not raises or found["wrong-gradients"] == Flag(
        "wrong-gradients",
        "fail",
        0.6,
        "on 60% of the images the answer does not change as its gradient says",
        "docs/flags.md#wrong-gradients",
    )


@pytest.mark.parametrize(("standing", "raises"), [(6, False), (7, True)])
def test_huge_eps_is_judged_beside_chance(standing: int, raises: bool) -> None:
    """Ten classes, 64 images: six that nothing moves are below one in ten, seven above."""
    x = torch.full((64, 1, 4, 4), 0.2)
    x[:, 0, 0, 0] = (torch.arange(64) < standing).float()

    def model(x: Tensor) -> Tensor:
        # A mark is 1 or 0; PGD moves it by one half at the most, and must not make one.
        marked = x[:, 0, 0, 0] >= 0.5
        bright = x[..., 1:].mean((1, 2, 3))
        return torch.stack([torch.where(marked, 1 + 0 * bright, 0.4 - bright)] + [0 * bright] * 9, 1)

    found = probed(model, x, torch.zeros(64, dtype=torch.long))
    assert ("huge-eps" in found) == raises
    assert not raises or found["huge-eps"].figure == standing / 64


def test_the_probe_looks_at_no_more_images_than_it_may(honest: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    largest = 0

    def model(x: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, len(x))
        return honest(x)

    x, y = digits
    order = y.argsort()  # as folders of images come: class by class
    assert not probe(model, x[order], y[order], THREAT, limit=20)
    assert largest == 20
    with pytest.raises(InputError, match="limit must be at least 1, got 0"):
        probe(model, x, y, THREAT, limit=0)


def test_the_probe_spreads_its_images(digits: tuple[Tensor, Tensor]) -> None:
    x = torch.linspace(0, 1, 200)[:, None, None, None].expand(-1, 1, 8, 8)
    asked: list[Tensor] = []

    def model(x: Tensor) -> Tensor:
        asked.append(x)
        return torch.stack([x.mean((1, 2, 3)), -x.mean((1, 2, 3))], 1)

    probe(model, x, torch.ones(200, dtype=torch.long), THREAT, limit=50)
    assert torch.equal(asked[0], x[::4])


def test_the_probe_leaves_no_trace(honest: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), honest)
    model.train()
    honest.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    first = probed(model, *digits)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == probed(model, *digits)
    assert model.training
    assert not honest.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model[0].parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Mistakes, and the page


def test_outcomes_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="must hold clean, got pgd20"):
        from_outcomes({"pgd20": stands()}, {"pgd20": "iterative"})
    with pytest.raises(InputError, match="attack square has no kind: one of one-step, "):
        from_outcomes({"clean": stands(), "square": stands()}, {"pgd20": "iterative"})
    with pytest.raises(InputError, match="unknown kind 'querry': did you mean 'query'"):
        from_outcomes({"clean": stands(), "square": stands()}, {"square": "querry"})
    with pytest.raises(InputError, match="square has 10 outcomes, but clean has 1000"):
        from_outcomes({"clean": stands(), "square": stands(n=10)}, {"square": "query"})
    empty = {name: stands(n=0) for name in ("clean", *KINDS)}
    assert from_outcomes(empty, {kind: kind for kind in KINDS}) == []


def test_a_flag_becomes_json() -> None:
    (flag,) = from_outcomes(
        {"clean": stands(), "pgd20": stands(), "cw": stands(70)}, {"pgd20": "iterative", "cw": "white"}
    )
    assert asdict(flag) == {
        "name": "gap",
        "level": "warn",
        "figure": 0.07,
        "meaning": "the worst case is 7.0 points below pgd20, which alone says too much",
        "page": "docs/flags.md#gap",
    }


def test_every_flag_has_its_section_and_its_thresholds_there() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == list(LEVELS)
    rows = re.findall(r"^\| \[(.+)\]\(#\1\) \|[^|]*\| ([\d.]*) ?\| ([^|]+) \|$", text, re.MULTILINE)
    assert [name for name, _, _ in rows] == list(LEVELS)
    for name, warn, fail in rows:
        below, above = LEVELS[name]
        assert float(warn or above) == below
        assert fail == "chance" or float(fail.split(",")[0]) == above
        section = text.split(f"## {name}\n")[1].split("\n## ")[0]
        assert all(part in section for part in ("**Measured.**", "**Why it is bad.**", "**What to do.**"))
