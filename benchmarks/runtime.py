"""What `RobustClassifier` adds to ONNX Runtime: time on a batch of 64, and to the first answer of a fresh process.

    python benchmarks/runtime.py                          # a small convolutional network that is made here
    python benchmarks/runtime.py --bundle DIR --threads 1

`clf.logits` and `InferenceSession.run` take turns on the same session and the same batch, which of them begins
changing every round; the ratio is the median over rounds. A fresh process imports `fdml.runtime`, loads the bundle and
classifies one image; its seconds are those of the whole interpreter, the best and the median of `--starts`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from blank import blank
from onnx import TensorProto, helper, numpy_helper

from fdml import bundle
from fdml.card import KEY
from fdml.runtime import RobustClassifier

START = """
import time
began = time.perf_counter()
import sys
import numpy as np
from fdml.runtime import RobustClassifier
clf = RobustClassifier.load(sys.argv[1])
clf.predict(np.zeros(clf.input, np.uint8))
assert "torch" not in sys.modules
print(time.perf_counter() - began)
"""


def made(folder: Path, width: int) -> Path:
    """A bundle of a small network for 32x32 images: two convolutions, the mean, a linear layer."""
    random = np.random.default_rng(0)
    shapes = {"first": (width, 3, 3, 3), "second": (width, width, 3, 3), "last": (10, width)}
    weights = {name: random.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    nodes = [
        helper.make_node("Conv", ["images", "first"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "second"], ["c"], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("GlobalAveragePool", ["d"], ["e"]),
        helper.make_node("Flatten", ["e"], ["f"]),
        helper.make_node("Gemm", ["f", "last"], ["logits"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    card = blank("cnn", {"width": width})
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {KEY: card.to_json()})
    onnx.save(model, folder / "model.onnx")
    (folder / "card.json").write_text(card.to_json(), encoding="utf-8")
    (folder / "evidence.json").write_text(json.dumps({"passed": True, "precision": "fp32"}), encoding="utf-8")
    bundle.write_sums(folder)
    return folder


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def overhead(clf: RobustClassifier, rounds: int) -> None:
    session = clf._opened.session
    x = np.random.default_rng(0).random((64, *clf.input), np.float32)
    calls = [lambda: session.run(["logits"], {"images": x}), lambda: clf.logits(x)]
    for call in calls * 3:
        call()
    taken: list[list[float]] = [[], []]
    for turn in range(rounds):
        for which in (0, 1) if turn % 2 else (1, 0):
            taken[which].append(seconds(calls[which]))
    bare, ours = taken
    ratio = statistics.median(b / a for a, b in zip(bare, ours, strict=True))
    milliseconds = [1000 * statistics.median(each) for each in taken]
    print(f"batch of 64 on {clf.provider}: run {milliseconds[0]:.3f} ms, logits {milliseconds[1]:.3f} ms")
    print(f"ratio, median of {rounds} pairs: {ratio:.4f}")


def start(folder: Path, times: int) -> None:
    inside, whole = [], []
    for _ in range(times):
        began = time.perf_counter()
        command = [sys.executable, "-c", START, str(folder)]
        inside.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        whole.append(time.perf_counter() - began)
    print(f"import, load, first answer: best {min(inside):.3f} s, median {statistics.median(inside):.3f} s")
    print(f"the whole process:          best {min(whole):.3f} s, median {statistics.median(whole):.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="a bundle of `fdml export`; without it a network is made")
    parser.add_argument("--width", type=int, default=32, help="channels of the network that is made")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--starts", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.bundle or made(Path(scratch), options.width)
        overhead(RobustClassifier.load(folder, threads=options.threads), options.rounds)
        start(folder, options.starts)


if __name__ == "__main__":
    main()
