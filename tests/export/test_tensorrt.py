"""Engines are really built, for GPUs that are not there; what cannot be had here is named."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from fdml.errors import InputError
from fdml.evaluate.session import Session, onnx_of
from fdml.export import tensorrt
from fdml.export.half import halved
from fdml.export.tensorrt import Engine, available, build, choose, inspect
from fdml.models import build as model_of

SIZE = (1, 8, 8)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return model_of("cnn", input=SIZE, classes=10, mean=(0.3,), std=(0.37,), options={"width": 4}).eval()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "small.onnx"
    path.write_bytes(onnx_of(network(), torch.zeros(1, *SIZE)))
    return path


def quantised(file: Path, path: Path, **extra: bool) -> Path:
    """``file`` in int8, calibrated on noise."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Noise(CalibrationDataReader):
        left = 2

        def get_next(self) -> dict[str, np.ndarray] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
            self.left -= 1
            noise = np.random.default_rng(0).random((4, *SIZE), np.float32)
            return {onnx.load(file).graph.input[0].name: noise} if self.left >= 0 else None

    quantize_static(
        file,
        path,
        Noise(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, **extra},
    )
    return path


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_rtx_builds_for_each_target_without_a_gpu(precision: tensorrt.Precision, file: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    folder = tmp_path / "new" / "bundle"
    targets = ["sm_89", "sm_120"]
    engines = build("rtx", file, folder, precision=precision, batches=(1, 8, 32), targets=targets)
    assert [engine.target for engine in engines] == targets
    assert sorted(path.name for path in folder.iterdir()) == sorted(engine.file for engine in engines)
    for engine in engines:
        assert engine.file == f"small.rtx.{precision}.{engine.target}.engine"
        assert engine.backend == "rtx"
        assert engine.precision == precision
        assert engine.batches == (1, 8, 32)
        assert set(engine.versions) == {"tensorrt-rtx", "onnx"}
        content = (folder / engine.file).read_bytes()
        assert engine.bytes == len(content) > 10_000
        assert content[:4] == b"vtrt"
        assert engine.target.replace("_", "").encode() in content  # Engines of several targets differ in little else.
        assert (folder / engine.file).stat().st_mode & 0o777 == (file.stat().st_mode & 0o777)


def test_rtx_builds_an_engine_again_in_the_place_of_the_first(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "small.rtx.fp32.sm_86.engine").write_text("of a release before")
    (engine,) = build("rtx", file, tmp_path, targets=["sm_86", "sm_86"])
    assert [path.name for path in tmp_path.iterdir()] == [engine.file]
    assert (tmp_path / engine.file).read_bytes()[:4] == b"vtrt"


def test_half_precision_makes_smaller_engines(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    wide = model_of("cnn", input=SIZE, classes=10, mean=(0.3,), std=(0.37,), options={"width": 32}).eval()
    path = tmp_path / "wide.onnx"
    path.write_bytes(onnx_of(wide, torch.zeros(1, *SIZE)))
    (full,) = build("rtx", path, tmp_path, targets=["sm_89"])
    (half,) = build("rtx", path, tmp_path, precision="fp16", targets=["sm_89"])
    # Weights in float32 are 2.2 MB; the rest of an engine is code.
    assert full.bytes - half.bytes > 800_000


def test_the_targets_by_default(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    assert tuple(engine.target for engine in build("auto" if only_rtx() else "rtx", file, tmp_path)) == tensorrt.TARGETS


def only_rtx() -> bool:
    found = available()
    return found["rtx"] is None and bool(found["ort"]) and bool(found["torch-tensorrt"])


def test_rtx_takes_int8_whose_biases_are_not_quantised(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    path = quantised(file, tmp_path / "int8.onnx", QuantizeBias=False)
    (engine,) = build("rtx", path, tmp_path / "out", precision="int8", targets=["sm_89"])
    assert engine.bytes > 10_000
    path = quantised(file, tmp_path / "biases.onnx", QuantizeBias=True)
    with pytest.raises(
        InputError, match=r"biases.onnx: TensorRT-RTX cannot read it as int8: .*Int32 but must"
    ) as caught:
        build("rtx", path, tmp_path / "out", precision="int8", targets=["sm_89"])
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [engine.file]


def test_what_the_builder_refuses_is_said_in_one_line(file: Path, tmp_path: Path) -> None:
    """The generation of Turing has no product of matrices in float32 there."""
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(InputError, match=r"cannot build it as fp32 for sm_75: .*not supported") as caught:
        build("rtx", file, tmp_path, targets=["sm_89", "sm_75"])
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["sm_90", "SM89", "89", ""])
def test_unknown_targets(target: str, file: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(InputError, match=f"TensorRT-RTX does not build for '{target}'; it does for .*sm_89"):
        build("rtx", file, tmp_path, targets=[target])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "folder", "gone", "operator"])
def test_a_file_that_is_no_network_leaves_nothing(
    damage: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first five are refused before TensorRT sees them, on every machine."""
    if damage == "operator":
        pytest.importorskip("tensorrt_rtx")
    monkeypatch.setitem(tensorrt._MISSING, "rtx", lambda: None)
    path, folder = tmp_path / "bad.onnx", tmp_path / "out"
    folder.mkdir()
    content = file.read_bytes()
    if damage == "folder":
        path.mkdir()
    elif damage == "operator":
        proto = onnx.load(file)
        proto.graph.node[-1].op_type = "Gemmm"
        onnx.save(proto, path)
    elif damage != "gone":
        path.write_bytes({"cut": content[: len(content) // 2], "noise": b"\xff" * 1000, "empty": b""}[damage])
    with pytest.raises(InputError) as caught:
        build("rtx", path, folder)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(folder.iterdir()) == []


def test_a_batch_that_is_fixed_is_refused(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tensorrt._MISSING, "rtx", lambda: None)
    proto = onnx.load(file)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(proto, tmp_path / "fixed.onnx")
    with pytest.raises(InputError, match="takes batches of 4 only"):
        build("rtx", tmp_path / "fixed.onnx", tmp_path)


def test_arguments_that_make_no_sense(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tensorrt.BACKENDS:
        monkeypatch.setitem(tensorrt._MISSING, name, lambda: None)
    folder = tmp_path / "out"
    with pytest.raises(InputError, match="unknown precision 'fp8': did you mean"):
        build("rtx", file, folder, precision="fp8")  # pyright: ignore[reportArgumentType]
    for batches in [(0, 1, 2), (2, 1, 4), (1, 8, 4)]:
        with pytest.raises(InputError, match="each at least the one before"):
            build("rtx", file, folder, batches=batches)
    with pytest.raises(InputError, match="is not quantised; int8 needs"):
        build("rtx", file, folder, precision="int8")
    with pytest.raises(InputError, match="is quantised; build it as int8, not fp16"):
        build("rtx", quantised(file, tmp_path / "int8.onnx"), folder, precision="fp16")
    with pytest.raises(InputError, match="ort builds for the GPU of this machine"):
        build("ort", file, folder, targets=["sm_89"])
    assert not folder.exists()
    with pytest.raises(InputError, match="none was given"):
        build("torch-tensorrt", file, folder)
    with pytest.raises(InputError, match="for int8 use ort"):
        build("torch-tensorrt", tmp_path / "int8.onnx", folder, precision="int8", model=network())
    assert list(folder.iterdir()) == []
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match=r"cannot write engines to .*taken: "):
        build("torch-tensorrt", file, tmp_path / "taken")


def test_to_dict_is_json() -> None:
    engine = Engine("a.engine", "rtx", "fp16", "sm_89", (1, 64, 256), {"onnx": "1"}, 5)
    assert engine.to_dict() == {
        "file": "a.engine",
        "backend": "rtx",
        "precision": "fp16",
        "target": "sm_89",
        "batches": [1, 64, 256],
        "versions": {"onnx": "1"},
        "bytes": 5,
    }


# What is missing


def test_auto_takes_the_first_that_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for index, name in enumerate(tensorrt.BACKENDS):
        for other, missing in zip(tensorrt.BACKENDS, [*["gone"] * index, None, None, None], strict=False):
            monkeypatch.setitem(tensorrt._MISSING, other, lambda missing=missing: missing)
        assert choose("auto") == choose(name) == name
        assert available()[name] is None
    for other in tensorrt.BACKENDS:
        monkeypatch.setitem(tensorrt._MISSING, other, lambda: "gone")
    with pytest.raises(
        InputError, match=r"no TensorRT backend can run here: ort \(gone\), torch-tensorrt \(gone\), rtx"
    ):
        choose("auto")
    with pytest.raises(InputError, match=r"^the TensorRT backend rtx cannot run here: gone$"):
        choose("rtx")
    with pytest.raises(InputError, match="unknown TensorRT backend 'rtxx': did you mean 'rtx'"):
        choose("rtxx")


def test_without_a_gpu_that_is_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "_gpu", lambda: None)
    assert available() | {"rtx": ""} == {"ort": "no CUDA device", "torch-tensorrt": "no CUDA device", "rtx": ""}


def test_the_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "_gpu", lambda: "A GPU")
    for here, ort in [(set(), ""), ({"onnxruntime"}, "pip uninstall -y onnxruntime && ")]:
        monkeypatch.setattr(
            tensorrt, "find_spec", lambda name, here=here: SimpleNamespace(origin=None) if name in here else None
        )
        assert available() == {
            "ort": f"package onnxruntime-gpu: {ort}pip install 'fdml[gpu]'",
            "torch-tensorrt": "package torch-tensorrt: pip install 'fdml[trt]'",
            "rtx": "package tensorrt-rtx: pip install 'fdml[rtx]'",
        }


def test_the_library_that_is_missing_is_read_from_the_provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that looks like onnxruntime-gpu 1.31, linked to TensorRT 10 for CUDA 13."""
    capi = tmp_path / "onnxruntime" / "capi"
    capi.mkdir(parents=True)
    (tmp_path / "onnxruntime" / "__init__.py").touch()
    linked = b"\0libcudart.so.13\0libnvonnxparser.so.10\0libnvinfer.so.10\0"
    (capi / "libonnxruntime_providers_tensorrt.so").write_bytes(linked)
    spec = SimpleNamespace(origin=str(tmp_path / "onnxruntime" / "__init__.py"))
    monkeypatch.setattr(tensorrt, "_gpu", lambda: "A GPU")
    monkeypatch.setattr(tensorrt, "find_spec", lambda name: spec if name == "onnxruntime" else None)
    loaded = []
    monkeypatch.setattr(tensorrt.ctypes, "CDLL", lambda path, mode=0: loaded.append(path))
    assert available()["ort"] is None
    assert loaded == ["libnvinfer.so.10", "libnvonnxparser.so.10"]

    def refuse(path: str, mode: int = 0) -> None:
        raise OSError(path)

    monkeypatch.setattr(tensorrt.ctypes, "CDLL", refuse)
    assert available()["ort"] == "libnvinfer.so.10: pip install 'tensorrt-cu13>=10,<11'"


def test_a_library_is_found_in_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(tensorrt, "find_spec", lambda name: spec if name == "tensorrt_libs" else None)
    tried = []

    def load(path: str, mode: int = 0) -> None:
        tried.append(path)
        if "/" not in path:
            raise OSError(path)

    monkeypatch.setattr(tensorrt.ctypes, "CDLL", load)
    assert tensorrt._loads("libnvinfer.so.10")
    assert tried == ["libnvinfer.so.10", f"{tmp_path}/libnvinfer.so.10"]


@pytest.mark.parametrize(("fails", "expected"), [("", "NVIDIA Something"), ("cuInit", None), ("cuDeviceGet", None)])
def test_the_driver_is_asked_for_the_gpu(fails: str, expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def name(buffer, size: int, device) -> int:
        buffer.value = b"NVIDIA Something"
        return 0

    calls = {"cuInit": lambda flags: 0, "cuDeviceGet": lambda device, index: 0, "cuDeviceGetName": name}
    if fails:
        calls[fails] = lambda *_: 100  # CUDA_ERROR_NO_DEVICE
    monkeypatch.setattr(tensorrt.ctypes, "CDLL", lambda path: SimpleNamespace(**calls))
    assert tensorrt._gpu() == expected


def test_torch_tensorrt_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "_gpu", lambda: "A GPU")
    (tmp_path / "torch_tensorrt.py").write_text("print('noise')\nraise OSError('libnvinfer.so.11: cannot open\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_tensorrt", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "a CUDA build of torch" in (available()["torch-tensorrt"] or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    needs = ["torch<2.14", "tensorrt-cu13<11.1.0,>=11.0.0", "tensorrt<11.1.0,>=11.0.0"]
    monkeypatch.setattr(tensorrt, "requires", lambda name: needs)
    assert available()["torch-tensorrt"] == (
        "libnvinfer (libnvinfer.so.11: cannot open): pip install 'tensorrt<11.1.0,>=11.0.0'"
    )
    (tmp_path / "torch_tensorrt.py").write_text("")
    assert available()["torch-tensorrt"] is None
    del sys.modules["torch_tensorrt"]


# Half precision


@pytest.mark.parametrize(("precision", "close"), [("fp16", 0.005), ("bf16", 0.05)])
def test_half_precision_keeps_input_output_and_logits(precision: str, close: float, file: Path) -> None:
    before = onnx.load(file)
    after = halved(before, precision)
    assert before == onnx.load(file)
    assert after.graph.input == before.graph.input
    assert after.graph.output == before.graph.output
    kind = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[precision]
    assert {t.data_type for t in after.graph.initializer} <= {kind, TensorProto.INT64}
    onnx.checker.check_model(after, full_check=precision == "fp16")  # opset 20 gives a convolution no bf16
    if precision == "fp16":
        x = torch.rand(7, *SIZE)
        assert torch.allclose(Session(after.SerializeToString())(x), network()(x), atol=close)
    weight = before.graph.initializer[0]
    half = next(t for t in after.graph.initializer if t.name == weight.name)
    found, expected = (numpy_helper.to_array(t).astype(np.float32) for t in (half, weight))
    assert np.abs(found - expected).max() <= close * np.abs(expected).max()


def test_half_precision_of_half_precision_is_the_same_network(file: Path) -> None:
    once = halved(onnx.load(file), "fp16")
    twice = halved(once, "fp16")
    x = torch.rand(3, *SIZE)
    assert torch.equal(Session(once.SerializeToString())(x), Session(twice.SerializeToString())(x))


def test_constants_and_casts_become_half_precision() -> None:
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["b", 1, 1, 2])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", 1, 1, 2])
    two = numpy_helper.from_array(np.array([2.0], np.float32), "two")
    nodes = [
        helper.make_node("Constant", [], ["two"], value=two),
        helper.make_node("Greater", ["images", "two"], ["larger"]),
        helper.make_node("Cast", ["larger"], ["one"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["images", "one"], ["logits"]),
    ]
    proto = helper.make_model(
        helper.make_graph(nodes, "g", [images], [logits]), opset_imports=[helper.make_opsetid("", 20)]
    )
    onnx.checker.check_model(halved(proto, "fp16"), full_check=True)
    onnx.checker.check_model(halved(proto, "bf16"), full_check=True)


def test_a_weight_that_is_too_large_for_fp16(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    proto = onnx.load(file)
    weight = next(t for t in proto.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 4)
    large = numpy_helper.to_array(weight).copy()
    large.flat[0] = 1e5
    weight.CopyFrom(numpy_helper.from_array(large, weight.name))
    onnx.save(proto, tmp_path / "large.onnx")
    with pytest.raises(InputError, match=r"large.onnx: .* reaches 100000, too large for fp16"):
        build("rtx", tmp_path / "large.onnx", tmp_path, precision="fp16")
    assert build("rtx", tmp_path / "large.onnx", tmp_path, precision="bf16", targets=["sm_89"])


# Where there is a GPU


def test_an_engine_is_not_inspected_without_a_gpu(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    path = tmp_path / "no.engine"
    with pytest.raises(InputError, match=r"no.engine: cannot be read: No such file"):
        inspect(path)
    path.write_bytes(b"\0" * 1000)
    with pytest.raises(InputError, match=r"no.engine: TensorRT-RTX cannot load it here: ") as caught:
        inspect(path)
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
def test_rtx_engine_of_this_gpu(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    target = "sm_" + "".join(map(str, torch.cuda.get_device_capability()))
    if target in ("sm_90", "sm_100"):
        pytest.skip("TensorRT-RTX does not build for the GPUs of data centres after Ampere")
    (engine,) = build("rtx", file, tmp_path, batches=(1, 8, 32), targets=[target])
    tensors = inspect(tmp_path / engine.file)["tensors"]
    assert [entry["shape"] for entry in tensors.values()] == [[-1, *SIZE], [-1, 10]]
    assert next(iter(tensors.values()))["batches"] == [1, 8, 32]


@pytest.mark.gpu
def test_ort_engine_gives_the_same_logits(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = available()["ort"]
    if missing:
        pytest.skip(missing)
    import onnxruntime

    (engine,) = build("ort", file, tmp_path, batches=(1, 8, 32))
    assert engine.target == torch.cuda.get_device_name()
    assert {path.suffix for path in tmp_path.iterdir()} == {".engine", ".profile", ".timing"}
    when = (tmp_path / engine.file).stat().st_mtime_ns
    entry = onnx.load(file).graph.input[0].name
    options = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(tmp_path)} | {
        f"trt_profile_{at}_shapes": f"{entry}:{batch}x1x8x8" for at, batch in (("min", 1), ("opt", 8), ("max", 32))
    }
    session = onnxruntime.InferenceSession(file, providers=[("TensorrtExecutionProvider", options)])
    assert session.get_providers()[0] == "TensorrtExecutionProvider"
    x = torch.rand(8, *SIZE)
    (found,) = session.run(None, {entry: x.numpy()})
    assert torch.allclose(torch.from_numpy(found), network()(x), atol=1e-2)  # TF32
    assert (tmp_path / engine.file).stat().st_mtime_ns == when  # loaded, not built


@pytest.mark.gpu
def test_torch_tensorrt_builds_an_engine(file: Path, tmp_path: Path) -> None:
    missing = available()["torch-tensorrt"]
    if missing:
        pytest.skip(missing)
    model = network()
    (engine,) = build("torch-tensorrt", file, tmp_path, precision="fp16", batches=(1, 8, 32), model=model)
    assert engine.bytes == (tmp_path / engine.file).stat().st_size > 10_000
    assert next(model.parameters()).device.type == "cpu"
