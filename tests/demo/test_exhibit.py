"""What the demo shows: the pairs that come with it, models of a visitor's own, and what evaluations said of them."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pairs import CLOTHES, DIGITS, named

from fdml.demo.choices import METHODS, NORMS, USUAL_STEPS, most_eps, usual_eps
from fdml.demo.exhibit import EACH, MAX_REPORT, SHIPPED, TITLES, Exhibit, chosen, opened
from fdml.demo.ship import ship, trimmed
from fdml.errors import InputError
from fdml.run import Run

ROOT = Path(__file__).parents[2]
TEACHER, STUDENT = (SHIPPED / "digits" / f"{role}.safetensors" for role in ("teacher", "student"))

both = pytest.mark.parametrize("exhibit", [CLOTHES, DIGITS], ids=lambda exhibit: exhibit.name)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder, as far as the demo looks into one."""
    folder = tmp_path / "run"
    folder.mkdir()
    for file in (TEACHER, STUDENT):
        shutil.copy(file, folder)
    (folder / "recipe.json").write_text('{"recipe": {}, "data": {"name": "digits"}}')
    return folder


# What is shipped


@both
def test_ten_pictures_of_each_class_are_shipped(exhibit: Exhibit) -> None:
    assert exhibit.title == TITLES[exhibit.name]
    assert [side.key for side in exhibit.sides] == ["clean", "defended"]
    assert exhibit.images.shape == (EACH * len(exhibit.classes), *exhibit.input)
    assert exhibit.images.dtype == np.uint8
    assert np.bincount(exhibit.labels).tolist() == [EACH] * len(exhibit.classes)


@both
def test_the_cards_say_that_the_project_trained_them(exhibit: Exhibit) -> None:
    clean, defended = (side.card for side in exhibit.sides)
    assert (clean.role, defended.role) == ("teacher", "student")
    assert (clean.recipe["name"], defended.recipe["name"]) == ("standard", "fdml")
    assert clean.data == defended.data
    assert clean.data["name"] == exhibit.name
    assert clean.threat is None
    assert defended.threat == {"norm": "linf", "eps": exhibit.eps}
    assert exhibit.sides[0].about == "trained on clean images"
    assert exhibit.sides[1].about == f"trained by fdml against linf {exhibit.eps:g}"


@both
def test_the_scores_are_those_of_the_shipped_files(exhibit: Exhibit) -> None:
    clean, defended = exhibit.scores
    assert clean["data"] == defended["data"] == exhibit.name
    assert (clean["norm"], clean["eps"]) == (exhibit.norm, exhibit.eps)
    assert clean["worst"] < 0.05 < 0.6 < defended["worst"] <= defended["square"]


def test_all_that_is_shipped_is_small() -> None:
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) < 3 << 20


@both
def test_a_shipped_report_says_nothing_of_single_images(exhibit: Exhibit) -> None:
    (path,) = exhibit.reports
    report = json.loads(path.read_text(encoding="utf-8"))
    assert trimmed(report) == report


def test_a_run_and_its_evaluation_make_what_is_shipped(run: Path, tmp_path: Path) -> None:
    ship(Run(run), SHIPPED / "digits", tmp_path / "out", None)
    for file in (TEACHER, STUDENT, SHIPPED / "digits" / "report.json"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    with np.load(tmp_path / "out" / "images.npz") as images:
        assert np.array_equal(images["x"], DIGITS.images)
        assert np.array_equal(images["y"], DIGITS.labels)


def test_the_page_is_drawn_before_torch_is_loaded() -> None:
    code = """
import sys
from fdml.demo import choices, draw, exhibit, page, visit, words
shown = exhibit.shipped()
visit.first(shown[0]), page.thumbs(shown[0], 0), page.leaderboard(shown), choices.most_eps("l2", shown[0])
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_the_first_of_each_class_are_chosen() -> None:
    labels = torch.arange(60).remainder(4)
    assert torch.equal(chosen(labels), torch.arange(4 * EACH))
    assert chosen(torch.tensor([2, 2, 0])).tolist() == [0, 1, 2]
    assert chosen(labels[:0]).tolist() == []


# What a visitor opens


def test_a_run_folder_is_a_pair_with_pictures_of_its_data(run: Path) -> None:
    (found,) = opened([run])
    assert (found.name, found.title) == ("run", "run")
    assert [(side.key, side.file.name) for side in found.sides] == [
        ("clean", "teacher.safetensors"),
        ("defended", "student.safetensors"),
    ]
    assert np.array_equal(found.images, DIGITS.images)
    assert np.array_equal(found.labels, DIGITS.labels)


def test_a_run_folder_without_a_teacher_shows_the_student(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / TEACHER.name).unlink()
    monkeypatch.chdir(run)
    (found,) = opened([Path()])
    assert found.name == "run"
    assert [side.key for side in found.sides] == ["defended"]


def test_one_file_is_shown_by_itself() -> None:
    (found,) = opened([TEACHER])
    (side,) = found.sides
    assert (side.key, side.name, side.about) == ("defended", "Defended model", "trained by standard against no threat")
    assert found.card.threat is None
    assert (found.norm, found.eps, found.sigma) == ("linf", 8 / 255, 8 / 255)
    assert found.title == "teacher"


def test_two_files_are_compared() -> None:
    (found,) = opened([STUDENT, TEACHER])
    assert [(side.key, side.file) for side in found.sides] == [("clean", STUDENT), ("defended", TEACHER)]
    assert found.sides[0].about == "trained by fdml against linf 0.2", "what it is called is not what its card says"
    assert found.title == "student and teacher"


def test_run_folders_and_files_are_exhibits_beside_each_other(run: Path) -> None:
    assert [found.name for found in opened([run, TEACHER, SHIPPED / "digits"])] == ["run", "digits", "teacher"]


def test_without_pictures_at_hand_there_are_none(tmp_path: Path) -> None:
    data = {"name": f"npz:{tmp_path / 'none.npz'}", "fingerprint": "0"}
    file = named(STUDENT, tmp_path / "model.safetensors", data=data)
    (found,) = opened([file])
    assert found.images.shape == (0, 1, 8, 8)
    assert len(found.labels) == 0
    assert np.array_equal(opened([file], data="digits")[0].images, DIGITS.images)


def test_pictures_are_taken_from_the_data_set_that_is_named(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (240, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", x_train=x, y_train=np.arange(240) % 10, x_test=x[:30], y_test=np.arange(30) // 3)
    (found,) = opened([STUDENT], data=f"npz:{tmp_path / 'own.npz'}")
    assert {image.tobytes() for image in found.images} == {image.tobytes() for image in x[:30]}
    np.savez(tmp_path / "more.npz", x=x, y=np.arange(240) % 12)
    with pytest.raises(InputError, match=r"more.npz are of 12 classes, the model knows 10"):
        opened([STUDENT], data=f"npz:{tmp_path / 'more.npz'}")


@pytest.mark.parametrize(
    ("paths", "options", "message"),
    [
        ([TEACHER, STUDENT, TEACHER], {}, "3 model files: give one, or two"),
        ([Path("model.onnx")], {}, "model.onnx gives no gradients.*safetensors"),
        ([SHIPPED], {}, "shipped is no run folder: it holds no student.safetensors"),
        ([Path("none.safetensors")], {}, "none.safetensors: no such file"),
        ([TEACHER, SHIPPED / "fashion-mnist" / STUDENT.name], {}, "differ in input or classes"),
        ([SHIPPED / "digits", SHIPPED / "digits"], {}, "two run folders are called 'digits'"),
        ([TEACHER], {"data": "digit"}, "unknown data set 'digit'.*'digits'"),
        ([SHIPPED / "fashion-mnist"], {"data": "digits"}, r"pictures of digits are \(1, 8, 8\).*\(1, 28, 28\)"),
    ],
)
def test_mistakes(paths: list[Path], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        opened(paths, **options)


# Reports


def of(digest: str, **more: Any) -> dict[str, Any]:
    share = {"accuracy": 0.5, "interval": [0.4, 0.6]}
    attacks = [{"name": "square", "source": None, **share}, {"name": "pgd100x5", "source": "teacher", **share}]
    found = {"name": "m", "sha256": digest, "clean": share, "worst": share, "attacks": attacks}
    return found | {"flags": [{"name": "masked"}], **more}


def report(*models: object) -> dict[str, Any]:
    data = {"name": "digits", "n": 360}
    return {"format": 1, "threat": {"norm": "linf", "eps": 0.2}, "data": data, "models": list(models)}


def test_scores_are_known_by_the_digest_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "report.json"
    path.write_text(json.dumps(report(of("0" * 64), of(DIGITS.side("defended").sha256))))
    shutil.copy(STUDENT, tmp_path / "other-name.safetensors")
    (found,) = opened([tmp_path / "other-name.safetensors"], [tmp_path / "a"])
    (row,) = found.scores
    assert (row["model"], row["recipe"], row["n"], row["flags"]) == ("Defended model", "fdml", 360, ["masked"])
    assert (row["square"], row["pgd100x5"], row["autoattack"]) == (0.5, None, None), "a transferred attack is no column"
    assert opened([TEACHER], [path])[0].scores == []


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, r"cannot be read \(No such file or directory\): give a folder that fdml evaluate wrote"),
        (lambda path: path.mkdir(), r"report.json cannot be read \(Is a directory\)"),
        (lambda path: path.write_text("{"), r"cannot be read \(not JSON\)"),
        (lambda path: path.write_text("[" * 100_000), r"cannot be read \(not JSON\)"),
        (lambda path: path.write_bytes(b"\xff"), r"cannot be read \(not JSON\)"),
        (lambda path: path.write_text("[]"), "no report of this version"),
        (lambda path: path.write_text('{"format": 2, "models": []}'), "no report of this version"),
        (lambda path: path.write_text('{"format": 1}'), "no report of this version"),
        (lambda path: path.write_text('{"format": 1, "models": [5]}'), "no report of this version"),
    ],
)
def test_a_report_that_cannot_be_read_is_refused(write: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    write(tmp_path / "report.json")
    with pytest.raises(InputError, match=message):
        opened([TEACHER], [tmp_path])


def test_a_report_that_lacks_what_is_shown_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    digest = DIGITS.side("clean").sha256
    for wrong in (of(digest, clean=None), of(digest, attacks=[{"name": "square"}]), {"sha256": digest}):
        path.write_text(json.dumps(report(wrong)))
        (found,) = opened([TEACHER], [path])
        with pytest.raises(InputError, match=r"report.json is no report of this version"):
            _ = found.scores


def test_a_report_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with path.open("wb") as file:
        file.truncate(MAX_REPORT + 1)
    with pytest.raises(InputError, match=r"report.json is larger than 64 MiB"):
        opened([TEACHER], [path])


# Names and ranges


def test_names_that_there_are_not_are_said_with_those_that_there_are() -> None:
    assert CLOTHES.class_index("Ankle boot") == 9
    with pytest.raises(InputError, match=r"unknown class 'boot': one of T-shirt/top, .*Ankle boot"):
        CLOTHES.class_index("boot")
    assert CLOTHES.side("clean") is CLOTHES.sides[0]
    with pytest.raises(InputError, match="no model 'teacher' here: 'clean' or 'defended'"):
        CLOTHES.side("teacher")


@pytest.mark.parametrize(
    ("threat", "sigma", "begins"),
    [
        ({"norm": "linf", "eps": 0.1}, 0.0, 0.1),
        ({"norm": "linf", "eps": 0.1}, 0.25, 0.25),
        ({"norm": "l2", "eps": 0.5}, 0, 0.25),
        ({"norm": "l2", "eps": 0.5}, "much", 0.25),
    ],
)
def test_certificates_begin_with_the_noise_of_the_training(threat: dict[str, Any], sigma: Any, begins: float) -> None:
    side = DIGITS.sides[1]
    side = replace(side, card=replace(side.card, threat=threat, recipe={"sigma": sigma}))
    assert replace(DIGITS, sides=(side,)).sigma == begins


def test_every_method_has_usual_steps_and_every_norm_an_eps() -> None:
    assert set(METHODS) == set(USUAL_STEPS)
    for exhibit in (CLOTHES, DIGITS):
        assert usual_eps(exhibit.norm, exhibit) == exhibit.eps
        sizes = [usual_eps(norm, exhibit) for norm in NORMS]
        assert sizes == sorted(sizes)
        assert all(usual_eps(norm, exhibit) < most_eps(norm, exhibit) for norm in NORMS)
    side = DIGITS.sides[1]
    wide = replace(side, card=replace(side.card, threat={"norm": "linf", "eps": 0.5}))
    assert most_eps("linf", replace(DIGITS, sides=(wide,))) == 1.0
    bound = replace(side, card=replace(side.card, threat={"norm": "l2", "eps": 2.0}))
    assert usual_eps("l2", replace(DIGITS, sides=(bound,))) == 2.0
    assert usual_eps("linf", replace(DIGITS, sides=(bound,))) == 0.1


def test_a_folder_that_is_not_there_is_said_not_to_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere does not exist: give a"):
        opened([tmp_path / "nowhere"])
