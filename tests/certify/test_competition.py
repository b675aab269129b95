"""`fdml certify NET.onnx --vnnlib FILE` as a command, and as other programs call it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fdml.certify.competition import decide
from fdml.errors import InputError

HEAD = "(declare-const X_0 Real)(declare-const X_1 Real)(declare-const Y_0 Real)(declare-const Y_1 Real)"
BOX = "(assert (>= X_0 -1))(assert (<= X_0 1))(assert (>= X_1 -1))(assert (<= X_1 1))"


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """y = (|x0| + |x1|, x0): by hand, so that every answer is known."""
    first = np.array([[1, -1, 0, 0, 1, -1], [0, 0, 1, -1, 0, 0]], np.float32)
    second = np.array([[1, 0], [1, 0], [1, 0], [1, 0], [0, 1], [0, -1]], np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "second"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "by-hand",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
        [numpy_helper.from_array(first, "first"), numpy_helper.from_array(second, "second")],
    )
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def property_file(network: Path, asserts: str, box: str = BOX) -> Path:
    path = network.parent / "property.vnnlib"
    path.write_text(f"{HEAD}\n{box}\n{asserts}\n")
    return path


@pytest.mark.parametrize(
    ("asserts", "verdict"),
    [
        ("(assert (>= Y_0 2.001))", "unsat"),
        ("(assert (>= Y_0 1.99))", "sat"),
        ("(assert (<= Y_0 -0.001))", "unsat"),
        ("(assert (>= Y_1 1.01))", "unsat"),
        ("(assert (or (and (>= Y_1 1.01)) (and (>= Y_0 1.9))))", "sat"),
        ("(assert (or (>= Y_1 1.01) (<= Y_0 -0.01)))", "unsat"),
        ("(assert (>= Y_1 0.5))(assert (<= Y_0 0.49))", "unsat"),
        ("(assert (>= Y_1 0.5))(assert (<= Y_0 0.6))", "sat"),
    ],
)
def test_verdicts_that_are_known_by_hand(network: Path, asserts: str, verdict: str, tmp_path: Path) -> None:
    out = tmp_path / "counterexample"
    found = decide(network, property_file(network, asserts), timeout=20, out=out)
    assert found.word == verdict
    assert out.exists() == (verdict == "sat")
    if verdict == "sat":
        values = [
            float(word.rstrip(")")) for word in out.read_text().split() if not word.startswith(("(", "((", "Y", "X"))
        ]
        x0, x1, y0, y1 = values
        assert max(abs(x0), abs(x1)) <= 1
        assert y0 == pytest.approx(abs(x0) + abs(x1))
        assert y1 == pytest.approx(x0)


def test_the_command_prints_the_verdict_alone(network: Path) -> None:
    path = property_file(network, "(assert (>= Y_0 2.5))")

    def run(*more: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "fdml", "certify", str(network), "--vnnlib", str(path), "--timeout", "20"]
        return subprocess.run([*command, *more], capture_output=True, text=True, cwd=network.parent)

    plain = run()
    assert (plain.stdout, plain.stderr, plain.returncode) == ("unsat\n", "", 0)
    found = json.loads(run("--json").stdout)
    assert set(found) == {"verdict", "seconds", "method", "bound", "domains", "counterexample"}
    assert (found["verdict"], found["counterexample"]) == ("unsat", None)
    assert 0 < found["bound"] <= 0.5
    path.write_text(HEAD + BOX + "(assert (>= Y_0 2.5)")
    broken = run()
    assert broken.returncode == 2
    assert broken.stdout == ""
    assert broken.stderr.count("\n") == 1
    assert "property.vnnlib:1:" in broken.stderr


def test_what_does_not_fit_is_refused(network: Path) -> None:
    path = property_file(network, "(assert (>= Y_5 1))")
    with pytest.raises(InputError, match="Y_5"):
        decide(network, path, timeout=5)
    with pytest.raises(InputError, match="--timeout 0"):
        decide(network, path, timeout=0)
    with pytest.raises(InputError, match="ONNX"):
        decide(path, path, timeout=5)
