"""The run folder: who may begin in it, what a resumed run finds, and files that a kill or a stranger left."""

import json
from pathlib import Path

import pytest

from fdml.errors import InputError
from fdml.recipe import Recipe
from fdml.run import Run

RECIPE = Recipe(name="fdml", eps=0.2, width=4)
DATA = {"name": "digits", "fingerprint": "00ff"}


def begun(path: Path) -> Run:
    run = Run(path)
    run.begin(RECIPE, DATA, resume=False, overwrite=False)
    return run


def row(role: str, epoch: int) -> dict:
    return {"role": role, "epoch": epoch, "loss": 0.1 + epoch, "lr": 1e-17}


def refused(run: Run, message: str, *, recipe: Recipe = RECIPE, resume: bool = True) -> None:
    with pytest.raises(InputError, match=message) as caught:
        run.begin(recipe, DATA, resume=resume, overwrite=False)
    assert str(run.path) in str(caught.value)
    assert "\n" not in str(caught.value)


# Who may begin


@pytest.mark.parametrize("resume", [False, True])
def test_a_new_folder_is_begun(resume: bool, tmp_path: Path) -> None:
    run = Run(tmp_path / "runs" / "new")
    run.begin(RECIPE, DATA, resume=resume, overwrite=False)
    assert run.recipe() == RECIPE
    assert run.data() == "digits"
    assert run.rows() == []
    assert run.summary() is None


def test_files_of_others_are_no_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    begun(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    before = begun(tmp_path).path.joinpath("recipe.json").read_bytes()
    refused(Run(tmp_path), r"already holds a run \(recipe\.json\).*--resume.*--overwrite.*--out", resume=False)
    assert (tmp_path / "recipe.json").read_bytes() == before


@pytest.mark.parametrize("name", ["student.safetensors", "metrics.jsonl", "state"])
def test_a_part_of_a_run_is_a_run(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    refused(Run(tmp_path), f"already holds a run \\({name}\\)", resume=False)
    refused(Run(tmp_path), r"recipe\.json is missing.*--overwrite")


def test_a_run_is_resumed_as_it_was_begun(tmp_path: Path) -> None:
    run = begun(tmp_path)
    before = (tmp_path / "recipe.json").stat().st_mtime_ns
    run.begin(RECIPE, DATA, resume=True, overwrite=False)
    assert (tmp_path / "recipe.json").stat().st_mtime_ns == before
    other = Recipe(name="fdml", eps=0.3, width=4)
    refused(run, "begun with recipe eps=0.2, not 0.3.* name another folder with --out", recipe=other)
    refused(run, "begun with recipe width=4, not None", recipe=Recipe(name="fdml", eps=0.2))
    with pytest.raises(InputError, match="begun with data fingerprint='00ff', not '01'"):
        run.begin(RECIPE, DATA | {"fingerprint": "01"}, resume=True, overwrite=False)


def test_overwrite_removes_the_run_and_nothing_else(tmp_path: Path) -> None:
    run = begun(tmp_path)
    run.add_row(row("student", 1))
    for path in (run.model("student"), run.model("student", "last"), run.model("teacher"), run.state("student")):
        path.parent.mkdir(exist_ok=True)
        path.write_text("old")
    run.report.mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    other = Recipe(name="trades")
    run.begin(other, DATA, resume=False, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "recipe.json"]
    assert run.recipe() == other


def test_overwriting_nothing_begins(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.begin(RECIPE, DATA, resume=False, overwrite=True)
    assert run.recipe() == RECIPE


# What stands in recipe.json


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"recipe"',
        b"\xff\xfe",
        b'{"recipe": [], "data": {}}',
        b'{"recipe": {}}',
        b'{"recipe": {}, "data": "digits"}',
        b"[" * 100_000,
        b'{"recipe": {"seed": ' + b"9" * 10_000 + b'}, "data": {}}',
    ],
    ids=lambda content: repr(content[:20]),
)
def test_a_recipe_that_cannot_be_read(content: bytes, tmp_path: Path) -> None:
    run = begun(tmp_path)
    (tmp_path / "recipe.json").write_bytes(content)
    refused(run, r"recipe\.json")
    with pytest.raises(InputError, match=r"recipe\.json"):
        run.recipe()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": 1}, "unknown recipe key 'epoch': did you mean 'epochs'"),
        ({"evil\nkey": 1}, r"unknown recipe key 'evil\\nkey'"),
        ({"epochs": "3"}, "epochs"),
        ({"epochs": -1}, "epochs=-1 is out of range"),
        ({"eps": float("inf")}, "eps=inf is out of range"),
        ({"base": "cee"}, "cee.*ce"),
        ({"name": None}, "name"),
    ],
)
def test_a_recipe_that_is_none(change: dict, message: str, tmp_path: Path) -> None:
    run = begun(tmp_path)
    (tmp_path / "recipe.json").write_text(json.dumps({"recipe": RECIPE.to_dict() | change, "data": DATA}))
    with pytest.raises(InputError, match=message) as caught:
        run.recipe()
    assert str(caught.value).startswith(f"{tmp_path}/recipe.json: ")
    assert "\n" not in str(caught.value)


def test_a_folder_in_the_place_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").mkdir()
    refused(Run(tmp_path), r"recipe\.json: Is a directory")


# metrics.jsonl


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    run = begun(tmp_path)
    rows = [row("teacher", 1), row("student", 1), row("student", 2)]
    for each in rows:
        run.add_row(each)
    assert run.rows() == rows


def test_rows_beyond_the_last_state_are_dropped(tmp_path: Path) -> None:
    run = begun(tmp_path)
    run.keep_rows("teacher", 0)  # nothing was written yet
    for each in (row("teacher", 1), row("teacher", 2), row("student", 1), row("student", 2), row("student", 3)):
        run.add_row(each)
    run.keep_rows("student", 2)
    assert run.rows() == [row("teacher", 1), row("teacher", 2), row("student", 1), row("student", 2)]
    run.keep_rows("student", 0)
    assert run.rows() == [row("teacher", 1), row("teacher", 2)]
    run.keep_rows("teacher", 2)
    assert run.metrics.read_text().count("\n") == 2


@pytest.mark.parametrize("left", [1, 15, 40])
def test_a_kill_in_the_middle_of_a_line_is_forgotten(left: int, tmp_path: Path) -> None:
    run = begun(tmp_path)
    run.add_row(row("student", 1))
    with run.metrics.open("a") as file:
        file.write(json.dumps(row("student", 2))[:left])
    assert run.rows() == [row("student", 1)]
    run.keep_rows("student", 1)
    run.add_row(row("student", 2))
    assert run.rows() == [row("student", 1), row("student", 2)]


def test_a_last_line_without_its_end_is_whole_all_the_same(tmp_path: Path) -> None:
    run = begun(tmp_path)
    run.metrics.write_text(json.dumps(row("student", 1)))
    assert run.rows() == [row("student", 1)]


@pytest.mark.parametrize(
    "line", ["{", "[]", "{}", '{"role": "student"}', '{"role": 1, "epoch": 1}', '{"role": "a", "epoch": "1"}', ""]
)
def test_a_line_that_is_none(line: str, tmp_path: Path) -> None:
    run = begun(tmp_path)
    run.metrics.write_text(f"{json.dumps(row('student', 1))}\n{line}\n{json.dumps(row('student', 2))}\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl: line 2 .*--overwrite"):
        run.rows()


def test_metrics_that_are_no_text(tmp_path: Path) -> None:
    run = begun(tmp_path)
    run.metrics.write_bytes(b"\xff\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl"):
        run.rows()


def test_metrics_that_cannot_be_written(tmp_path: Path) -> None:
    run = begun(tmp_path)
    run.metrics.mkdir()
    with pytest.raises(InputError, match=r"cannot write .*metrics\.jsonl: Is a directory"):
        run.add_row(row("student", 1))


@pytest.mark.parametrize("content", ["", "{", "[]", "3"])
def test_a_summary_that_is_none(content: str, tmp_path: Path) -> None:
    run = begun(tmp_path)
    run.report.mkdir()
    (run.report / "summary.json").write_text(content)
    with pytest.raises(InputError, match=r"summary\.json"):
        run.summary()
