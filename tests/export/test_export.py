"""`fdml export` and `fdml bench`: bundles that are whole, true and refused where they are not."""

import json
from pathlib import Path
from unittest.mock import patch

import pytest
from command_line import call

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from fdml import bundle
from fdml.data import load
from fdml.errors import Stopped
from fdml.export import command, evidence
from fdml.export.command import Wish, evidence_table, export
from fdml.threat import Threat

DIGITS = load("digits")
THREAT = Threat("linf", 0.05)


@pytest.fixture(scope="module")
def made(noisy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "one"
    found = export(noisy, DIGITS, out, THREAT, Wish(raw=True), limit=40)
    assert found["bundle"] == str(out)
    return out


def test_a_bundle_is_whole_and_passes(made: Path) -> None:
    assert {path.name for path in made.iterdir()} == {
        "SHA256SUMS",
        "card.json",
        "evidence.json",
        "model-raw.onnx",
        "model.onnx",
    }
    found = bundle.read(made)
    assert found.card.data["name"] == "digits"
    assert found.evidence["passed"] is True
    assert found.evidence["images"] == 40
    assert found.evidence["clean"]["largest"] < 1e-4
    assert found.evidence["clean"]["agreement"] == found.evidence["adversarial"]["agreement"] == 1
    assert {"model", "data", "opset", "versions", "threat", "robust_accuracy"} <= set(found.evidence)
    assert not [path for path in made.parent.iterdir() if path.name.startswith(".")], "nothing is left beside it"


def test_eight_bits_are_calibrated_and_judged(noisy: Path, tmp_path: Path) -> None:
    found = export(noisy, DIGITS, tmp_path / "int8", THREAT, Wish(precision="int8"), limit=60, force=True)
    assert found["precision"] == "int8"
    assert 1e-4 < found["clean"]["largest"] < 3
    written = bundle.read(tmp_path / "int8")
    assert written.evidence["passed"] == found["passed"]
    assert found["speedup"] > 0


def test_eight_bits_for_tensorrt_are_a_network_that_it_takes(noisy: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    wish = Wish(precision="int8", tensorrt="rtx", targets=("sm_89",))
    found = export(noisy, DIGITS, tmp_path / "int8", THREAT, wish, limit=20, force=True)
    assert [engine["precision"] for engine in found["engines"]] == ["int8"]
    bundle.read(tmp_path / "int8")


def test_a_precision_that_is_slower_here_is_said(made: Path) -> None:
    found = json.loads((made / "evidence.json").read_text())
    assert found["speedup"] is None, "nothing was reduced"
    for speedup, said in ((0.8, True), (1.5, False)):
        caption = evidence_table(found | {"precision": "int8", "speedup": speedup}).caption
        assert ("int8 is the slower" in str(caption)) == said


def test_evidence_that_fails_stops_the_export(noisy: Path, tmp_path: Path) -> None:
    out = tmp_path / "none"
    with patch.dict(evidence.TOLERANCE, {"fp32": 1e-12}):
        with pytest.raises(Stopped, match=r"differ by .* layer \w+ differs most.*nothing was written") as stopped:
            export(noisy, DIGITS, out, THREAT, Wish(), limit=16)
        assert stopped.value.code == 1
        assert list(tmp_path.iterdir()) == []
        found = export(noisy, DIGITS, out, THREAT, Wish(), limit=16, force=True)
    assert found["passed"] is False
    assert json.loads((out / "evidence.json").read_text())["passed"] is False


def test_a_failure_on_the_way_leaves_nothing(noisy: Path, tmp_path: Path) -> None:
    with patch.object(command, "write_sums", side_effect=OSError("no space")), pytest.raises(OSError, match="no space"):
        export(noisy, DIGITS, tmp_path / "none", THREAT, Wish(), limit=8)
    assert list(tmp_path.iterdir()) == []


def test_the_command_and_its_mistakes(noisy: Path, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    words = ["export", noisy, "--limit", 8, "--out", out]
    code, text, err = call(*words, "--json", "--eps", "0.05")
    assert (code, err) == (0, "")
    assert json.loads(text)["threat"] == {"norm": "linf", "eps": 0.05}
    for extra, message in (
        ([], f"{out} exists: give another --out, or --overwrite it"),
        (["--int8", "--fp16"], "exclude each other"),
        (["--overwrite", "--data", "npz:none.npz"], "none.npz"),
        (["--overwrite", "--trt", "--trt-backend", "cudnn"], "cudnn"),
    ):
        code, _, err = call(*words, *extra)
        assert code == 2
        assert message in err
        assert err.count("\n") == 1
    other = tmp_path / "mine"
    other.mkdir()
    code, _, err = call("export", noisy, "--out", other, "--overwrite")
    assert (code, err) == (2, f"fdml: {other} is no bundle: --overwrite replaces bundles only\n")
    code, _, err = call("export", made / "model.onnx", "--data", "digits", "--out", tmp_path / "x")
    assert code == 2
    assert "takes a .safetensors file" in err


def test_a_bundle_says_what_it_is(made: Path) -> None:
    code, text, err = call("info", made, "--json")
    assert (code, err) == (0, "")
    assert json.loads(text)["evidence"]["passed"] is True
    code, text, _ = call("info", made)
    assert code == 0
    assert "fp32, ONNX" in text
    assert "evidence: passed" in text


def test_bench_times_every_form_in_turn(noisy: Path, made: Path, tmp_path: Path) -> None:
    picture = tmp_path / "bench.png"
    quick = ["--batch", 1, "--batch", 8, "--seconds", 0.1, "--rounds", 2]
    code, text, err = call("bench", noisy, made, *quick, "--out", picture, "--json")
    assert (code, err) == (0, "")
    rows = json.loads(text)["rows"]
    assert [(row["form"], row["batch"]) for row in rows] == [
        (form, size) for form in ("torch", "torch, folded", "ONNX Runtime", "ONNX Runtime fp32") for size in (1, 8)
    ]
    assert all(0 < row["p50"] <= row["p95"] <= row["p99"] and row["images"] > 0 for row in rows)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    code, text, _ = call("bench", noisy, *quick)
    assert code == 0
    assert "faster" in text
    code, _, err = call("bench", noisy, "--batch", 0)
    assert code == 2
    assert "out of range: 1 to 4096" in err
