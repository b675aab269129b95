"""`fdml attack`, `fdml attacks` and `fdml evaluate` as commands, on a small model and pictures of the digits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import fdml
from fdml import data
from fdml.attacks import ATTACKS
from fdml.card import Card
from fdml.craft import craft, whole_levels
from fdml.errors import InputError
from fdml.models import build
from fdml.threat import Threat

DIGITS = data.load("digits")
THREAT = Threat("linf", 0.2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that saw clean digits alone, for a second: it is easily fooled."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("craft") / "model.safetensors"
    network = build("cnn", input=(1, 8, 8), classes=10, mean=(0.3,), std=(0.37,), options={"width": 4})
    images = DIGITS.train.head(len(DIGITS.train)).all()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for index in torch.randperm(len(images.y)).split(32):
        optimizer.zero_grad()
        F.cross_entropy(network(images.x[index]), images.y[index]).backward()
        optimizer.step()
    card = Card(
        architecture="cnn",
        options={"width": 4},
        classes=DIGITS.classes,
        input=(1, 8, 8),
        mean=(0.3,),
        std=(0.37,),
        threat={"norm": "linf", "eps": 0.2},
        role="student",
        recipe={"name": "pgd-at"},
        seed=0,
        data={"name": "digits", "fingerprint": DIGITS.fingerprint},
        metrics={},
        versions={},
    )
    fdml.save(network.eval(), card, path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"digit{place}.png" for place in range(3)]
    for place, path in enumerate(paths):
        Image.fromarray(DIGITS.test.head(3).images[place, 0].numpy()).save(path)
    return paths


@pytest.fixture(scope="module")
def guides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guides") / "guides.npz"
    few = DIGITS.train.head(40)
    np.savez(path, x=few.images[:, 0].numpy(), y=few.labels.numpy())
    return path


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image, dtype=np.float64) / 255


@pytest.mark.parametrize("attack", ["fgsm", "pgd20", "fast"])
def test_what_is_written_fools_the_model_inside_the_threat(
    attack: str, model: Path, pictures: list[Path], tmp_path: Path
) -> None:
    found = craft(model, pictures, THREAT, tmp_path, attack=attack)
    network = fdml.load(model)
    assert any(one.fooled for one in found)
    for one, path in zip(found, pictures, strict=True):
        adversarial = pixels(one.file)
        assert np.abs(adversarial - pixels(str(path))).max() <= 0.2 + 1e-9
        with torch.no_grad():
            answer = network(torch.tensor(adversarial, dtype=torch.float32)[None, None]).argmax(1)
        assert DIGITS.classes[int(answer)] == one.after
        assert one.fooled == (one.after != one.label)
        assert one.before == one.label
        with Image.open(one.picture) as compared:
            assert compared.width > 3 * compared.height - 30


def test_a_label_that_the_model_does_not_answer_is_fooled_already(
    model: Path, pictures: list[Path], tmp_path: Path
) -> None:
    answered = craft(model, pictures[:1], THREAT, tmp_path)[0].before
    other = next(name for name in DIGITS.classes if name != answered)
    one = craft(model, pictures[:1], THREAT, tmp_path, label=other)[0]
    assert one.fooled
    assert one.distance == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attack": "pgd2"}, "'pgd2'.*'pgd20'"),
        ({"attack": "feature+ce"}, "feature.*guides.*npz.*evaluate"),
        ({"attack": "pgd20", "guides": Path("guides.npz")}, "'pgd20' takes no guides.*feature-all"),
        ({"attack": "feature+ce", "guides": Path("none.npz")}, "none.npz: no such file"),
        ({"label": "11"}, "class '11'"),
        ({"attack": "pgd20", "target": "11"}, "class '11'"),
        ({"attack": "pgd20", "label": "3", "target": "3"}, "digit0.png is labelled '3' already"),
        ({"attack": "apgd-ce", "target": "3"}, "cannot be aimed"),
        ({"attack": "fgsm", "steps": 3}, "takes no steps"),
        ({"attack": "pgd20", "steps": 0}, "got 0"),
        ({"attack": "autoattack", "steps": 3}, "'autoattack' is a cascade.*fab-t"),
        ({"attack": "fast", "target": "3"}, "'fast' is a cascade"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str, model: Path, pictures: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        craft(model, pictures, THREAT, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_a_target_that_is_the_answer_is_refused(model: Path, pictures: list[Path], tmp_path: Path) -> None:
    answered = craft(model, pictures[1:], THREAT, tmp_path)[1].before
    with pytest.raises(InputError, match=f"digit[12].png is answered '{answered}' already"):
        craft(model, pictures[1:], THREAT, tmp_path, attack="pgd20", target=answered)


def test_the_target_is_answered_after_enough_steps(model: Path, pictures: list[Path], tmp_path: Path) -> None:
    threat = Threat("linf", 0.5)
    (clean,) = craft(model, pictures[:1], threat, tmp_path, attack="pgd20", steps=1)
    for target in [name for name in DIGITS.classes if name != clean.before][:3]:
        (one,) = craft(model, pictures[:1], threat, tmp_path, attack="pgd20", steps=40, target=target)
        assert one.after == target
        assert one.fooled


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((2, 9, 8), np.uint8), "y": np.arange(2)}, r"guides.npz: guides are \(1, 9, 8\).*\(1, 8, 8\)"),
        ({"x": np.zeros((2, 8, 8), np.uint8), "y": np.array([0, 10])}, "guides.npz: label 10 .*from 0 to 9"),
    ],
)
def test_guides_that_are_not_the_models(
    arrays: dict[str, np.ndarray], message: str, model: Path, pictures: list[Path], tmp_path: Path
) -> None:
    np.savez(tmp_path / "guides.npz", **arrays)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=message):
        craft(model, pictures, THREAT, tmp_path / "out", attack="metric", guides=tmp_path / "guides.npz")


def test_guides_come_in_the_order_of_the_file(
    model: Path, pictures: list[Path], guides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def attack(model: Any, x: torch.Tensor, *_: object, **options: Any) -> torch.Tensor:
        given.update(options)
        return x

    monkeypatch.setitem(ATTACKS, "metric", attack)
    craft(model, pictures, THREAT, tmp_path, attack="metric", guides=guides)
    few = DIGITS.train.head(40).all()
    assert torch.equal(given["guides"], few.x)
    assert torch.equal(given["guide_y"], few.y)


def test_rounding_keeps_what_fools_inside_the_threat() -> None:
    def bright(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.zeros(len(x)), x.flatten(1).mean(1) - 100.5 / 255], 1)

    x, y = torch.full((3, 1, 8, 8), 100 / 255), torch.zeros(3, dtype=torch.int64)
    x_adv = torch.tensor([100.3, 100.7, 102.6])[:, None, None, None].expand_as(x) / 255
    for eps, levels in ((3, [100, 101, 102]), (0.8, [100, 100, 102])):
        kept = whole_levels(bright, x, x_adv, y, Threat("linf", eps / 255))
        torch.testing.assert_close(kept[:, 0, 0, 0] * 255, torch.tensor(levels, dtype=torch.float32))


def test_two_images_of_one_name_are_refused(model: Path, pictures: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="digit0"):
        craft(model, [pictures[0], pictures[0]], THREAT, tmp_path)


# The commands


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    from fdml.cli import main

    monkeypatch.setattr("sys.argv", ["fdml", *map(str, words)])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_the_commands(
    model: Path,
    pictures: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*words: object) -> tuple[int, str, str]:
        return call(monkeypatch, capsys, *words)

    code, out, _ = run("attacks", "--json")
    assert code == 0
    assert {"autoattack", "fast", "pgd20", "square"} <= set(json.loads(out))

    code, out, _ = run("attack", model, pictures[0], "--out", tmp_path / "a", "--json")
    assert code == 0
    assert json.loads(out)[0]["image"] == str(pictures[0])
    code, out, _ = run("attack", model, pictures[0], "--out", tmp_path / "a", "--eps", "8/255")
    assert "linf 8/255" in out

    words = ("evaluate", model, "--attack", "fgsm", "--limit", "20", "--out", tmp_path / "e")
    code, out, _ = run(*words)
    assert code == 0
    assert "FGSM" in out
    assert "report.html" in out
    code, _, err = run(*words)
    assert (code, err.count("\n")) == (2, 1)
    assert "--resume" in err
    code, out, _ = run(*words, "--resume", "--json")
    assert json.loads(out)["data"]["n"] == 20

    for words, said in (
        (("evaluate", model, "--eps", "8"), "8/255"),
        (("evaluate", model, "--norm", "l2"), "--eps"),
        (("evaluate", tmp_path / "none.safetensors"), "none.safetensors"),
        (("evaluate", pictures[0], "--data", "digits"), "no model"),
        (("evaluate", model, "--surrogate", "teacher"), "NAME=FILE"),
        (("evaluate", model, "--resume", "--overwrite"), "exclude"),
        (("attack", model, tmp_path / "none.png"), "none.png"),
    ):
        code, out, err = run(*words)
        assert (code, out, err.count("\n")) == (2, "", 1), (words, err)
        assert said in err


def test_an_attack_of_ones_own_as_a_command(
    model: Path,
    pictures: list[Path],
    guides: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(out: str, *words: object) -> tuple[int, str, str]:
        return call(monkeypatch, capsys, "attack", model, *words, "--out", tmp_path / out, "--json")

    shown = json.loads(run("clean", pictures[0], "--attack", "fgsm")[1])[0]["before"]
    target = next(name for name in DIGITS.classes if name != shown)
    for number, words in enumerate(
        (
            (pictures[0], "--attack", "pgd20", "--steps", 7, "--label", shown, "--target", target, "--seed", 3),
            (pictures[0], "--attack", "square", "--steps", 40),
            (*pictures, "--attack", "feature+ce", "--steps", 5, "--guides", guides),
        )
    ):
        files = []
        for again in "ab":
            code, out, err = run(f"{number}{again}", *words)
            assert (code, err) == (0, "")
            files.append([Path(one[key]).read_bytes() for one in json.loads(out) for key in ("file", "picture")])
        assert files[0] == files[1]

    for words, said in (
        (("--attack", "feature+ce"), "give guides"),
        (("--attack", "pgd20", "--guides", guides), "no guides"),
        (("--attack", "fgsm", "--steps", 2), "takes no steps"),
        (("--attack", "pgd20", "--label", shown, "--target", shown), "another class"),
        (("--attack", "square", "--target", target), "pgd20"),
    ):
        code, out, err = run("none", pictures[0], *words)
        assert (code, out, err.count("\n")) == (2, "", 1), (words, err)
        assert said in err
    code, _, err = run("none", pictures[0], "--steps", 0)
    assert code == 2
    assert "--steps" in err
    assert not (tmp_path / "none").exists()
