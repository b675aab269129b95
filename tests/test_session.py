"""TensorRT's engines in a bundle: used as they were built, from a copy. A stand-in takes the place of the GPU build."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from small_bundle import SHAPE, make

from fdml import bundle
from fdml.bundle import BundleError
from fdml.runtime import RobustClassifier

CACHE = "TensorrtExecutionProvider_TRTKernel_graph_0_0_fp16_sm90.engine"
PROVIDERS = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]


class Session:
    """ONNX Runtime's session on the CPU, which says that it is on the first provider asked for."""

    asked: list[tuple[str, dict[str, str]]]

    def __init__(self, path: str, options: Any, providers: list[tuple[str, dict[str, str]]], **how: Any) -> None:
        type(self).asked = providers
        self._real = _real(path, options, providers=["CPUExecutionProvider"])
        self.sizes: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def get_providers(self) -> list[str]:
        return [name for name, _ in self.asked]

    def run(self, names: list[str], feed: dict[str, np.ndarray]) -> Any:
        self.sizes.append(len(feed["images"]))
        return self._real.run(names, feed)


_real = onnxruntime.InferenceSession


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: PROVIDERS)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    return make(tmp_path / "bundle")


def add_engines(folder: Path, listed: object) -> None:
    (folder / CACHE).write_bytes(b"an engine")
    (folder / "engines.json").write_text(json.dumps(listed), encoding="utf-8")
    bundle.write_sums(folder)


def entry(backend: str = "ort") -> dict[str, Any]:
    return {"file": CACHE, "backend": backend, "precision": "fp16", "batches": [1, 16, 32]}


def test_auto_takes_tensorrt_where_the_bundle_has_its_engines(folder: Path) -> None:
    assert RobustClassifier.load(folder).provider == "cuda"
    assert [name for name, _ in Session.asked] == PROVIDERS[1:]
    add_engines(folder, [entry("rtx")])
    assert RobustClassifier.load(folder).provider == "cuda"

    add_engines(folder, [entry("rtx"), entry()])
    before = bundle.read(folder)
    clf = RobustClassifier.load(folder)
    assert clf.provider == "tensorrt"
    name, options = Session.asked[0]
    assert name == PROVIDERS[0]
    assert options["trt_fp16_enable"] == "1"
    assert options["trt_profile_opt_shapes"] == "images:16x3x8x8"
    copy = Path(options["trt_engine_cache_path"])
    assert copy != folder
    assert (copy / CACHE).read_bytes() == b"an engine"
    (copy / "another.engine").write_bytes(b"built anew")  # as the provider does on another GPU
    assert bundle.read(folder) == before

    # No more at once than the engine takes.
    assert clf.logits(np.zeros((70, *SHAPE), np.float32)).shape == (70, 4)
    session: Any = clf._opened.session
    assert session.sizes == [32, 32, 6]
    del clf, session
    assert not copy.exists()


def test_tensorrt_may_be_asked_for_without_engines(folder: Path) -> None:
    assert RobustClassifier.load(folder, "tensorrt").provider == "tensorrt"
    assert Session.asked[0] == (PROVIDERS[0], {})
    assert RobustClassifier.load(folder / "model.onnx", "cuda").provider == "cuda"


@pytest.mark.parametrize("listed", [{}, [1], [{"backend": "ort"}], [entry() | {"batches": [1]}], "ort"])
def test_a_list_of_engines_that_is_none_is_refused(folder: Path, listed: object) -> None:
    add_engines(folder, listed)
    if listed == {}:
        assert RobustClassifier.load(folder).provider == "cuda"
        return
    with pytest.raises(BundleError, match=r"engines.json: is not the list"):
        RobustClassifier.load(folder)
