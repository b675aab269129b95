"""The model repository is what Triton reads: by its own schema where that is installed, and line by line always."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from fdml.card import Card
from fdml.errors import InputError
from fdml.export.triton import kserve, write_repository

CLASSES = ("cat", 'a "dog"', "naïve ñ: 猫", "back\\slash", " spaces ", "cat")


def card_of(classes: tuple[str, ...] = CLASSES) -> Card:
    return Card(
        architecture="cnn",
        options={},
        classes=classes,
        input=(3, 8, 9),
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        threat=None,
        role="student",
        recipe={},
        seed=0,
        data={"name": "made-up", "fingerprint": "0"},
        metrics={},
        versions={},
    )


def write_onnx(path: Path, images: str = "images", size: tuple[int, ...] = (3, 8, 9), classes: int = 6) -> Path:
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", [images], ["flat"]),
            helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
        ],
        "g",
        [helper.make_tensor_value_info(images, TensorProto.FLOAT, ["b", *size])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", classes])],
        [numpy_helper.from_array(torch.rand(216, classes).numpy(), "weight")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_onnx(tmp_path / "bundle.onnx")


def test_the_repository(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "models"
    write_repository(file, card_of(), folder, name="robust-1.0")
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    assert found == [
        "robust-1.0",
        "robust-1.0/1",
        "robust-1.0/1/model.onnx",
        "robust-1.0/config.pbtxt",
        "robust-1.0/labels.txt",
    ]
    assert (folder / "robust-1.0" / "1" / "model.onnx").read_bytes() == file.read_bytes()
    assert (folder / "robust-1.0" / "labels.txt").read_text(encoding="utf-8").split("\n") == [*CLASSES, ""]
    assert (folder / "robust-1.0").stat().st_mode & 0o777 == folder.stat().st_mode & 0o777


def test_the_configuration_as_text(file: Path, tmp_path: Path) -> None:
    write_repository(file, card_of(), tmp_path, name="m")
    text = (tmp_path / "m" / "config.pbtxt").read_text(encoding="utf-8")
    for line in (
        'name: "m"',
        'backend: "onnxruntime"',
        "max_batch_size: 256",
        'input [ { name: "images" data_type: TYPE_FP32 dims: [3, 8, 9] } ]',
        'output [ { name: "logits" data_type: TYPE_FP32 dims: [6] label_filename: "labels.txt" } ]',
        "  preferred_batch_size: [8, 32, 64]",
        "  max_queue_delay_microseconds: 2000",
        "instance_group [ { count: 1 kind: KIND_AUTO } ]",
    ):
        assert line in text.splitlines()
    assert "tensorrt" not in text
    assert balanced(text)


def test_tensorrt_in_the_configuration_as_text(file: Path, tmp_path: Path) -> None:
    write_repository(
        file, card_of(), tmp_path, name="m", max_batch=32, preferred=(16, 4), tensorrt=True, precision="fp16"
    )
    text = (tmp_path / "m" / "config.pbtxt").read_text(encoding="utf-8")
    assert "preferred_batch_size: [4, 16]" in text
    assert re.findall(r'parameters { key: "(\w+)" value: "([^"]*)" }', text) == [
        ("precision_mode", "FP16"),
        ("trt_engine_cache_enable", "1"),
        ("trt_engine_cache_path", "/tmp/fdml-m"),
        ("trt_timing_cache_enable", "1"),
        ("trt_timing_cache_path", "/tmp/fdml-m"),
        ("trt_profile_min_shapes", "images:1x3x8x9"),
        ("trt_profile_opt_shapes", "images:16x3x8x9"),
        ("trt_profile_max_shapes", "images:32x3x8x9"),
    ]
    assert balanced(text)


def balanced(text: str) -> bool:
    """Brackets close in the order in which they opened; none stand inside the strings of these files."""
    open_: list[str] = []
    for mark in re.sub(r"#.*", "", text):
        if mark in "[{":
            open_.append(mark)
        elif mark in "]}" and (not open_ or open_.pop() + mark not in ("[]", "{}")):
            return False
    return not open_


@pytest.mark.parametrize("tensorrt", [False, True])
def test_the_configuration_by_tritons_own_schema(tensorrt: bool, file: Path, tmp_path: Path) -> None:
    try:
        schema = import_module("tritonclient.grpc.model_config_pb2")
    except (ImportError, RuntimeError):  # what it raises where only its HTTP part is installed
        pytest.skip("no tritonclient[grpc]")
    from google.protobuf import text_format

    write_repository(file, card_of(), tmp_path, name="m", preferred=(), delay_us=0, tensorrt=tensorrt)
    write_repository(file, card_of(), tmp_path, name="n", tensorrt=tensorrt, precision="int8")
    empty = text_format.Parse((tmp_path / "m" / "config.pbtxt").read_text(encoding="utf-8"), schema.ModelConfig())
    assert list(empty.dynamic_batching.preferred_batch_size) == []
    found = text_format.Parse((tmp_path / "n" / "config.pbtxt").read_text(encoding="utf-8"), schema.ModelConfig())
    assert (found.name, found.backend, found.max_batch_size) == ("n", "onnxruntime", 256)
    (images,), (logits,) = found.input, found.output
    assert (images.name, images.data_type, list(images.dims)) == ("images", schema.TYPE_FP32, [3, 8, 9])
    assert (logits.name, logits.data_type, list(logits.dims)) == ("logits", schema.TYPE_FP32, [6])
    assert logits.label_filename == "labels.txt"
    assert list(found.dynamic_batching.preferred_batch_size) == [8, 32, 64]
    assert found.dynamic_batching.max_queue_delay_microseconds == 2000
    (group,) = found.instance_group
    assert (group.count, group.kind) == (1, schema.ModelInstanceGroup.KIND_AUTO)
    accelerators = found.optimization.execution_accelerators.gpu_execution_accelerator
    assert [entry.name for entry in accelerators] == ["tensorrt"] * tensorrt
    if tensorrt:
        assert accelerators[0].parameters["precision_mode"] == "INT8"
        assert accelerators[0].parameters["trt_profile_max_shapes"] == "images:256x3x8x9"
        assert len(accelerators[0].parameters) == 8


def test_a_model_that_is_there_is_kept_unless_overwritten(file: Path, tmp_path: Path) -> None:
    write_repository(file, card_of(), tmp_path, name="m")
    (tmp_path / "m" / "2").mkdir()
    with pytest.raises(InputError, match="m is already there: choose another name, or overwrite it"):
        write_repository(file, card_of(), tmp_path, name="m", max_batch=64)
    assert (tmp_path / "m" / "2").is_dir()
    write_repository(file, card_of(), tmp_path, name="m", max_batch=64, overwrite=True)
    assert not (tmp_path / "m" / "2").exists()
    assert "max_batch_size: 64" in (tmp_path / "m" / "config.pbtxt").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle.onnx", "m"]


def test_a_folder_of_something_else_is_never_overwritten(file: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="is no model of Triton, and is not overwritten"):
        write_repository(file, card_of(), tmp_path, name="m", overwrite=True)
    assert (tmp_path / "m" / "thesis.tex").read_text() == "precious"


def test_a_failure_midway_leaves_what_was_there(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models"
    write_repository(file, card_of(), folder, name="m")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(InputError, match="No space left on device"):
        write_repository(file, card_of(), folder, name="m", overwrite=True)
    with pytest.raises(InputError, match="No space left on device"):
        write_repository(file, card_of(), folder, name="other")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in folder.iterdir()] == ["m"]


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "a/b", 'a"b', "a b", "ü", "-", "a\n", "x" * 201])
def test_names_that_are_no_folder_are_refused(name: str, file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a model of Triton cannot be called"):
        write_repository(file, card_of(), tmp_path / "out", name=name)
    assert not (tmp_path / "out").exists()


def test_batches_that_do_not_fit_are_refused(file: Path, tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [{"max_batch": 16}, {"preferred": (0, 8)}, {"max_batch": 0, "preferred": ()}]
    for options in wrong:
        with pytest.raises(InputError, match=r"preferred batches .*: each from 1 to the largest batch"):
            write_repository(file, card_of(), tmp_path / "out", name="m", **options)
    with pytest.raises(InputError, match="the delay is -1 microseconds"):
        write_repository(file, card_of(), tmp_path / "out", name="m", delay_us=-1)
    with pytest.raises(InputError, match="takes fp32, fp16, int8, not 'bf16'"):
        write_repository(file, card_of(), tmp_path / "out", name="m", tensorrt=True, precision="bf16")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_the_cards_is_refused(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"its input is x \[3, 8, 9\], but the card's is images \[3, 8, 9\]"):
        write_repository(write_onnx(tmp_path / "x.onnx", images="x"), card_of(), out, name="m")
    with pytest.raises(InputError, match=r"its output is logits \[6\], but the card's is logits \[2\]"):
        write_repository(file, card_of(("a", "b")), out, name="m")
    with pytest.raises(InputError, match=r"cannot be read: No such file"):
        write_repository(tmp_path / "gone.onnx", card_of(), out, name="m")
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(InputError, match=r"bundle.onnx: is not an ONNX file: "):
        write_repository(file, card_of(), out, name="m")
    assert not out.exists()


def test_weights_in_another_file_are_refused(file: Path, tmp_path: Path) -> None:
    onnx.save(onnx.load(file), tmp_path / "apart.onnx", save_as_external_data=True, size_threshold=0)
    with pytest.raises(InputError, match="keeps its weights in another file"):
        write_repository(tmp_path / "apart.onnx", card_of(), tmp_path / "out", name="m")


def test_the_manifest_of_kserve() -> None:
    text = kserve("robust-digits", "s3://bucket/models")
    assert text.splitlines() == [
        "apiVersion: serving.kserve.io/v1beta1",
        "kind: InferenceService",
        "metadata:",
        "  name: robust-digits",
        "spec:",
        "  predictor:",
        "    model:",
        "      modelFormat:",
        "        name: triton",
        "      runtime: kserve-tritonserver",
        "      protocolVersion: v2",
        '      storageUri: "s3://bucket/models"',
    ]


@pytest.mark.parametrize("name", ["", "Robust", "1st", "a_b", "a-", "x" * 64, "a\nb"])
def test_names_that_kubernetes_refuses(name: str) -> None:
    with pytest.raises(InputError, match="a service of Kubernetes cannot be called"):
        kserve(name, "s3://bucket/models")


@pytest.mark.parametrize("uri", ["", "models", "/models", "s3://", "s3://a b", "s3://a\nkind: Secret", "3s://a"])
def test_places_that_are_no_address(uri: str) -> None:
    with pytest.raises(InputError, match="is no address of a model repository"):
        kserve("m", uri)
