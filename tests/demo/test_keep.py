"""The example of a session as files, and the commands in it, which make it again byte for byte."""

import io
import json
import shlex
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import call
from pairs import DIGITS, LAB, LABS, PLACE, ask, attacked, named

from fdml.card import read_card
from fdml.demo.keep import packed
from fdml.demo.lab import Lab, Moment

NAMED = DIGITS.classes[DIGITS.labels[PLACE]]
CLOTHES = LABS["fashion-mnist"]


def example(lab: Lab, moment: Moment, folder: Path) -> dict[str, Any]:
    """What ``example.json`` of the example says, unpacked into ``folder``."""
    with zipfile.ZipFile(io.BytesIO(packed(lab, moment))) as archive:
        archive.extractall(folder)
    return json.loads((folder / "example.json").read_text(encoding="utf-8"))


def run_again(found: dict[str, Any]) -> None:
    """Runs the commands of an example in its folder, which is the current one, and compares what they give."""
    for run in found["runs"]:
        program, *words = shlex.split(run["command"])
        assert program == "fdml"
        status, out, err = call(*words, "--json")
        assert (status, err) == (0, "")
        (made,) = json.loads(out)
        assert (made["before"], made["after"]) == (run["before"]["class"], run["after"]["class"])
        assert made["label"] == run["label"]
        assert Path(made["file"]) == Path(run["gives"])
        assert Path(run["gives"]).read_bytes() == Path(run["equals"]).read_bytes()
        compared = run["equals"].replace("adversarial", "compared")
        assert Path(made["picture"]).read_bytes() == Path(compared).read_bytes()


@pytest.mark.parametrize(
    ("lab", "method", "options"),
    [
        (CLOTHES, "pgd-best", {"steps": 7, "target": 3, "eps": 0.3}),
        (CLOTHES, "fgsm", {"steps": 9, "norm": "l2", "eps": 1}),
        (CLOTHES, "cw", {"label": 9}),
        (LAB, "apgd-ce", {"steps": 15, "norm": "l1", "eps": 1.5, "seed": (1 << 31) - 1}),
        (LAB, "square1000", {"steps": 60, "seed": 3}),
        (LAB, "feature+ce", {"steps": 6, "whom": "defended"}),
        (LAB, "noise", {"steps": 10, "eps": 1 / 3}),
        (LAB, "pgd-best", {"label": 1}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_commands_make_the_example_again(
    lab: Lab, method: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = PLACE if lab is LAB else 0
    monkeypatch.chdir(tmp_path)
    run_again(example(lab, attacked(method, lab, place, **options), tmp_path))


def test_classes_of_one_name_are_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    side = DIGITS.sides[1]
    file = named(side.file, tmp_path / "even-odd.safetensors", classes=("even", "odd") * 5)
    lab = Lab(replace(DIGITS, sides=(replace(side, file=file, card=read_card(file)),)))
    monkeypatch.chdir(tmp_path)
    run_again(example(lab, attacked(lab=lab), tmp_path))


def test_what_an_example_says(tmp_path: Path) -> None:
    found = example(LAB, attacked("pgd-best", steps=5, seed=2), tmp_path)
    runs = found.pop("runs")
    versions = found.pop("fdml")
    assert versions
    assert found == {
        "format": 1,
        "exhibit": "digits",
        "attack": "pgd-best",
        "norm": "linf",
        "eps": 0.2,
        "steps": 5,
        "target": None,
        "whom": "each",
        "seed": 2,
        "state": "done",
        "reproducible": True,
    }
    assert [run["model"]["name"] for run in runs] == ["Clean model", "Defended model"]
    for run, side in zip(runs, DIGITS.sides, strict=True):
        assert run["model"]["sha256"] == side.sha256
        assert (tmp_path / run["model"]["file"]).read_bytes() == side.file.read_bytes()
        assert run["label"] == run["before"]["class"] == NAMED
        assert 0 < run["before"]["probability"] <= 1
    assert {path.name for path in tmp_path.iterdir()} == {
        "example.json", "clean.png", "clean.safetensors", "defended.safetensors", "adversarial-clean.png",
        "adversarial-defended.png", "compared-clean.png", "compared-defended.png",
    }  # fmt: skip


def test_only_the_model_that_was_attacked_is_kept_and_what_the_attack_needed(tmp_path: Path) -> None:
    (run,) = example(LAB, attacked("feature+ce", steps=2, whom="clean", label=1, target=None), tmp_path)["runs"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "example.json", "clean.png", "clean.safetensors", "adversarial-clean.png", "compared-clean.png", "guides.npz",
    }  # fmt: skip
    assert "--label 1 " in run["command"]


def test_an_example_that_was_stopped_is_not_called_reproducible(tmp_path: Path) -> None:
    found = example(LAB, replace(attacked(), state="stopped"), tmp_path)
    assert (found["state"], found["reproducible"]) == ("stopped", False)


def test_a_large_model_is_named_and_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fdml.demo.keep.MAX_MODEL", 1000)
    found = example(LAB, attacked(), tmp_path)
    assert [run["model"]["file"] for run in found["runs"]] == ["clean.safetensors", "defended.safetensors"]
    assert not list(tmp_path.glob("*.safetensors"))


def test_no_place_of_this_machine_is_in_an_example() -> None:
    (moment,) = LAB.attack(ask("feature+ce", steps=2))
    content = packed(LAB, moment)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        kept = [name.encode() + archive.read(name) for name in archive.namelist()]
    for side in DIGITS.sides:
        place = str(side.file.parent).encode()
        assert not any(place in each for each in [content, *kept])
    assert all(not Path(name).is_absolute() and ".." not in name for name in archive.namelist())
