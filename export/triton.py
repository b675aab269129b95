"""A model repository for NVIDIA's Triton Inference Server, and the manifest that starts it under KServe.

    <folder>/<name>/config.pbtxt      what Triton reads first: a ModelConfig as protobuf text
    <folder>/<name>/labels.txt        the names of the classes, one a line, in the order of the logits
    <folder>/<name>/1/model.onnx      version 1 of the model

Triton gathers requests into batches, and answers with class names where a client asks for a classification. No Triton
is run by the tests: they read the configuration with Triton's own schema, where the package that has it is installed.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fdml.card import Card
from fdml.errors import InputError
from fdml.files import write_whole

# As Triton's backend for ONNX Runtime spells them.
_PRECISIONS = {"fp32": "FP32", "fp16": "FP16", "int8": "INT8"}


def write_repository(
    onnx: Path,
    card: Card,
    folder: Path,
    *,
    name: str,
    max_batch: int = 256,
    preferred: Sequence[int] = (8, 32, 64),
    delay_us: int = 2000,
    tensorrt: bool = False,
    precision: str = "fp32",
    overwrite: bool = False,
) -> None:
    """Writes the model ``name`` into the model repository ``folder``, whole or not at all.

    ``onnx`` takes ``images`` (b, c, h, w), float32 in [0, 1], and gives ``logits`` (b, classes). Triton waits up to
    ``delay_us`` microseconds for a batch of one of the ``preferred`` sizes. With ``tensorrt`` ONNX Runtime hands the
    model to TensorRT where there is a GPU, in ``precision``; engines are built when Triton first loads the model, which
    takes minutes, and kept in /tmp/fdml-<name> of the server.

    Raises ``InputError`` for a file whose input and output are not the card's, for batches that do not fit together,
    and for a model that is already there, unless ``overwrite``.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", name):
        raise InputError(f"a model of Triton cannot be called {name!r}: use letters, digits and . _ -")
    sizes = sorted(set(preferred))
    if max_batch < 1 or any(not 1 <= size <= max_batch for size in sizes):
        raise InputError(f"preferred batches {list(preferred)}: each from 1 to the largest batch, {max_batch}")
    if delay_us < 0:
        raise InputError(f"the delay is {delay_us} microseconds, but cannot be below 0")
    if precision not in _PRECISIONS:
        raise InputError(f"Triton's TensorRT takes {', '.join(_PRECISIONS)}, not {precision!r}")
    _check(onnx, card)
    text = _config(card, name, max_batch, sizes, delay_us, precision if tensorrt else None)

    place = folder / name
    if place.exists() and not overwrite:
        raise InputError(f"{place} is already there: choose another name, or overwrite it")
    if place.exists() and not (place / "config.pbtxt").is_file():
        raise InputError(f"{place} is no model of Triton, and is not overwritten")

    def copy(target: Path) -> None:
        shutil.copyfile(onnx, target)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Triton may be watching the folder: the model appears there by one rename, complete.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".model-") as work:
            new, old = Path(work) / "new", Path(work) / "old"
            write_whole(new / "1" / "model.onnx", copy)
            write_whole(new / "labels.txt", "".join(f"{label}\n" for label in card.classes))
            write_whole(new / "config.pbtxt", text)
            if place.exists():
                place.rename(old)
            new.rename(place)
    except OSError as error:
        raise InputError(f"cannot write {place}: {error.strerror or error}") from error


def kserve(name: str, uri: str) -> str:
    """The manifest of a KServe InferenceService (v1beta1) that serves the model repository at ``uri`` with Triton.

    ``uri`` is the place of the repository, the folder that holds the model's: ``s3://…``, ``gs://…``, ``pvc://…``.
    Raises ``InputError`` for a name that Kubernetes does not take, or a place that is no address.
    """
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", name):
        raise InputError(
            f"a service of Kubernetes cannot be called {name!r}: use small letters, digits and -, a letter first"
        )
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*://\S+", uri) or not uri.isprintable():
        raise InputError(f"{uri!r} is no address of a model repository, such as s3://bucket/models")
    # A JSON string is a YAML string as well.
    return f"""apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: {name}
spec:
  predictor:
    model:
      modelFormat:
        name: triton
      runtime: kserve-tritonserver
      protocolVersion: v2
      storageUri: {json.dumps(uri)}
"""


def _check(path: Path, card: Card) -> None:
    """Triton would refuse the model when it loads it; better said now."""
    import onnx

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # its parser's errors have no common class
        raise InputError(f"{path}: is not an ONNX file: {str(error).splitlines()[0][:200]}") from None
    for kind, entries, wanted in (
        ("input", graph.input, ("images", list(card.input))),
        ("output", graph.output, ("logits", [len(card.classes)])),
    ):
        found = [(entry.name, [dim.dim_value for dim in entry.type.tensor_type.shape.dim[1:]]) for entry in entries]
        types = {entry.type.tensor_type.elem_type for entry in entries}
        if found != [wanted] or types != {onnx.TensorProto.FLOAT}:
            seen = ", ".join(f"{name} {size}" for name, size in found) or "nothing"
            raise InputError(f"{path}: its {kind} is {seen}, but the card's is {wanted[0]} {wanted[1]} in float32")
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in graph.initializer):
        raise InputError(f"{path}: keeps its weights in another file; export it with the weights inside")


def _config(
    card: Card, name: str, max_batch: int, preferred: Sequence[int], delay_us: int, precision: str | None
) -> str:
    """The ModelConfig. ONNX Runtime optimises the graph as far as it can unless told a level: none is."""
    text = f"""name: "{name}"
backend: "onnxruntime"
max_batch_size: {max_batch}

# Pixels in [0, 1]; normalisation is inside the model.
input [ {{ name: "images" data_type: TYPE_FP32 dims: {list(card.input)} }} ]
output [ {{ name: "logits" data_type: TYPE_FP32 dims: [{len(card.classes)}] label_filename: "labels.txt" }} ]

dynamic_batching {{
  preferred_batch_size: {list(preferred)}
  max_queue_delay_microseconds: {delay_us}
}}

# On every GPU that there is, else on the CPU.
instance_group [ {{ count: 1 kind: KIND_AUTO }} ]
"""
    if precision is None:
        return text
    best = max(preferred, default=max_batch)
    shapes = {at: f"images:{'x'.join(map(str, (batch, *card.input)))}" for at, batch in
              (("min", 1), ("opt", best), ("max", max_batch))}  # fmt: skip
    parameters = {
        "precision_mode": _PRECISIONS[precision],
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": f"/tmp/fdml-{name}",
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": f"/tmp/fdml-{name}",
        # Without these an engine is built anew for each batch that is larger than any before.
        **{f"trt_profile_{at}_shapes": shape for at, shape in shapes.items()},
    }
    lines = "".join(f'      parameters {{ key: "{key}" value: "{value}" }}\n' for key, value in parameters.items())
    return f"""{text}
optimization {{
  execution_accelerators {{
    gpu_execution_accelerator [ {{
      name: "tensorrt"
{lines}    }} ]
  }}
}}
"""
