"""The attacker's models: which there are, that each is trained once, and that a wrong file is refused."""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import fdml
from fdml.card import Card
from fdml.checkpoint import CUSTOM, save
from fdml.data import load as load_data
from fdml.data.dataset import Arrays, DataSet
from fdml.errors import InputError, Stopped
from fdml.learner import Learner
from fdml.models import build
from fdml.recipe import Recipe
from fdml.recipes import recipe
from fdml.run import Run
from fdml.surrogates import SEED, estimate, key, surrogate_files, wanted
from fdml.train import make_card, train
from fdml.world import World

GRAY = ["gray-teacher", "gray-clone", "gray-defended"]
BLACK = ["transfer-resnet18-standard", "transfer-resnet18-pgd-at"]


def tiny(name: str = "fdml", **changes: object) -> Recipe:
    small = {"width": 4, "epochs": 1, "teacher_epochs": 1, "attack_steps": 1, "batch_size": 64}
    return replace(recipe(name, "digits"), **(small | {"val_steps": 1, "val_limit": 20} | changes))


@pytest.fixture(scope="session")
def data() -> DataSet:
    digits = load_data("digits")
    return replace(digits, train=digits.train.head(128), val=digits.val.head(20), test=digits.test.head(10))


@pytest.fixture(scope="session")
def world() -> World:
    return World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="session")
def run(data: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run as `fdml train` leaves it, without its report."""
    made = Run(tmp_path_factory.mktemp("victim") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fdml.train.write_report", lambda *_, **__: {})
        train(tiny(), data, made.path, device="cpu")
    return made


def card_of(chosen: Recipe, data: DataSet, **changes: object) -> Card:
    model = build("cnn", input=data.input, classes=10, mean=data.mean, std=data.std, options={"width": 4})
    return replace(make_card(chosen, data, model, "student", False, {}), **changes)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """The recipe of each step of training, as it is taken."""
    taken: list[Recipe] = []
    step = Learner.step

    def counted(self: Learner, *arguments, **keywords) -> dict:
        taken.append(self.recipe)
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(Learner, "step", counted)
    return taken


def same_weights(one: Path, other: Path) -> bool:
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Which surrogates there are


def names(card: Card, *protocols: str) -> list[str]:
    return [surrogate.name for surrogate in wanted(card, "digits", protocols)]


def test_protocols_name_their_surrogates(data: DataSet) -> None:
    card = card_of(tiny(), data)
    assert names(card, "gray", "black") == GRAY + BLACK
    assert names(card, "white", "query") == []
    assert names(card, "gray-clone", "transfer") == ["gray-clone", *BLACK]
    assert names(card, "transfer-resnet18-pgd-at") == BLACK[1:]


def test_surrogates_are_what_their_names_say(data: DataSet) -> None:
    victim = tiny(eps=0.15, seed=4, teacher_width=6)
    found = {each.name: each.recipe for each in wanted(card_of(victim, data), "digits", ("gray", "black"))}
    assert found["gray-defended"] == replace(victim, seed=SEED)
    assert (found["gray-teacher"].seed, found["gray-teacher"].width) == (4, 6)
    assert (found["gray-clone"].seed, found["gray-clone"].width) == (SEED, 4)
    for name in ("gray-teacher", "gray-clone", BLACK[0]):
        assert found[name].attack == "none"
        assert not found[name].needs_teacher
    for name in BLACK:
        assert (found[name].architecture, found[name].width, found[name].seed) == ("resnet18", 8, SEED)
    adversarial = found[BLACK[1]]
    assert (adversarial.attack, adversarial.eps, adversarial.needs_teacher) == ("pgd", 0.15, False)


@pytest.mark.parametrize(
    ("chosen", "gray"),
    [("pgd-at", ["gray-clone", "gray-defended"]), ("standard", ["gray-clone"]), ("fast-at", GRAY[1:])],
)
def test_a_victim_without_a_teacher_or_a_defence_gets_none(chosen: str, gray: list[str], data: DataSet) -> None:
    assert names(card_of(tiny(chosen), data), "gray") == gray


@pytest.mark.parametrize(
    ("architecture", "other"),
    [("cnn", "resnet18"), ("resnet18", "wrn-10-2"), ("wrn-28-10", "resnet18"), (CUSTOM, "resnet18")],
)
def test_a_transfer_comes_from_another_architecture(architecture: str, other: str, data: DataSet) -> None:
    card = card_of(tiny(), data, architecture=architecture, options={})
    assert names(card, "black") == [f"transfer-{other}-standard", f"transfer-{other}-pgd-at"]
    for surrogate in wanted(card, "digits", ["black"]):
        options = {} if surrogate.recipe.width is None else {"width": surrogate.recipe.width}
        model = build(other, input=(3, 32, 32), classes=10, mean=(0,) * 3, std=(1,) * 3, options=options)
        assert sum(p.numel() for p in model.parameters()) < 1_000_000


def test_a_network_of_the_users_own_code_gets_nothing_gray(data: DataSet) -> None:
    assert names(card_of(tiny(), data, architecture=CUSTOM, options={}), "gray") == []


@pytest.mark.parametrize("broken", [{}, {"name": "fdml", "lr": "fast"}, {"name": "fdml", "from": "the future"}])
def test_a_card_without_a_usable_recipe_is_taken_for_fdml(broken: dict, data: DataSet) -> None:
    threat = {"norm": "l2", "eps": 0.5}
    card = card_of(tiny(), data, recipe=broken, threat=threat)
    found = {each.name: each for each in wanted(card, "digits", ["gray"])}
    expected = replace(recipe("fdml", "digits"), norm="l2", eps=0.5, width=4, seed=SEED)
    assert found["gray-defended"].recipe == expected
    assert "card has none" in found["gray-defended"].why


def test_victims_that_differ_in_their_loss_alone_share_surrogates(data: DataSet) -> None:
    victims = [tiny(), tiny("pgd-at", seed=7), tiny("mart", label_smoothing=0.1), tiny(ml=5.0, margin=0.1)]
    sets = [
        {each.recipe for each in wanted(card_of(victim, data), "digits", ["gray-clone", "black"])} for victim in victims
    ]
    assert all(found == sets[0] for found in sets)
    clean = [wanted(card_of(tiny(eps=eps), data), "digits", ["gray-clone"])[0].recipe for eps in (0.1, 0.2)]
    assert clean[0] == clean[1]


def test_the_key_holds_all_that_decides_the_weights(data: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [key(tiny(), data), key(tiny(seed=1), data), key(tiny(), replace(data, fingerprint="0" * 64))]
    monkeypatch.setattr(fdml, "__version__", "99.0")
    keys.append(key(tiny(), data))
    assert len(set(keys)) == 4
    assert all(each.isalnum() for each in keys)


# Trained once


def test_each_network_is_trained_once(
    run: Run, data: DataSet, world: World, tmp_path: Path, steps: list[Recipe]
) -> None:
    card, file = fdml.read_card(run.model("student")), run.model("student")
    before = torch.get_rng_state()
    files = surrogate_files(card, file, data, ["gray", "black"], cache=tmp_path, world=world)
    assert list(files) == GRAY + BLACK
    # Four epochs of two steps: the clone is the teacher of the defended one, and the victim's teacher lies beside it.
    assert len(steps) == 8
    assert torch.equal(before, torch.get_rng_state()), "the caller's random state is left alone"
    x = torch.rand(2, 1, 8, 8)
    weights = {name: load_file(path) for name, path in files.items()}
    assert all(fdml.load(path)(x).shape == (2, 10) for path in files.values())
    assert surrogate_files(card, file, data, ["gray", "black"], cache=tmp_path, world=world) == files
    assert len(steps) == 8
    for name, path in files.items():
        again = load_file(path)
        assert all(torch.equal(each, again[at]) for at, each in weights[name].items())


def test_surrogates_are_those_of_fdml_train(run: Run, data: DataSet, world: World, tmp_path: Path) -> None:
    """The trained `gray-teacher` has the weights of the victim's own; `gray-defended` is the run of another seed."""
    alone = tmp_path / "elsewhere" / "student.safetensors"
    alone.parent.mkdir()
    alone.write_bytes(run.model("student").read_bytes())
    card = fdml.read_card(alone)
    wanted_files = ["gray-teacher", "gray-defended"]
    files = surrogate_files(card, alone, data, wanted_files, cache=tmp_path / "cache", world=world)
    assert same_weights(files["gray-teacher"], run.model("teacher"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fdml.train.write_report", lambda *_, **__: {})
        train(tiny(seed=SEED), data, tmp_path / "other", device="cpu")
    assert same_weights(files["gray-defended"], Run(tmp_path / "other").model("student"))
    assert not list(tmp_path.glob("cache/*/report"))


def test_the_teacher_of_a_run_folder_is_found(
    run: Run, data: DataSet, world: World, tmp_path: Path, steps: list[Recipe]
) -> None:
    card = fdml.read_card(run.model("student"))
    files = surrogate_files(card, run.model("student"), data, ["gray-teacher"], cache=tmp_path, world=world)
    assert files == {"gray-teacher": run.model("teacher")}
    assert not steps
    assert not list(tmp_path.iterdir())


class Killed(BaseException):
    """What nothing catches."""


@contextmanager
def stopped_at(call: int, by: BaseException) -> Iterator[None]:
    """Inside the block the given step of training raises instead of being taken."""
    step, calls = Learner.step, 0

    def stopping(self: Learner, *arguments, **keywords) -> dict:
        nonlocal calls
        calls += 1
        if calls == call:
            raise by
        return step(self, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", stopping)
        yield


def test_a_killed_training_goes_on(data: DataSet, world: World, tmp_path: Path, steps: list[Recipe]) -> None:
    card = card_of(tiny(epochs=2), data)
    file = tmp_path / "student.safetensors"
    protocols = ["gray-defended"]
    whole = surrogate_files(card, file, data, protocols, cache=tmp_path / "whole", world=world)
    assert len(steps) == 2 + 4
    with stopped_at(2 + 4, Killed()), pytest.raises(Killed):
        surrogate_files(card, file, data, protocols, cache=tmp_path / "killed", world=world)
    steps.clear()
    files = surrogate_files(card, file, data, protocols, cache=tmp_path / "killed", world=world)
    assert len(steps) == 2, "the teacher and the first epoch were done"
    assert same_weights(files["gray-defended"], whole["gray-defended"])


def test_a_stop_names_the_surrogate(data: DataSet, world: World, tmp_path: Path) -> None:
    file = tmp_path / "student.safetensors"
    with (
        stopped_at(2, Stopped("stopped", 130)),
        pytest.raises(Stopped, match="surrogate gray-clone: stopped") as caught,
    ):
        surrogate_files(card_of(tiny(), data), file, data, ["gray-clone"], cache=tmp_path, world=world)
    assert caught.value.code == 130


def test_of_two_commands_one_trains(data: DataSet, world: World, tmp_path: Path, steps: list[Recipe]) -> None:
    card, file = card_of(tiny("pgd-at"), data), tmp_path / "student.safetensors"
    found: list[dict[str, Path]] = []

    def ask() -> None:
        found.append(surrogate_files(card, file, data, ["gray"], cache=tmp_path, world=world))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert found[0] == found[1]
    assert len(steps) == 4


def test_the_cache_lies_where_caches_lie(data: DataSet, world: World, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path))
        files = surrogate_files(card_of(tiny("standard"), data), tmp_path / "none", data, ["gray"], world=world)
    (recipe_of_it,) = (each.recipe for each in wanted(card_of(tiny("standard"), data), "digits", ["gray"]))
    folder = tmp_path / "fdml" / "surrogates" / key(recipe_of_it, data)
    assert files == {"gray-clone": folder / "teacher.safetensors"}
    assert Run(folder).recipe() == recipe_of_it


def test_a_cache_that_cannot_be_written(data: DataSet, world: World, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(InputError, match=r"cannot write .*cache"):
        surrogate_files(card_of(tiny(), data), tmp_path / "x", data, ["gray"], cache=tmp_path / "cache", world=world)


# What the user is told


def test_what_is_missing_is_said_with_the_time(data: DataSet, world: World, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), record=True, width=200)
    card, file = card_of(tiny(), data), tmp_path / "student.safetensors"
    before = torch.get_rng_state()
    surrogate_files(card, file, data, ["gray-clone", BLACK[1]], cache=tmp_path, world=world, console=console)
    assert torch.equal(before, torch.get_rng_state())
    text = console.export_text()
    assert "2 surrogate models are missing and will be trained: about " in text
    assert "  transfer-resnet18-pgd-at: resnet18, 176,258 weights, pgd-at, epochs=1: about " in text
    assert f"kept in {tmp_path}" in text
    assert "--surrogate NAME=FILE" in text
    assert "training gray-clone" in text
    surrogate_files(card, file, data, ["gray-clone", BLACK[1]], cache=tmp_path, world=world, console=console)
    assert not console.export_text()


def test_the_estimate_grows_with_the_work(data: DataSet, world: World) -> None:
    many = estimate(tiny(epochs=300, attack_steps=10), data, world)
    few = estimate(tiny(epochs=3, attack_steps=1), data, world)
    assert 0 < few < many


# Files of the user's own


def test_given_files_are_used(run: Run, data: DataSet, world: World, tmp_path: Path, steps: list[Recipe]) -> None:
    card, file = card_of(tiny(), data), tmp_path / "student.safetensors"
    given = {"gray-defended": run.model("student"), "gray-teacher": str(run.model("student", "last")),
             "gray-clone": run.model("teacher"), "transfer-mine": run.model("teacher")}  # fmt: skip
    given |= {name: run.model("teacher", "last") for name in BLACK}
    files = surrogate_files(card, file, data, ["gray", "black"], given=given, cache=tmp_path, world=world)
    assert files == {name: Path(path) for name, path in given.items()}
    assert list(files) == [*GRAY, *BLACK, "transfer-mine"]
    assert not steps


def test_a_given_file_goes_before_the_teacher_beside(run: Run, data: DataSet, world: World, tmp_path: Path) -> None:
    card = fdml.read_card(run.model("student"))
    given = {"gray-teacher": run.model("teacher", "last")}
    assert surrogate_files(card, run.model("student"), data, ["gray-teacher"], given=given, world=world) == given


def test_a_file_of_other_data_is_refused(data: DataSet, world: World, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.safetensors"
    for changes, message in (
        ({"input": (1, 9, 9)}, r"surrogate gray-clone: \S+wrong.safetensors is for images of \(1, 9, 9\).*digits"),
        ({"classes": tuple("abcdefghij")}, r"10 classes \(a, b, c, …\), but digits has .*10 classes \(0, 1, 2, …\)"),
    ):
        model = build("cnn", input=data.input, classes=10, mean=data.mean, std=data.std, options={"width": 4})
        save(model, card_of(tiny(), data, **changes), wrong)
        with pytest.raises(InputError, match=message):
            surrogate_files(
                card_of(tiny(), data), tmp_path / "s", data, ["gray"], given={"gray-clone": wrong}, world=world
            )
    (tmp_path / "student.safetensors").touch()
    wrong.rename(tmp_path / "teacher.safetensors")
    with pytest.raises(InputError, match="surrogate gray-teacher"):
        surrogate_files(card_of(tiny(), data), tmp_path / "student.safetensors", data, ["gray-teacher"], world=world)


@pytest.mark.parametrize(
    ("name", "protocols", "message"),
    [
        ("gray-clon", ["gray"], "unknown surrogate 'gray-clon': did you mean 'gray-clone'"),
        ("gray-clone", ["black"], "gray-clone is given, but no protocol"),
        ("gray-clone", ["gray"], "is the model that is attacked"),
    ],
)
def test_a_given_name_that_has_no_use(
    name: str, protocols: list[str], message: str, run: Run, data: DataSet, world: World
) -> None:
    file = run.model("student")
    with pytest.raises(InputError, match=message):
        surrogate_files(fdml.read_card(file), file, data, protocols, given={name: file}, world=world)


def test_a_recipe_that_does_not_fit_the_data_names_the_surrogate(data: DataSet, world: World, tmp_path: Path) -> None:
    few = replace(data, train=Arrays(data.train.head(8).images, data.train.head(8).labels))
    with pytest.raises(InputError, match=r"surrogate gray-clone in .*batch_size=64 does not fit"):
        surrogate_files(card_of(tiny(), data), tmp_path / "x", few, ["gray-clone"], cache=tmp_path, world=world)
