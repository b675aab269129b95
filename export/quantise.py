"""Eight bits, by static quantisation."""

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fdml.export.convert import IMAGES, LOGITS


def quantised(model: Any, batches: list[np.ndarray], *, tensorrt: bool = False) -> Any:
    """The ONNX model with eight-bit weights (signed, a scale a channel) and activations between QuantizeLinear and
    DequantizeLinear nodes: unsigned activations, for which processors are fastest, or with ``tensorrt`` signed ones
    around zero and biases in float32, which is what TensorRT takes.

    The ranges of the activations are those seen on ``batches``, float32 (b, c, h, w): clean images *and* adversarial
    ones, which reach activations that no clean image does. The first and the last layer, which are small and err most,
    stay float32.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._left: Iterator[np.ndarray] = iter(batches)

        def get_next(self) -> Any:
            batch = next(self._left, None)
            return None if batch is None else {IMAGES: batch}

    log = logging.getLogger()
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory() as folder:
            source, ready, made = (Path(folder) / name for name in ("source.onnx", "ready.onnx", "int8.onnx"))
            onnx.save(model, source)
            quant_pre_process(source, ready, skip_symbolic_shape=True)
            quantize_static(
                ready,
                made,
                Reader(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QInt8 if tensorrt else QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                extra_options={"ActivationSymmetric": True, "QuantizeBias": False} if tensorrt else {},
                nodes_to_exclude=_ends(onnx.load(ready)),
            )
            found = onnx.load(made)
    finally:
        log.setLevel(level)
    onnx.checker.check_model(found, full_check=True)
    del found.metadata_props[:]
    found.metadata_props.extend(model.metadata_props)
    return found


def _ends(model: Any) -> list[str]:
    """The normalisation, the first convolution, and what makes the logits."""
    nodes = list(model.graph.node)
    first = next((place for place, node in enumerate(nodes) if node.op_type in ("Conv", "Gemm", "MatMul")), -1)
    last = [node for node in nodes if LOGITS in node.output]
    return [node.name for node in [*nodes[: first + 1], *last]]
