import gzip

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx
from onnx import TensorProto, helper, numpy_helper

from fdml.certify import runner as module
from fdml.certify.runner import OnnxRunner
from fdml.errors import InputError

WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3) - 5


def linear(shape, *, flat=("Flatten",), ir=8, listed=False, kind=TensorProto.FLOAT) -> bytes:
    """y = x @ WEIGHT after the nodes ``flat``: Flatten, or a Reshape to a given shape."""
    initializers = [numpy_helper.from_array(WEIGHT, "w")]
    if flat == ("Flatten",):
        nodes = [helper.make_node("Flatten", ["x"], ["f"], axis=1)]
    else:
        initializers.append(numpy_helper.from_array(np.array(flat, np.int64), "s"))
        nodes = [helper.make_node("Reshape", ["x", "s"], ["f"])]
    nodes.append(helper.make_node("MatMul", ["f", "w"], ["y"]))
    inputs = [helper.make_tensor_value_info("x", kind, shape)]
    if listed:
        inputs.insert(0, helper.make_tensor_value_info("w", TensorProto.FLOAT, WEIGHT.shape))
    graph = helper.make_graph(
        nodes, "linear", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], initializers
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=ir)
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        (["batch", 4], {}),
        (["batch", 2, 2], {}),
        ([1, 4, 1], {}),
        ([1, 1, 2, 2], {"ir": 3, "listed": True}),
        ([4], {"flat": (1, 4)}),
        ([2, 2], {"flat": (1, 4)}),
        (["batch", 2, 2], {"flat": (1, 4)}),  # says any batch, takes one
    ],
    ids=str,
)
def test_rows_go_in_and_come_out_flat(shape, settings):
    runner = OnnxRunner(linear(shape, **settings))
    assert (runner.inputs, runner.outputs) == (4, 3)
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    for rows in (x, x[:1], x[:0]):
        found = runner.run(rows)
        assert found.dtype == np.float32
        assert found.shape == (len(rows), 3)
        np.testing.assert_allclose(found, rows @ WEIGHT, rtol=1e-5, atol=1e-5)


def test_a_batch_that_mixes_rows_is_run_row_by_row():
    # A softmax over the batch axis: two rows together differ from each alone.
    graph = helper.make_graph(
        [helper.make_node("Softmax", ["x"], ["y"], axis=0)],
        "mixing",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    found = OnnxRunner(model.SerializeToString()).run(np.eye(4, dtype=np.float32))
    np.testing.assert_array_equal(found, np.ones((4, 4)))


def test_files_may_be_compressed(tmp_path, monkeypatch):
    plain, packed = tmp_path / "net.onnx", tmp_path / "net.onnx.gz"
    content = linear(["batch", 4])
    plain.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    x = np.ones((2, 4), np.float32)
    np.testing.assert_array_equal(OnnxRunner(plain).run(x), OnnxRunner(packed).run(x))
    monkeypatch.setattr(module, "LIMIT", 100)
    with pytest.raises(InputError, match="decompresses to 100 bytes or more"):
        OnnxRunner(packed)


def test_what_cannot_be_run_is_refused(tmp_path):
    broken = tmp_path / "net.onnx.gz"
    broken.write_bytes(gzip.compress(linear(["batch", 4]))[:-20])
    with pytest.raises(InputError, match=r"net\.onnx\.gz: cannot decompress it"):
        OnnxRunner(broken)
    with pytest.raises(InputError, match=r"none\.onnx: ONNX Runtime cannot read it"):
        OnnxRunner(tmp_path / "none.onnx")
    with pytest.raises(InputError, match="cannot read it"):
        OnnxRunner(b"no model")
    with pytest.raises(InputError, match="fixed shape"):
        OnnxRunner(linear(["batch", 2, "width"]))
    with pytest.raises(InputError, match="ONNX Runtime cannot"):
        OnnxRunner(linear([1, 5]))
    with pytest.raises(InputError, match=r"\(1, 3\) were given, but \(b, 4\)"):
        OnnxRunner(linear([1, 4])).run(np.zeros((1, 3), np.float32))


def test_one_float32_input_and_one_output_are_needed():
    def identities(count: int, kind: int) -> bytes:
        graph = helper.make_graph(
            [helper.make_node("Identity", [f"x{i}"], [f"y{i}"]) for i in range(count)],
            "identities",
            [helper.make_tensor_value_info(f"x{i}", kind, [1, 4]) for i in range(count)],
            [helper.make_tensor_value_info(f"y{i}", kind, [1, 4]) for i in range(count)],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=8)
        onnx.checker.check_model(model)
        return model.SerializeToString()

    with pytest.raises(InputError, match=r"one input and one output are needed, not \(x0, x1\)"):
        OnnxRunner(identities(2, TensorProto.FLOAT))
    with pytest.raises(InputError, match="float32 of a fixed shape"):
        OnnxRunner(identities(1, TensorProto.DOUBLE))
