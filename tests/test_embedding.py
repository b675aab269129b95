"""The examples of docs/embedding.md are run as they stand, beside a bundle and pictures of the names in them."""

import csv
import hashlib
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_bundle import CLASSES, card, make, network

from fdml import bundle

PAGE = Path(__file__).parents[1] / "docs" / "embedding.md"
BLOCKS = dict(
    re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
)


def block(title: str) -> CodeType:
    return compile(BLOCKS[title], f"{PAGE.name}: {title}", "exec")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a bundle and pictures; the third is damaged."""
    make(tmp_path / "bundle")
    random = np.random.default_rng(0)
    (tmp_path / "pictures" / "inner").mkdir(parents=True)
    for name in ("cat.png", "dog.png", "pictures/a.png", "pictures/b.JPG", "pictures/inner/d.webp"):
        picture = Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        picture.save(tmp_path / name)
    (tmp_path / "pictures" / "c.png").write_bytes(b"damaged")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_all_examples_are_found() -> None:
    assert list(BLOCKS) == [
        "A web handler",
        "A batch job over a folder",
        "The frames of a video",
        "A proof with the answer",
        "A proof without sampling",
        "A hint that an image is adversarial",
    ]


def test_the_batch_job_names_every_file(place: Path) -> None:
    exec(block("A batch job over a folder"), {})
    with (place / "labels.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    names = [Path("pictures", name).as_posix() for name in ("a.png", "b.JPG", "c.png", "inner/d.webp")]
    assert [Path(row[0]).as_posix() for row in rows] == names
    assert [row[1] in CLASSES for row in rows] == [True, True, False, True]
    assert "not a readable" in rows[2][2]
    (place / "pictures" / "c.png").unlink()
    exec(block("A batch job over a folder"), {})
    with (place / "labels.csv").open(newline="", encoding="utf-8") as file:
        again = list(csv.reader(file))
    assert [row[:2] for row in again] == [row[:2] for row in rows if row[1]]


def test_the_frames_are_named_in_turn(capsys: pytest.CaptureFixture[str]) -> None:
    def frames() -> Iterator[np.ndarray]:
        random = np.random.default_rng(1)
        for _ in range(12):
            yield random.integers(0, 256, (48, 64, 3), dtype=np.uint8)

    exec(block("The frames of a video"), {"frames": frames()})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [number for number, _ in lines] == [str(i) for i in range(12)]
    assert {name for _, name in lines} <= set(CLASSES)


def test_the_hint_is_printed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(block("A hint that an image is adversarial"), {})
    assert capsys.readouterr().out == "", "the bundle has no teacher"
    (place / "bundle" / "teacher.onnx").write_bytes(network(card(), scale=1.0))
    (place / "bundle" / "evidence.json").write_text(
        '{"passed": true, "precision": "fp32", "teacher": {"suspicion": {"p95": 0}}}'
    )
    bundle.write_sums(place / "bundle")
    exec(block("A hint that an image is adversarial"), {})
    assert capsys.readouterr().out == "[ True  True]\n"


def test_the_proof_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    exec(block("A proof with the answer"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(line == "no answer" or " within 0." in line or " within 1." in line for line in lines)


def test_the_proof_by_bounds_is_printed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(block("A proof without sampling"), {})
    assert capsys.readouterr().out == "", "the bundle has no bounds"
    onnx = pytest.importorskip("onnx")
    bounds = pytest.importorskip("fdml.export.bounds")
    model = onnx.load_from_string(network(card()))
    model.opset_import[0].version = 20
    content = model.SerializeToString()
    (place / "bundle" / "model.onnx").write_bytes(content)
    found = bounds.bounded(model, hashlib.sha256(content).hexdigest())
    (place / "bundle" / "bounds.onnx").write_bytes(found.SerializeToString())
    bundle.write_sums(place / "bundle")
    exec(block("A proof without sampling"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(line.endswith((" proved", " not proved")) for line in lines)


def test_the_handler_answers_and_refuses(place: Path) -> None:
    code = block("A web handler")
    if find_spec("fastapi") is None or find_spec("httpx") is None:
        return  # that it compiles is all that can be seen here
    from fastapi.testclient import TestClient  # pyright: ignore[reportMissingImports]

    names: dict[str, Any] = {}
    exec(code, names)
    client = TestClient(names["app"])
    answer = client.post("/classify", files={"image": (place / "cat.png").read_bytes()})
    assert answer.status_code == 200
    assert len(answer.json()) == 3
    refused = client.post("/classify", files={"image": b"damaged"})
    assert refused.status_code == 422
    assert "not a readable" in refused.json()["detail"]
