"""The command line as a user meets it: what is printed, the exit status, and one line for every mistake."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import safetensors.torch
import torch
from command_line import call
from PIL import Image

import fdml
from fdml.attacks import CLOSING
from fdml.card import FORMAT, KEY, Card
from fdml.cli import app, main
from fdml.data import CATALOGUE
from fdml.recipes import RECIPES

ROOT = Path(__file__).parents[1]
TINY = {"width": 4, "epochs": 2, "teacher_epochs": 1, "attack_steps": 2, "val_steps": 2} | {
    "test_limit": 20,
    "val_limit": 40,
}
COMMANDS = [command.callback.__name__ for command in app.registered_commands if command.callback]


def succeeds(*words: object) -> str:
    code, out, err = call(*words)
    assert (code, err) == (0, "")
    return out


def fails(*words: object) -> str:
    """The one line that a mistake gets."""
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("fdml: ")
    return err.removeprefix("fdml: ").rstrip("\n")


def sets(changes: dict) -> list[str]:
    return [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module", autouse=True)
def few_attacks() -> Iterator[None]:
    with patch("fdml.report.CLOSING", {name: CLOSING[name] for name in ("fgsm", "pgd20")}):
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with what the command printed beside it."""
    out = tmp_path_factory.mktemp("cli") / "run"
    printed = succeeds("train", *sets(TINY), "--out", out, "--json")
    (out.parent / "stdout").write_text(printed)
    return out


@pytest.fixture(scope="module")
def student(run: Path) -> Path:
    return run / "student.safetensors"


def image(path: Path, width: int = 8, height: int = 8, mode: str = "L") -> Path:
    shape = (height, width) if mode == "L" else (height, width, 3)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8), mode).save(path)
    return path


def joined(table: str) -> str:
    """The first column of a table, whose long names are folded, in one piece."""
    return "".join(line.split("│")[1].strip() for line in table.splitlines() if "│" in line)


# Finding one's way


def test_nothing_asked_is_answered_with_help() -> None:
    code, out, err = call()
    assert code in (0, 2)  # typer's own choice changed
    assert "Usage: fdml" in out + err
    for command in COMMANDS:
        assert command in out + err


def test_the_version() -> None:
    assert succeeds("--version") == f"fdml {fdml.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_command_has_help_with_an_example(command: str, flag: str) -> None:
    out = succeeds(command, flag)
    assert f"Usage: fdml {command}" in out
    example = out.partition("Example")[2]
    assert "fdml " in example


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_speaks_to_machines(command: str) -> None:
    (registered,) = [c for c in app.registered_commands if c.callback and c.callback.__name__ == command]
    assert registered.callback is not None
    assert "as_json" in registered.callback.__annotations__


@pytest.mark.parametrize(
    ("words", "near"),
    [(["trian"], "train"), (["train", "--sett", "eps=0.1"], "--set"), (["predict", "a", "b", "--top", "0"], "--top")],
    ids=lambda words: " ".join(words),
)
def test_what_is_not_part_of_the_command_line(words: list[str], near: str) -> None:
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert near in err
    assert "Traceback" not in err


# Listings


def test_recipes() -> None:
    lines = succeeds("recipes").splitlines()
    assert [line.split()[0] for line in lines] == list(RECIPES)
    assert all(len(line.split()) > 1 for line in lines)
    assert json.loads(succeeds("recipes", "--json")).keys() == RECIPES.keys()


def test_one_recipe() -> None:
    lines = dict(line.split(maxsplit=1) for line in succeeds("recipes", "trades").splitlines())
    assert lines["base"] == "trades"
    assert lines.keys() == json.loads(succeeds("recipes", "trades", "--json")).keys()
    grey = json.loads(succeeds("recipes", "trades", "--data", "cifar10", "--json"))
    assert grey["eps"] == 8 / 255


def test_datasets() -> None:
    assert [line.split()[0] for line in succeeds("datasets").splitlines()] == list(CATALOGUE)
    assert json.loads(succeeds("datasets", "--json")) == CATALOGUE


# Training


def test_training_for_machines_prints_one_summary(run: Path) -> None:
    printed = (run.parent / "stdout").read_text()
    assert printed.count("\n") == 1
    summary = json.loads(printed)
    assert summary == json.loads((run / "report" / "summary.json").read_text())
    assert {"data", "n", "threat", "teacher", "student"} <= summary.keys()


def test_training_for_people_ends_with_the_table_and_the_file(tmp_path: Path) -> None:
    out = tmp_path / "run"
    shown = succeeds("train", "standard", *sets(TINY | {"epochs": 1}), "--out", out)
    for words in ("student epoch 1/1: validation clean", "worst of all", f"student: {out}/student.safetensors"):
        assert words in shown


def test_a_finished_run_is_resumed_without_being_described_again(run: Path) -> None:
    before = (run / "student.safetensors").stat().st_mtime_ns
    summary = json.loads(succeeds("train", "--out", run, "--resume", "--json"))
    assert summary["n"] == TINY["test_limit"]
    assert (run / "student.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fdlm"], "unknown recipe 'fdlm': did you mean 'fdml'?"),
        (["zzz"], "unknown recipe 'zzz': known: "),
        (["--data", "digit"], "unknown data set 'digit': did you mean 'digits'?"),
        (["--data", "fashion_mnist"], "unknown data set 'fashion_mnist': did you mean 'fashion-mnist'?"),
        (["--set", "epoch=3"], "unknown recipe key 'epoch': did you mean 'epochs'?"),
        (["--set", "epochs"], "'epochs' is not an override: write key=value"),
        (["--set", "epochs=three"], "epochs='three': write a whole number"),
        (["--set", "epochs=0"], "epochs=0 is out of range: it must be between 1 and"),
        (["--set", "guidance=raamp"], "unknown value of guidance 'raamp': did you mean 'ramp'?"),
        (["--set", "norm=l3"], "unknown norm 'l3'"),
        (["--set", "eps=8"], "8/255"),
        (["--set", "architecture=resnet81"], "unknown architecture 'resnet81': did you mean 'resnet18'?"),
        (["--set", "fd_layers=stage9", "--set", "fd=1"], "unknown layer in fd_layers 'stage9'"),
        (["--set", "augment=flap"], "'flap': did you mean 'flip'?"),
        (["--set", "batch_size=5000"], "batch_size=5000 does not fit"),
        (["--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
        (["--device", "toaster"], "device 'toaster' cannot be used"),
        (["--size", "16"], "size 16 applies to folder: and hf: data sets only"),
        (["--data", "folder:/nowhere/at/all"], "/nowhere/at/all"),
        (["--data", "npz:/nowhere.npz"], "/nowhere.npz"),
        (["--teacher", "/nowhere.safetensors"], "/nowhere.safetensors: no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_in_training(words: list[str], message: str, tmp_path: Path) -> None:
    assert message in fails("train", *sets(TINY), *words, "--out", tmp_path / "run", "--json")


def test_a_folder_that_holds_a_run(run: Path) -> None:
    assert "--resume" in fails("train", *sets(TINY), "--out", run)
    assert "begun with recipe epochs=2, not 3" in fails("train", *sets(TINY | {"epochs": 3}), "--out", run, "--resume")
    assert "begun with data" in fails("train", "--data", "npz:" + npz(run.parent), "--out", run, "--resume")


def npz(folder: Path) -> str:
    path = folder / "few.npz"
    labels = np.arange(600) % 3
    x = np.random.default_rng(0).integers(0, 255, (600, 8, 8), dtype=np.uint8)
    np.savez(path, x_train=x[:500], y_train=labels[:500], x_test=x[500:], y_test=labels[500:])
    return str(path)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert f"cannot write {tmp_path}/file/run/recipe.json" in fails("train", "--out", tmp_path / "file" / "run")


def test_a_run_that_stops_says_how_to_go_on(tmp_path: Path) -> None:
    code, out, err = call("train", *sets(TINY | {"ml": 1e300}), "--out", tmp_path, "--json")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert "not finite" in err


# Predicting


def test_one_image(student: Path, tmp_path: Path) -> None:
    shown = succeeds("predict", student, image(tmp_path / "digit.png"))
    assert "digit.png" in joined(shown)
    assert "%" in shown


def test_several_images_for_machines(student: Path, tmp_path: Path) -> None:
    paths = [image(tmp_path / "a.png"), image(tmp_path / "b.bmp", 8, 8), image(tmp_path / "c.jpg", 40, 30, "RGB")]
    answers = json.loads(succeeds("predict", student, *paths, "--top", 3, "--json"))
    assert [answer["image"] for answer in answers] == [str(path) for path in paths]
    classes = fdml.read_card(student).classes
    for answer in answers:
        found = [each["probability"] for each in answer["top"]]
        assert len(found) == 3
        assert found == sorted(found, reverse=True)
        assert sum(found) <= 1 + 1e-5
        assert {each["class"] for each in answer["top"]} <= set(classes)
    # The same pixels, whatever they came in.
    assert answers[0]["top"] == answers[1]["top"]


def test_all_classes_sum_to_one(student: Path, tmp_path: Path) -> None:
    (answer,) = json.loads(succeeds("predict", student, image(tmp_path / "a.png"), "--top", 99, "--json"))
    assert sorted(each["class"] for each in answer["top"]) == sorted(fdml.read_card(student).classes)
    assert sum(each["probability"] for each in answer["top"]) == pytest.approx(1, abs=1e-5)


def test_the_answer_is_the_loaded_model_s(student: Path, tmp_path: Path) -> None:
    path = image(tmp_path / "a.png")
    (answer,) = json.loads(succeeds("predict", student, path, "--json"))
    x = torch.from_numpy(np.asarray(Image.open(path)).copy())[None, None].float() / 255
    with torch.no_grad():
        probability, index = fdml.load(student)(x).softmax(1).max(1)
    assert answer["top"][0]["class"] == fdml.read_card(student).classes[int(index)]
    assert answer["top"][0]["probability"] == pytest.approx(float(probability), abs=2e-6)


def test_names_are_printed_as_they_are(tmp_path: Path, student: Path) -> None:
    """Brackets are rich's markup; in a name they mean nothing."""
    card = replace(fdml.read_card(student), classes=tuple(f"[red]{i}[/red]" for i in range(10)))
    fdml.save(fdml.load(student), card, tmp_path / "model[b].safetensors")
    path = image(tmp_path / "[bold]a.png")
    shown = succeeds("predict", tmp_path / "model[b].safetensors", path)
    assert "[red]" in shown
    assert "[bold]a.png" in joined(shown)
    shown = succeeds("info", tmp_path / "model[b].safetensors")
    assert "[red]9[/red]" in shown
    assert "model[b]" in shown.replace("\n", "")  # the path of a test may be longer than a line


def test_mistakes_in_predicting(student: Path, tmp_path: Path) -> None:
    assert fails("predict", student, tmp_path / "none.png") == f"{tmp_path}/none.png: no such file"
    broken = tmp_path / "broken.png"
    broken.write_bytes(image(tmp_path / "a.png").read_bytes()[:60])
    assert f"{broken}: not a readable PNG" in fails("predict", student, tmp_path / "a.png", broken)
    assert "not a readable PNG" in fails("predict", student, student)
    assert "not a readable PNG" in fails("predict", student, tmp_path)
    assert "toaster" in fails("predict", student, tmp_path / "a.png", "--device", "toaster")


# Files that are no models, for every command that reads one


def absent(path: Path, _: Card) -> None:
    pass


def text(path: Path, _: Card) -> None:
    path.write_text("not a model")


def folder(path: Path, _: Card) -> None:
    path.mkdir()


def without_card(path: Path, _: Card) -> None:
    safetensors.torch.save_file({"a": torch.zeros(2)}, path)


def newer(path: Path, card: Card) -> None:
    content = json.loads(card.to_json()) | {"format": FORMAT + 1, "wing": 3}
    safetensors.torch.save_file({"a": torch.zeros(2)}, path, {KEY: json.dumps(content)})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (absent, "no such file"),
        (text, "is not a safetensors file"),
        (without_card, "has no fdml card"),
        (newer, "made by a newer fdml"),
    ],
)
@pytest.mark.parametrize("command", ["info", "predict", "train"])
def test_files_that_are_no_models(
    command: str, make: Callable[[Path, Card], None], message: str, student: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    make(path, fdml.read_card(student))
    words = {"info": [path], "predict": [path, "a.png"], "train": ["--teacher", path, "--out", tmp_path / "run"]}
    said = fails(command, *words[command])
    assert said.startswith(f"{path}: ")
    assert message in said


def test_a_folder_is_no_model(tmp_path: Path) -> None:
    assert "has no SHA256SUMS, so it is no bundle" in fails("predict", tmp_path, "a.png")
    assert "recipe.json is missing" in fails("info", tmp_path)


def test_a_model_whose_card_does_not_fit(student: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    fdml.save(fdml.load(student), replace(fdml.read_card(student), options={"width": 999}), path)
    assert "has shape" in fails("predict", path, image(tmp_path / "a.png"))


# Looking


def test_info_of_a_model(student: Path) -> None:
    shown = succeeds("info", student)
    for words in ("student", "cnn width=4", "1 x 8 x 8", "10: 0, 1, 2", "linf 0.2", "fdml, seed 0", "digits, finger"):
        assert words in shown
    found = json.loads(succeeds("info", student, "--json"))
    assert found["summary"] is None
    assert Card.from_json(json.dumps(found["card"])) == fdml.read_card(student)


def test_info_of_a_teacher(run: Path) -> None:
    assert "trained on clean images" in succeeds("info", run / "teacher.safetensors")


def test_info_of_a_run(run: Path) -> None:
    shown = succeeds("info", run)
    for words in ("student.safetensors", "cnn width=4", "worst of all"):
        assert words in shown
    found = json.loads(succeeds("info", run, "--json"))
    assert found["summary"]["n"] == TINY["test_limit"]
    assert found["card"]["role"] == "student"


def unfinished(run: Path, to: Path, lines: int) -> Path:
    to.mkdir()
    (to / "recipe.json").write_bytes((run / "recipe.json").read_bytes())
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (to / "metrics.jsonl").write_text("".join(rows[:lines]))
    return to


@pytest.mark.parametrize(("lines", "epochs"), [(0, 0), (1, 0), (2, 1)])
def test_info_of_a_run_that_is_not_finished(lines: int, epochs: int, run: Path, tmp_path: Path) -> None:
    said = fails("info", unfinished(run, tmp_path / "run", lines))
    assert f"the student is not finished ({epochs} of 2 epochs): fdml train --resume" in said


def test_info_of_a_run_whose_files_are_spoilt(run: Path, tmp_path: Path) -> None:
    out = unfinished(run, tmp_path / "run", 0)
    (out / "student.safetensors").write_bytes((run / "student.safetensors").read_bytes())
    (out / "report").mkdir()
    for content in ("{", "{}", '{"student": {}}', '{"data": 1, "n": 2, "threat": 3, "student": 4}'):
        (out / "report" / "summary.json").write_text(content)
        assert f"{out}/report/summary.json" in fails("info", out)
    (out / "recipe.json").write_text('{"recipe": {"epohcs": 3}, "data": {}}')
    assert "did you mean 'epochs'?" in fails("info", out)


# What is not installed


@pytest.mark.parametrize("command", ["train", "predict"])
def test_a_missing_torch_is_said_with_what_to_install(command: str, student: Path) -> None:
    words = {"train": [], "predict": [str(student), "a.png"]}[command]
    code = f"""
import sys
sys.modules["torch"] = None  # what an import system without torch answers
from fdml.cli import main
sys.argv = {["fdml", command, *words]}
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=student.parent, capture_output=True, text=True, timeout=60, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "fdml: this needs torch, which is not installed: pip install 'fdml[train]'\n"
    assert not (student.parent / "runs").exists()


def test_any_other_missing_part_is_said_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "needs sklearn, which is not installed: pip install 'fdml[train]'" in fails("train", "--out", tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'fdml[hub]'" in fails("train", "--data", "hf:mnist", "--out", tmp_path)


def test_a_missing_module_of_our_own_is_no_mistake_of_the_user_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fdml.recipes", None)
    monkeypatch.setattr(sys, "argv", ["fdml", "recipes"])
    with pytest.raises(ModuleNotFoundError):
        main()
