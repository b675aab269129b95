"""The tables of the comparison: run at toy size, collected, gone on with, never mixed."""

import json
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from command_line import call
from filelock import FileLock
from rich.console import Console

from fdml import reproduce as tables
from fdml.data import load
from fdml.errors import InputError, Stopped
from fdml.evaluate.suites import step
from fdml.outcomes import Outcome, leads, markdown, summary
from fdml.recipes import RECIPES, recipe
from fdml.reproduce import TABLES, reproduce, smoke
from fdml.threat import Threat
from fdml.train import INTERRUPTED
from fdml.world import World


@pytest.mark.parametrize("name", TABLES)
def test_every_table_can_be_run(name: str) -> None:
    table = TABLES[name]
    assert table.seeds >= 3
    assert {row.partition(":")[0] for row in table.rows} <= set(RECIPES)
    assert table.ours in table.rows
    for row in table.rows:
        chosen = tables._recipe(row, table)
        Threat(chosen.norm, chosen.eps)
        assert chosen.norm == "linf" or chosen.attack != "n-fgsm"
    for attack in (*table.white, *table.gray, *table.black):
        step(attack)
    assert smoke(table).seeds == 1


def test_a_table_is_run_and_collected_and_not_run_again(tmp_path: Path) -> None:
    words = ("reproduce", "digits", "--smoke", "--out", tmp_path, "--json", "--device", "cpu")
    rows = ("--row", "fdml", "--row", "pgd-at:attack_steps=1")
    code, out, err = call(*words, *rows)
    assert code == 0, err
    found = json.loads(out)
    assert [each["row"] for each in found] == ["fdml", "pgd-at:attack_steps=1"]
    for each in found:
        assert each["n"] == 20
        assert set(each["accuracies"]) == {
            "clean", "fgsm", "pgd20", "noise", "gray mi-fgsm", "gray di-ti", "gray pgd50-transfer",
        }  # fmt: skip
        assert each["worst"] <= min(each["white"], each["gray"], each["black"]) <= each["accuracies"]["clean"]
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table.startswith("| method | seeds | clean | FGSM | PGD-20 | random noise | gray | worst | seconds |")
    assert "| pgd-at:attack_steps=1 | 1 |" in table
    assert "20 test images, linf 0.2" in table
    assert "| fdml over | seed 0 | mean |" in table
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    teachers = {path.stat().st_mtime_ns for path in tmp_path.glob("teacher-0/teacher.safetensors")}
    assert len(teachers) == 1
    students = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/student.safetensors")}
    assert len(students) == 2
    code, again, err = call(*words, *rows)
    assert (code, json.loads(again)) == (0, found)
    assert students == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/student.safetensors")}
    code, shown, _ = call(*(word for word in words if word != "--json"), *rows)
    assert code == 0
    assert "lead of fdml in the worst case" in " ".join(shown.split())
    code, _, err = call(*words, "--row", "fdml", "--set", "eps=0.1")
    assert code == 2
    assert "holds a run of other settings" in err


def test_a_row_may_have_a_teacher_of_its_own(tmp_path: Path) -> None:
    rows = ("--row", "fdml", "--row", "fdml:teacher_lr=0.05", "--row", "fdml:fd_layers=stage2,stage3,ml=1")
    words = ("reproduce", "digits", "--smoke", "--out", tmp_path, "--json", "--device", "cpu")
    code, out, err = call(*words, *rows)
    assert code == 0, err
    assert json.loads(out)[2]["recipe"]["fd_layers"] == "stage2,stage3"
    teachers = {path.parent.name: path.read_bytes() for path in tmp_path.glob("*/teacher.safetensors")}
    shared = teachers["teacher-0"]
    assert teachers["fdml-0"] == shared
    assert teachers["fdml-fd_layers=stage2-stage3-ml=1-0"] == shared
    assert teachers["fdml-teacher_lr=0.05-0"] != shared
    code, _, err = call(*words, "--row", "ml", "--set", "teacher_lr=0.05")
    assert code == 2
    assert "lr=0.1, not 0.05: resume it as it was, or name another folder with --out" in " ".join(err.split())


def test_a_robust_teacher_learns_for_as_long_as_its_student() -> None:
    table = replace(TABLES["fashion-mnist"], keys=("epochs=4", "teacher_epochs=3"))
    assert tables._recipe("rslad", table).teacher().epochs == 4
    assert tables._recipe("rslad:epochs=5", table).teacher().epochs == 5
    assert tables._recipe("rslad:teacher_epochs=6", table).teacher().epochs == 6
    assert tables._recipe("rslad:teacher-epochs=6", table).teacher().epochs == 6
    assert tables._recipe("fdml", table).teacher().epochs == 3


def test_choices_are_judged_on_validation_images_that_chose_no_epoch(tmp_path: Path) -> None:
    words = ("reproduce", "digits", "--smoke", "--row", "pgd-at", "--out", tmp_path, "--json", "--device", "cpu")
    code, out, err = call(*words, "--split", "val", "--limit", "9")
    assert code == 0, err
    (found,) = json.loads(out)
    assert (found["split"], found["n"]) == ("val", 9)
    assert "9 validation images" in (tmp_path / "table.md").read_text(encoding="utf-8")
    code, _, err = call(*words)
    assert code == 2
    assert "holds a run of other settings" in err
    table, data = replace(TABLES["digits"], split="val", limit=9), load("digits")
    assert tables._judges(table, replace(recipe("fdml", "digits"), val_limit=40), data) == range(40, 49)


def test_tables_are_listed() -> None:
    code, out, _ = call("reproduce", "--json")
    assert code == 0
    assert set(json.loads(out)) == set(TABLES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "imagenet"}, "unknown table 'imagenet'"),
        ({"name": "digits", "rows": ["magic"]}, "unknown recipe 'magic'"),
        ({"name": "digits", "rows": ["fdml:epoch=3"]}, "epoch"),
        ({"name": "digits", "split": "train"}, "unknown split 'train'"),
        ({"name": "digits", "split": "val", "keys": ["val_limit=1000"]}, "144 validation images choose the epoch"),
        ({"name": "digits", "keys": ["eps=8"]}, "eps 8 is larger than the whole pixel range"),
    ],
)
def test_what_cannot_be_run_is_refused_first(arguments: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        reproduce(**arguments, out=tmp_path, small=True)
    assert not list(tmp_path.iterdir())


OUTCOME = Outcome(
    "fdml", 0, 100, "linf 0.1", {"clean": 0.8, "pgd20": 0.5, "gray mi-fgsm": 0.7}, 0.5, 0.7, None, 0.5, 10.0, {},
    "a machine", {"torch": "2"}, "2026-11-26",
)  # fmt: skip


def test_means_and_deviations_are_over_the_seeds() -> None:
    text = markdown(
        [OUTCOME, replace(OUTCOME, seed=1, worst=0.54, seconds=20.0), replace(OUTCOME, row="pgd-at", seconds=None)]
    )
    assert "| fdml | 2 | 80.0 ± 0.0 | 50.0 ± 0.0 | 70.0 ± 0.0 | 52.0 ± 2.8 | 15 |" in text
    assert "| pgd-at | 1 | 80.0 | 50.0 | 70.0 | 50.0 | - |" in text


def test_leads_are_of_one_seed_over_the_same_seed() -> None:
    text = leads(
        [
            OUTCOME,
            replace(OUTCOME, seed=1, worst=0.54),
            replace(OUTCOME, row="trades", worst=0.2),
            replace(OUTCOME, row="mart", worst=0.51),
            replace(OUTCOME, row="mart", seed=1, worst=0.51),
            replace(OUTCOME, row="alp", seed=2),
        ],
        "fdml",
    )
    assert text.splitlines()[:4] == [
        "| fdml over | seed 0 | seed 1 | mean |",
        "| - | - | - | - |",
        "| mart | -1.0 | +3.0 | +1.0 ± 2.0 |",
        "| trades | +30.0 | - | +30.0 |",
    ]
    assert "alp" not in text
    assert leads([OUTCOME], "fdml") == leads([OUTCOME], "pgd-at") == ""


def test_what_is_shown_fits_a_terminal() -> None:
    long = replace(OUTCOME, row="fdml:base=mart,beta=5,one_pass=true", worst=0.4)
    outcomes = [replace(each, seed=seed) for seed in (0, 1) for each in (OUTCOME, long)]
    shown = StringIO()
    Console(width=80, file=shown).print(summary(outcomes, "fdml"))
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.split() == ["fdml", "80.0", "±", "0.0", "70.0", "-", "50.0", "50.0", "±", "0.0"] for line in lines)
    assert any("40.0 ± 0.0  +10.0 ± 0.0" in line for line in lines)
    assert any("fdml:base=mart,b" in line for line in lines)


def test_commands_side_by_side_share_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another command is at comes last, and is waited for."""
    other = FileLock(tmp_path / "fdml-0.lock", thread_local=False)
    other.acquire()
    order = []

    def one(row: str, *_: object) -> Outcome:
        order.append(row)
        other.release()
        return replace(OUTCOME, row=row)

    monkeypatch.setattr(tables, "_one", one)
    found = reproduce("digits", tmp_path, rows=["fdml", "pgd-at"], small=True)
    assert order == ["pgd-at", "fdml"]
    assert [each.row for each in found] == ["fdml", "pgd-at"]
    assert [each["row"] for each in json.loads((tmp_path / "results.json").read_text())] == ["fdml", "pgd-at"]


@pytest.mark.parametrize(
    ("code", "why"), [(INTERRUPTED, "give the same command again"), (1, "the loss term ce is not finite")]
)
def test_what_stops_a_table_says_where(code: int, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one(*_: object) -> Outcome:
        raise Stopped("the loss term ce is not finite", code)

    monkeypatch.setattr(tables, "_one", one)
    with pytest.raises(Stopped, match=f"stopped at pgd-at, seed 0; what is done is kept: {why}") as stopped:
        reproduce("digits", tmp_path, rows=["pgd-at"], small=True)
    assert stopped.value.code == code


def test_a_run_from_before_a_key_is_taken(tmp_path: Path) -> None:
    table = smoke(TABLES["digits"])
    data = load("digits")
    chosen = replace(recipe("fdml", "digits"), seed=3)
    old = {name: value for name, value in chosen.to_dict().items() if name != "accumulate"}
    folder = tmp_path / "fdml-eps=0.2-3"
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(asdict(replace(OUTCOME, row="fdml:eps=0.2", recipe=old, n=20))))
    kept = tables._kept("fdml:eps=0.2", 3, chosen, table, data, tmp_path)
    assert kept is not None
    assert kept.recipe == chosen.to_dict()
    with pytest.raises(InputError, match="holds a run of other settings"):
        tables._kept("fdml:eps=0.2", 3, replace(chosen, accumulate=2), table, data, tmp_path)


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "join", lambda device: World(0, 2, torch.device("cpu")))
    with pytest.raises(InputError, match="start it without torchrun"):
        reproduce("digits", tmp_path, small=True)
