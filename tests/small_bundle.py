"""Small bundles of made-up networks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fdml import bundle
from fdml.card import KEY, Card

SHAPE = (3, 8, 8)
CLASSES = ("cat", "dog", "owl", "newt")


def card(shape: tuple[int, int, int] = SHAPE, classes: tuple[str, ...] = CLASSES, sigma: float = 0.25) -> Card:
    return Card(
        architecture="cnn",
        options={},
        classes=classes,
        input=shape,
        mean=(0.0,) * shape[0],
        std=(1.0,) * shape[0],
        threat={"norm": "l2", "eps": 0.5},
        role="student",
        recipe={"name": "smooth", "sigma": sigma} if sigma else {"name": "plain"},
        seed=0,
        data={"name": "made up", "fingerprint": "none"},
        metrics={},
        versions={},
    )


def network(of: Card, *, scale: float = 8.0, channels: int | None = None, metadata: str | None = "card") -> bytes:
    """A convolution, ReLU, the mean and a linear layer with random weights, as ``model.onnx`` has them."""
    random = np.random.default_rng(0)
    c, h, w = of.input
    c = channels or c
    weights = {
        "filters": random.normal(0, 0.3, (8, c, 3, 3)),
        "weight": random.normal(0, scale / 8, (len(of.classes), 8 * h * w)),
        "mean": np.full((1, 1, 1, 1), 0.5),
    }
    nodes = [
        helper.make_node("Sub", ["images", "mean"], ["centred"]),
        helper.make_node("Conv", ["centred", "filters"], ["maps"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["maps"], ["active"]),
        helper.make_node("Flatten", ["active"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weight"], ["logits"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "made-up",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", c, h, w])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(of.classes)])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    if metadata is not None:
        helper.set_model_props(model, {KEY: of.to_json() if metadata == "card" else metadata})
    onnx.checker.check_model(model)
    return model.SerializeToString()


def make(folder: Path, of: Card | None = None, *, evidence: dict[str, Any] | None = None, **how: Any) -> Path:
    """A bundle of ``network`` in ``folder``."""
    of = of or card()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(network(of, **how))
    (folder / "card.json").write_text(of.to_json() + "\n", encoding="utf-8")
    found = {"passed": True, "precision": "fp32"} if evidence is None else evidence
    (folder / "evidence.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    bundle.write_sums(folder)
    return folder
