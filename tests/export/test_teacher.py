"""`fdml export --teacher`: the clean teacher beside its student."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from command_line import call

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import fdml
from fdml import RobustClassifier, bundle
from fdml.card import Card, read_card
from fdml.data import load
from fdml.errors import InputError, Stopped
from fdml.export import evidence
from fdml.export.command import Wish, export
from fdml.models import build
from fdml.suspicion import suspicion
from fdml.threat import Threat

DIGITS = load("digits")
THREAT = Threat("linf", 0.05)
WISH = Wish(teacher=True)


def pair(folder: Path, student: Path, change: Callable[[Card], Card] = lambda card: card) -> Path:
    """A run folder whose teacher is a network of other weights, on the student's card after ``change``."""
    folder.mkdir()
    shutil.copy(student, folder / "student.safetensors")
    card = change(replace(read_card(student), role="teacher", recipe={"name": "teacher"}))
    torch.manual_seed(1)
    model = build("cnn", input=card.input, classes=len(card.classes), mean=(0.3,), std=(0.37,), options=card.options)
    fdml.save(model.eval(), card, folder / "teacher.safetensors")
    return folder


@pytest.fixture(scope="module")
def run(noisy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pair(tmp_path_factory.mktemp("teachers") / "run", noisy)


def test_the_bundle_holds_the_teacher(run: Path, tmp_path: Path) -> None:
    found = export(run, DIGITS, tmp_path / "pair", THREAT, WISH, limit=20)
    written = bundle.read(tmp_path / "pair")
    assert "teacher.onnx" in written.files
    of = written.evidence["teacher"]
    assert of == found["teacher"]
    assert of["reason"] is None
    assert of["file"] == "teacher.safetensors"
    assert of["clean"]["largest"] < of["tolerance"] == 1e-4
    assert of["clean"]["agreement"] == 1
    clf = RobustClassifier.load(tmp_path / "pair", provider="cpu", threads=1)
    assert RobustClassifier.load(tmp_path / "pair" / "teacher.onnx").card == read_card(run / "teacher.safetensors")
    _, x, _ = DIGITS.test.head(20).all()
    with torch.no_grad():
        logits = [fdml.load(run / f"{role}.safetensors").eval()(x).numpy() for role in ("student", "teacher")]
    scores = clf.suspicion(x.numpy())
    assert np.allclose(scores, suspicion(*logits), atol=1e-4)
    assert of["suspicion"]["p95"] == pytest.approx(np.quantile(scores, 0.95), abs=1e-4)
    assert of["suspicion"]["median"] == pytest.approx(np.median(scores), abs=1e-4)


def test_the_teacher_stays_fp32(run: Path, tmp_path: Path) -> None:
    full = export(run, DIGITS, tmp_path / "full", THREAT, WISH, limit=8)
    half = export(run, DIGITS, tmp_path / "half", THREAT, Wish(precision="fp16", teacher=True), limit=8, force=True)
    assert half["teacher"]["clean"] == full["teacher"]["clean"]
    files = [bundle.read(tmp_path / name).files["teacher.onnx"] for name in ("full", "half")]
    assert files[0] == files[1]


def test_a_teacher_beyond_the_tolerance_stops_the_export(run: Path, tmp_path: Path) -> None:
    real = evidence.Parity.of

    def apart(before: torch.Tensor, after: torch.Tensor, places: torch.Tensor) -> evidence.Parity:
        return real(before, after + 1, places)

    with patch("fdml.export.teacher.Parity.of", apart):
        with patch("fdml.export.command.gather", return_value=whole()), pytest.raises(Stopped, match="the teacher's"):
            export(run, DIGITS, tmp_path / "none", THREAT, WISH, limit=4)
        assert list(tmp_path.iterdir()) == []


def whole() -> dict[str, object]:
    """Evidence of a network that passed."""
    parity = {"largest": 0.0, "agreement": 1.0}
    shares = {"source": 1.0, "artefact": 1.0}
    of = {"precision": "fp32", "images": 4, "threat": {"norm": "linf", "eps": 0.05}, "passed": True, "reason": None}
    return {**of, "clean": parity, "adversarial": parity, "accuracy": shares, "robust_accuracy": shares}


def test_what_has_no_fitting_teacher_is_refused(noisy: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "none"
    with pytest.raises(InputError, match="is a model by itself, which has no teacher"):
        export(run / "student.safetensors", DIGITS, out, THREAT, WISH)
    lonely = tmp_path / "lonely"
    lonely.mkdir()
    shutil.copy(noisy, lonely / "student.safetensors")
    with pytest.raises(InputError, match=r"has no teacher\.safetensors"):
        export(lonely, DIGITS, out, THREAT, WISH)
    for name, change in (
        ("fewer", lambda card: replace(card, classes=card.classes[:3])),
        ("renamed", lambda card: replace(card, classes=card.classes[::-1])),
        ("larger", lambda card: replace(card, input=(1, 9, 9))),
    ):
        with pytest.raises(InputError, match="needs the same of both") as refused:
            export(pair(tmp_path / name, noisy, change), DIGITS, out, THREAT, WISH)
        assert "\n" not in str(refused.value)
    assert not out.exists()


def test_the_command(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "pair"
    code, text, err = call("export", run, "--teacher", "--limit", 4, "--out", out, "--json")
    assert (code, err) == (0, "")
    assert json.loads(text)["teacher"]["reason"] is None
    code, text, _ = call("export", run, "--teacher", "--limit", 4, "--out", out, "--overwrite")
    assert code == 0
    assert "teacher: largest difference" in text
    code, _, err = call("export", run / "student.safetensors", "--teacher", "--out", tmp_path / "x")
    assert code == 2
    assert err.count("\n") == 1
