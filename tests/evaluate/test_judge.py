"""Whole evaluations of a small defended model: what cannot depend on how the work was cut, and what is left behind."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fdml
from fdml import data
from fdml.attacks import fmn, pgd, square
from fdml.card import Card
from fdml.errors import InputError, Stopped
from fdml.evaluate import assess as module
from fdml.evaluate.assess import Plan, Source, assess
from fdml.evaluate.session import exported, onnx_of
from fdml.evaluate.store import Store
from fdml.evaluate.summary import report
from fdml.evaluate.victim import Victim
from fdml.judge import judge
from fdml.models import build
from fdml.threat import Threat
from fdml.world import World

ROOT = Path(__file__).parents[2]
DIGITS = data.load("digits")
THREAT = Threat("linf", 0.1)
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file: three epochs or so of adversarial training on digits."""
    torch.manual_seed(0)
    model = build("cnn", input=(1, 8, 8), classes=10, mean=(0.3,), std=(0.37,), options={"width": 4})
    _, x, y = DIGITS.train.head(len(DIGITS.train)).all()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for index in torch.randperm(3 * len(y)).remainder(len(y)).split(64):
        x_adv = pgd(model, x[index], y[index], THREAT, steps=2, keep="last")
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x_adv), y[index]).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("judge") / "small.safetensors"
    card = Card(
        architecture="cnn",
        options={"width": 4},
        classes=DIGITS.classes,
        input=(1, 8, 8),
        mean=(0.3,),
        std=(0.37,),
        threat={"norm": "linf", "eps": 0.1},
        role="student",
        recipe={"name": "pgd-at"},
        seed=0,
        data={"name": "digits", "fingerprint": DIGITS.fingerprint},
        metrics={},
        versions={},
    )
    fdml.save(model.eval(), card, path)
    return path


@pytest.fixture(scope="module")
def victim(file: Path) -> Victim:
    return Victim.read(file, "small", torch.device("cpu"))


def timeless(found: Any) -> Any:
    """A report without the times and the layout of the work, which alone may differ."""
    if isinstance(found, dict):
        return {k: timeless(v) for k, v in found.items() if k not in ("seconds", "hardware")}
    return [timeless(each) for each in found] if isinstance(found, list) else found


def finished(plan: Plan, victim: Victim, folder: Path) -> dict[str, Any]:
    store = Store(folder)
    assess(plan, [victim], store, ALONE)
    return timeless(report(plan, [victim], store, ALONE, {}, seconds=0.0))


@pytest.fixture(scope="module", autouse=True)
def small_budgets() -> Iterator[None]:
    cascade = {"fast": ("fast cascade", ("fgsm", "pgd20", "square1000"))}
    few = {"square1000": partial(square, budget=60), "pgd20": partial(pgd, steps=6)}
    with patch.dict("fdml.evaluate.suites.CASCADES", cascade), patch.dict("fdml.evaluate.suites.ATTACKS", few):
        yield


PLAN = Plan(DIGITS, THREAT, attacks=("pgd20", "noise", "fast"), protocols=("white",), limit=40)


@pytest.fixture(scope="module")
def whole(victim: Victim, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return finished(PLAN, victim, tmp_path_factory.mktemp("whole"))


def test_the_model_is_neither_broken_nor_unbreakable(whole: dict[str, Any]) -> None:
    model = whole["models"][0]
    assert model["clean"]["accuracy"] > 0.8
    assert 0.05 < model["worst"]["accuracy"] < model["clean"]["accuracy"] - 0.1


@pytest.mark.parametrize("chunk", [3, 17])
def test_the_size_of_a_chunk_changes_nothing(chunk: int, whole: dict[str, Any], victim: Victim, tmp_path: Path) -> None:
    assert finished(replace(PLAN, chunk=chunk), victim, tmp_path) == whole


def test_another_seed_draws_other_numbers(whole: dict[str, Any], victim: Victim, tmp_path: Path) -> None:
    assert finished(replace(PLAN, seed=1), victim, tmp_path)["models"] != whole["models"]


class Killed(BaseException):
    pass


class Killer:
    """Kills the work when it has begun so many units."""

    def __init__(self, units: int) -> None:
        self.left = units

    def begins(self, victim: str, job: str, share: float) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed

    def ends(self, victim: str, job: str, accuracy: float | None) -> None:
        pass


@pytest.mark.parametrize("units", [1, 4, 7])
def test_a_killed_evaluation_goes_on_to_the_same_report(
    units: int, whole: dict[str, Any], victim: Victim, tmp_path: Path
) -> None:
    plan = replace(PLAN, chunk=16)
    with pytest.raises(Killed):
        assess(plan, [victim], Store(tmp_path), ALONE, watch=Killer(units))
    assert finished(plan, victim, tmp_path) == whole


def test_nothing_is_done_twice(victim: Victim, tmp_path: Path) -> None:
    finished(PLAN, victim, tmp_path)
    with patch.object(module._Work, "step", side_effect=AssertionError("worked again")):
        finished(PLAN, victim, tmp_path)


def test_an_attack_of_two_entries_runs_once_on_an_image(victim: Victim, tmp_path: Path) -> None:
    """`apgd-ce` alone looks at every image; the cascade takes what it found."""
    calls: list[str] = []
    original = module._Work.step

    def counted(self: Any, *arguments: Any, **options: Any) -> None:
        calls.append(arguments[1].name)
        original(self, *arguments, **options)

    plan = replace(PLAN, attacks=("pgd20", "fast"), chunk=1000)
    with patch.object(module._Work, "step", counted):
        found = finished(plan, victim, tmp_path)
    assert calls.count("pgd20") == 1
    alone, cascade = found["models"][0]["attacks"]
    assert cascade["steps"][1]["accuracy"] <= alone["accuracy"]


def test_outcomes_fit_the_accuracies(whole: dict[str, Any]) -> None:
    model = whole["models"][0]
    wrong = [answer != label for answer, label in zip(model["clean"]["predictions"], whole["labels"], strict=True)]
    for attack in model["attacks"]:
        outcomes = attack["outcomes"]
        assert [outcome == "-" for outcome in outcomes] == wrong
        assert outcomes.count(".") / len(outcomes) == pytest.approx(attack["accuracy"])
        for outcome, answer, label in zip(outcomes, attack["predictions"], whole["labels"], strict=True):
            assert (outcome == ".") == (answer == label)
    assert sum(map(sum, model["confusion"])) == len(wrong)


def test_what_the_queries_of_a_cascade_fool_is_black_box(victim: Victim, tmp_path: Path) -> None:
    """Of a model that rounds its input the gradients are zero, and the quick suite has Square in its cascade alone."""
    plan = Plan(DIGITS, THREAT, "quick", ("white", "control"), limit=100)
    masked = Victim.of("masked", lambda x: victim.model((x * 3).round() / 3))
    raised = {}
    with patch.dict("fdml.evaluate.suites.ATTACKS", {"square1000": partial(square, budget=200)}):
        for each in (masked, victim):
            found = finished(plan, each, tmp_path / each.name)["models"][0]
            raised[each.name] = {flag["name"]: flag for flag in found["flags"]}
    assert raised["masked"]["black-box-beats-white-box"]["level"] == "fail"
    assert "fast with its queries" in raised["masked"]["black-box-beats-white-box"]["meaning"]
    assert "black-box-beats-white-box" not in raised["small"]


def test_minimal_norms_are_of_the_first_images(victim: Victim, tmp_path: Path) -> None:
    found = []
    for chunk in (4, 24):
        plan, store = Plan(DIGITS, THREAT, limit=24, chunk=chunk), Store(tmp_path / str(chunk))
        work = module._Work(plan, store, {}, [victim])
        with patch.dict(module.MINIMAL, fmn=("linf", partial(fmn, steps=5))), patch.object(module, "MINIMAL_LIMIT", 10):
            for start in plan.starts:
                work.minimal(victim, "fmn", start)
        states = [store.read(victim.name, "fmn", start) for start in plan.starts]
        found.append([each for state in states if state for each in state.tensors["distances"].tolist()])
    assert len(found[0]) == 10
    assert found[0] == found[1]


def judged(file: Path, out: Path, **options: Any) -> dict[str, Any]:
    return judge([file], DIGITS, THREAT, out, **{"attacks": ("fgsm", "pgd20"), "limit": 30, "device": "cpu", **options})


def test_a_report_folder(file: Path, tmp_path: Path) -> None:
    found = judged(file, tmp_path, adversarial=True)
    assert json.loads((tmp_path / "report.json").read_text()) == found
    assert found["models"][0]["sha256"]
    assert (found["attacks"], found["protocols"]) == (["fgsm", "pgd20"], [])
    assert "small" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "leaderboard.json").read_text())["small"]["clean_acc"]
    with np.load(tmp_path / "adversarial-small.npz") as arrays:
        x_adv, y, fooled = (torch.from_numpy(arrays[name]) for name in ("x_adv", "y", "fooled"))
    _, x, labels = DIGITS.test.head(30).all()
    assert torch.equal(y, labels)
    assert bool(THREAT.contains(x_adv, x).all())
    standing = torch.tensor([o == "." for o in found["models"][0]["attacks"][1]["outcomes"]])
    assert bool((fooled <= ~standing).all())
    assert bool((fdml.load(file)(x_adv[fooled]).argmax(1) != y[fooled]).all())
    assert bool(fooled.any())


@pytest.mark.parametrize(
    ("again", "message"),
    [
        ({}, "--resume"),
        ({"resume": True, "seed": 5}, "seed=0, now it is 5"),
        ({"resume": True, "limit": 20}, "images=30, now it is 20"),
    ],
)
def test_a_folder_is_not_mixed(file: Path, tmp_path: Path, again: dict[str, Any], message: str) -> None:
    judged(file, tmp_path)
    with pytest.raises(InputError, match=message):
        judged(file, tmp_path, **again)


def test_records_of_chunks_of_another_size_are_not_mixed(victim: Victim, tmp_path: Path) -> None:
    Store(tmp_path).begin(PLAN.identity([victim], {}), resume=False, overwrite=False)
    with pytest.raises(InputError, match="chunk=256, now it is 17"):
        Store(tmp_path).begin(replace(PLAN, chunk=17).identity([victim], {}), resume=True, overwrite=False)


def test_a_surrogate_of_another_protocol_is_another_evaluation(victim: Victim) -> None:
    gray, black = (PLAN.identity([victim], {"mine": Source(protocol, victim)}) for protocol in ("gray", "black"))
    assert gray != black


def test_nothing_to_resume(file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no evaluation to resume"):
        judged(file, tmp_path, resume=True)


def test_ctrl_c_says_how_to_go_on(file: Path, tmp_path: Path) -> None:
    with (
        patch.object(module._Work, "entry", side_effect=KeyboardInterrupt),
        pytest.raises(Stopped, match="--resume") as stopped,
    ):
        judged(file, tmp_path)
    assert stopped.value.code == 130
    assert judged(file, tmp_path, resume=True)["models"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attacks": ("pgd21",)}, "'pgd21'.*'pgd20'"),
        ({"suite": "standrad", "attacks": ()}, "'standrad'.*'standard'"),
        ({"protocols": ("wite",), "attacks": ()}, "'wite'.*'white'"),
        ({"limit": 0}, "limit.*0"),
        ({"rng": "numpy"}, "'numpy'"),
        ({"given": {"gray-teacher": Path("x")}, "attacks": (), "suite": "quick"}, "gray-teacher.*--protocol"),
        ({"given": {"gray-teacher": Path("x")}}, "--attack fgsm and --surrogate gray-teacher exclude"),
        ({"protocols": ("gray",)}, "--attack fgsm and --protocol gray exclude"),
    ],
)
def test_mistakes_are_said_before_any_work(file: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        judged(file, tmp_path, **options)
    assert not (tmp_path / "state").exists()


def test_a_model_of_other_images_is_refused(tmp_path: Path) -> None:
    for side, classes, message in ((28, 10, "1, 8, 8"), (8, 4, "10 classes")):
        model = build("cnn", input=(1, side, side), classes=classes, mean=(0.3,), std=(0.3,), options={"width": 1})
        strange = Victim.of("strange", _demanding(model, side))
        with pytest.raises(InputError, match=message):
            assess(PLAN, [strange], Store(tmp_path / str(side)), ALONE)


def _demanding(model: torch.nn.Module, side: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def look(x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != side:
            raise RuntimeError(f"expected images of {side} pixels")
        return model(x)

    return look


def test_a_model_that_answers_nan_is_wrong_everywhere(tmp_path: Path) -> None:
    broken = Victim.of("broken", lambda x: torch.full((len(x), 10), torch.nan) + 0 * x.sum())
    found = finished(PLAN, broken, tmp_path)["models"][0]
    assert found["clean"]["accuracy"] == found["worst"]["accuracy"] == 0
    assert set(found["clean"]["predictions"]) == {-1}


def test_two_models_side_by_side_and_their_transfer(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "copy" / "small.safetensors"
    other.parent.mkdir()
    other.write_bytes(file.read_bytes())
    with patch("fdml.evaluate.suites._WHITE", {"quick": ("fgsm",)}):
        found = judge([file, other], DIGITS, THREAT, tmp_path / "out", suite="quick", limit=30, device="cpu")
    assert len({model["name"] for model in found["models"]}) == 2
    (first, second) = found["transfer"]["accuracy"]
    assert first == second  # the same weights twice: their adversarial images are the same
    assert first[0] < found["models"][0]["clean"]["accuracy"]


def test_an_onnx_file_is_only_queried(file: Path, victim: Victim, tmp_path: Path) -> None:
    _, x, _ = DIGITS.test.head(8).all()
    assert isinstance(victim.model, torch.nn.Module)
    assert exported(victim.model, x) is not None  # where it fails, torch takes over silently
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_of(victim.model, x))
    found = judge([path], DIGITS, THREAT, tmp_path / "out", suite="quick", limit=20, device="cpu")
    model = found["models"][0]
    assert model["gradients"] is False
    assert {attack["name"] for attack in model["attacks"]} == {"square1000", "noise"}
    assert model["attacks"][0]["queries"]
    assert model["clean"]["accuracy"] > 0.8
    assert "no gradients" in (tmp_path / "out" / "report.html").read_text().lower()
    with pytest.raises(InputError, match=r"pgd20.*gradients"):
        judge([path], DIGITS, THREAT, tmp_path / "no", attacks=("pgd20",), limit=20, device="cpu")


class Branching(torch.nn.Module):
    """What no tracer can follow."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) if float(x.sum()) > 0 else -x.flatten(1)


def test_only_the_exporters_errors_are_taken_for_a_model_that_it_cannot_export(victim: Victim) -> None:
    _, x, _ = DIGITS.test.head(8).all()
    assert exported(Branching(), x) is None
    assert isinstance(victim.model, torch.nn.Module)
    with patch("fdml.evaluate.session.onnx_of", side_effect=AttributeError("ours")), pytest.raises(AttributeError):
        exported(victim.model, x)


@pytest.mark.slow  # the training has its own in every run
def test_two_processes_make_the_report_of_one(file: Path, tmp_path: Path) -> None:
    reports = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        done = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"),
                *("-m", "fdml", "evaluate", str(file), "--attack", "pgd20", "--limit", "300", "--out", str(out)),
            ],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        reports.append(timeless(json.loads((out / "report.json").read_text())))
    assert reports[0] == reports[1]
