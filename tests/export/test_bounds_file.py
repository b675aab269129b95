"""bounds.onnx: interval bounds that nothing breaks, rounding included, and files that are refused."""

import json
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import call
from small_bundle import card, make, network

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from fdml import bundle, load  # noqa: E402
from fdml.boxed import Boxed  # noqa: E402
from fdml.bundle import BundleError  # noqa: E402
from fdml.data import load as data  # noqa: E402
from fdml.errors import InputError  # noqa: E402
from fdml.export.bounds import bounded  # noqa: E402
from fdml.export.convert import convert  # noqa: E402
from fdml.interval import box  # noqa: E402
from fdml.models import RobustModel, build  # noqa: E402
from fdml.runtime import RobustClassifier  # noqa: E402

DIGITS = data("digits")
CPU = ["CPUExecutionProvider"]
EPS = (0.0, 1e-7, 1e-5, 1e-3, 0.02, 0.3)


def run(model: Any, x: np.ndarray, eps: float | None = None) -> Any:
    """What ONNX Runtime makes of images (n, c, h, w)."""
    feed = {"images": x} if eps is None else {"images": x, "eps": np.array(eps, np.float32)}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    found = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=CPU).run(None, feed)
    return found[0] if eps is None else found


def bounds_of(model: Any) -> Any:
    return bounded(model, "0" * 64)


def of(nodes: Sequence[Any], weights: dict[str, Any], shape: tuple[int, int, int], classes: int) -> Any:
    """A network from ``images`` to ``logits``."""
    graph = helper.make_graph(
        nodes,
        "made-up",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", *shape])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes])],
        [
            numpy_helper.from_array(value if value.dtype == np.int64 else value.astype(np.float32), name)
            for name, value in ((name, np.asarray(value)) for name, value in weights.items())
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def backbone(architecture: str, shape: tuple[int, int, int], **options: Any) -> RobustModel:
    """With statistics of BatchNorm as after training."""
    mean, std = (0.3,) * shape[0], (0.37,) * shape[0]
    model = build(architecture, input=shape, classes=5, mean=mean, std=std, options=options).train()
    for _ in range(3):
        model(torch.rand(16, *shape))
    return model.eval()


def exact_margins(model: RobustModel, x: torch.Tensor, eps: float, labels: np.ndarray) -> np.ndarray:
    """Interval bounds in float64 by another way: lower and upper ends, through the torch model itself."""
    model = model.double()
    with torch.no_grad():
        affine: Any = model(box(x.double(), x.double(), eps)).affine
        low, high = affine.x.ends
        assert affine.bias is not None
        differences = affine.weight[labels][:, None] - affine.weight
        shift = affine.bias[labels][:, None] - affine.bias
        worst = torch.where(differences > 0, low[:, None], high[:, None])
        margins = (differences * worst).sum(2) + shift
    margins[torch.arange(len(x)), torch.from_numpy(labels)] = torch.inf
    model.float()
    return margins.min(1).values.numpy()


@pytest.mark.parametrize(
    ("architecture", "shape", "options"),
    [
        ("cnn", (1, 8, 8), {"width": 4}),
        ("cnn", (3, 17, 20), {"width": 2}),
        ("wrn-10-1", (3, 8, 8), {}),  # with skips, and with a BatchNormalization of its own
    ],
)
def test_bounds_are_interval_bounds(architecture: str, shape: tuple[int, int, int], options: dict) -> None:
    model = backbone(architecture, shape, **options)
    proto = convert(model, card(shape=shape, classes=("a", "b", "c", "d", "e")))
    bounds = bounds_of(proto)
    x = torch.rand(7, *shape)
    x[0], x[1] = 0, 1
    answers = run(proto, x.numpy()).argmax(1)
    for eps in EPS:
        labels, margins = run(bounds, x.numpy(), eps)
        assert (labels == answers).all()
        exact = exact_margins(model, x, float(np.float32(eps)), labels)
        # What rounding takes is no more than a box that is larger by a hundredth of a grey level would.
        assert (margins <= exact).all()
        assert (margins >= exact_margins(model, x, eps + 4e-5, labels) - 2e-3 * np.abs(exact)).all()


def plain(seed: int, *, widths: Sequence[int] = (4, 6), scale: float = 1.0) -> Any:
    """A small network with a skip, every operator of ours, and some that ours do not have."""
    random = np.random.default_rng(seed)
    one, two = widths
    weights = {
        "shift": random.normal(0, 0.3, (1, 3, 1, 1)),
        "std": random.uniform(0.2, 0.5, (1, 3, 1, 1)),
        "w1": random.normal(0, scale * 0.3, (one, 3, 3, 3)),
        "b1": random.normal(0, scale * 0.3, one),
        "w2": random.normal(0, 0.2, (one, one, 3, 3)),
        "three": random.normal(0, 2, (one, 1, 1)),
        "w3": random.normal(0, 0.2, (two, one, 3, 3)),
        "axes": np.array([2, 3]),
        "w4": random.normal(0, 1, (two, 5)),
        "b4": random.normal(0, 0.1, 5) / scale,
        "w5": random.normal(0, 1, (3, 5)) / scale,
    }
    nodes = [
        helper.make_node("Sub", ["images", "shift"], ["sub"]),
        helper.make_node("Div", ["sub", "std"], ["div"]),
        helper.make_node("Conv", ["div", "w1", "b1"], ["conv1"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["conv1"], ["relu1"]),
        helper.make_node("Conv", ["relu1", "w2"], ["conv2"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["conv2", "relu1"], ["skip"]),
        helper.make_node("Mul", ["three", "skip"], ["scaled"]),
        helper.make_node("Relu", ["scaled"], ["relu2"]),
        helper.make_node("AveragePool", ["relu2"], ["pooled"], kernel_shape=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["pooled", "w3"], ["conv3"], strides=[2, 2]),
        helper.make_node("Relu", ["conv3"], ["relu3"]),
        helper.make_node("GlobalAveragePool", ["relu3"], ["pooled3"]),
        helper.make_node("Flatten", ["pooled3"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w4", "b4"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("Gemm", ["active", "w5"], ["logits"], transB=1),
    ]
    return of(nodes, weights, (3, 8, 8), 3)


def inside(x: np.ndarray, z: np.ndarray, eps: float) -> np.ndarray:
    """``z`` moved into the box of real numbers around ``x``, to the last bit."""
    z = np.clip(z, 0, 1).astype(np.float32)
    for _ in range(4):
        out = np.abs(z.astype(np.float64) - x) > eps
        z = np.where(out, np.nextafter(z, x), z)
    return np.where(np.abs(z.astype(np.float64) - x) > eps, x, z)


def corners(model: Callable[[torch.Tensor], torch.Tensor], x: np.ndarray, label: int, eps: float) -> np.ndarray:
    """Points of the box at which the answer is likely to change: random ones, random corners, signs of gradients."""
    random = np.random.default_rng(0)
    steps = [random.uniform(-1, 1, (12, *x.shape)), random.choice([-1.0, 1.0], (12, *x.shape))]
    z = torch.from_numpy(x[None]).expand(10, -1, -1, -1).contiguous()  # one for each class to be mistaken for
    for _ in range(4):
        z.requires_grad_()
        logits = model(z)
        (slopes,) = torch.autograd.grad((logits.diag() - logits[:, label]).sum(), z)
        steps.append(slopes.sign().numpy())
        z = torch.from_numpy(np.clip(x + eps * steps[-1], 0, 1).astype(np.float32))
    return inside(x, np.concatenate([x + eps * step for step in steps]), eps)


@pytest.fixture(scope="module")
def made(noisy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bounds") / "one"
    code, text, err = call("export", noisy, "--limit", 8, "--out", out, "--bounds", "--json")
    assert (code, err) == (0, "")
    assert json.loads(text)["passed"] is True
    assert "bounds.onnx" in bundle.read(out).files
    return out


def test_no_point_of_the_box_breaks_a_claim(noisy: Path, made: Path) -> None:
    model, clf = load(noisy), RobustClassifier.load(made, threads=1)
    boxed = Boxed.load(bundle.read(made), threads=1)
    assert boxed is not None
    x, y = (part.numpy() for part in DIGITS.test.head(12).all()[1:])
    radii = []
    for image in x:
        found = boxed.radius(image)
        assert found == boxed.radius(image)
        assert found.index == clf.predict(image).index
        assert found.certified == boxed.bound(image, found.eps).certified
        if found.certified:
            radii.append(found.eps)
            for eps in (1e-7, found.eps):
                points = corners(model, image, found.index, eps)
                assert (clf.logits(points).argmax(1) == found.index).all()
        assert not boxed.bound(image, 0.5).certified
    assert len(radii) > 8
    assert max(radii) > 0.002
    assert (np.array(y) == [prediction.index for prediction in clf.predict(x)]).mean() > 0.8


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_margins_hold_at_every_point_in_float32_and_float64(scale: float) -> None:
    """The margin itself, not its sign alone; where eps is so small that rounding is all there is, too."""
    shown = 0
    for seed in range(6):
        proto = plain(seed, scale=scale)
        bounds = bounds_of(proto)
        random = np.random.default_rng(seed)
        x = random.random((3, 8, 8), np.float32)
        for eps in EPS:
            (label,), (margin,) = run(bounds, x[None], eps)
            shown += margin > 0
            points = [x + eps * random.choice([-1.0, 0.0, 1.0], x.shape) for _ in range(20)]
            logits = run(proto, inside(x, np.array([x, *points]), float(np.float32(eps)))).astype(np.float64)
            others = np.delete(logits, label, axis=1)
            assert (logits[:, label, None] - others >= margin).all()
    assert shown > 5, "the test would say nothing of bounds that never claim"


def test_rounding_deceives_no_claim() -> None:
    """0 + 2²⁴ x0 + x1 − 2²⁴ x2 is 3/4 at (1, 3/4, 1), and 0 in float32: the exact network answers 1, float32 0.

    Bounds in float32 that did not count rounding would claim the latter with a margin of 1/2.
    """
    first = np.zeros((1, 4))
    first[0] = [2.0**24, 1, -(2.0**24), 0]
    weights = {"w1": first, "w2": [[0.0], [1.0]], "b2": [0.5, 0.0]}
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w1"], ["sum"], transB=1),
        helper.make_node("Relu", ["sum"], ["active"]),
        helper.make_node("Gemm", ["active", "w2", "b2"], ["logits"], transB=1),
    ]
    proto = of(nodes, weights, (1, 2, 2), 2)
    x = np.array([1, 0.75, 1, 0], np.float32).reshape(1, 1, 2, 2)
    exact = sum((Fraction(w) * Fraction(float(v)) for w, v in zip(first[0], x.reshape(-1), strict=True)), Fraction(0))
    assert exact == Fraction(3, 4)
    assert run(proto, x).tolist() == [[0.5, 0]], "this is what deceives"
    for eps in (0.0, 1e-9):
        (label,), (margin,) = run(bounds_of(proto), x, eps)
        assert label == 0
        assert margin <= -0.25


@pytest.mark.parametrize("channels", [1, 3, 16])
def test_convolutions_add_products_and_nothing_else(channels: int) -> None:
    """An enormous pixel spoils no output that it is not in, as it would in Winograd's algorithm."""
    random = np.random.default_rng(0)
    weight = random.integers(-7, 8, (16, channels, 3, 3))
    x = random.integers(0, 8, (1, channels, 16, 16)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["maps"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["maps"], ["active"]),
            helper.make_node("Conv", ["active", "v"], ["y"], pads=[0, 0, 0, 0]),
        ],
        "sums",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, channels, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 16, 14, 14])],
        [
            numpy_helper.from_array(weight.astype(np.float32), "w"),
            numpy_helper.from_array(random.integers(-7, 8, (16, 16, 3, 3)).astype(np.float32), "v"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=CPU)
    (before,) = session.run(None, {"x": x})
    x[0, :, 5, 5] = 2.0**70
    (after,) = session.run(None, {"x": x})
    far = np.ones((14, 14), bool)
    far[2:7, 2:7] = False
    assert (before == before.round()).all()
    assert (before[..., far] == after[..., far]).all()
    assert (before[..., ~far] != after[..., ~far]).any()


def test_pixels_and_eps_out_of_range_show_nothing() -> None:
    bounds = bounds_of(plain(0))
    x = np.full((4, 3, 8, 8), 0.5, np.float32)
    x[1, 0, 0, 0], x[2, 1, 2, 3], x[3, 2, 7, 7] = 1.001, np.nan, -1e-9
    margins = run(bounds, x, 0.0)[1]
    assert np.isfinite(margins).tolist() == [True, False, False, False]
    for eps in (-1e-9, np.nan):
        assert (run(bounds, x, eps)[1] == -np.inf).all()


def test_what_is_not_covered_is_refused_by_name() -> None:
    for kind in ("Sigmoid", "MaxPool"):
        how = {"kernel_shape": [2, 2]} if kind == "MaxPool" else {}
        proto = plain(0)
        node = proto.graph.node[7]
        assert node.op_type == "Relu"
        node.op_type = kind
        node.attribute.extend(helper.make_attribute(name, value) for name, value in how.items())
        with pytest.raises(InputError, match=f"^--bounds: {kind} node relu2: bounds do not cover this operator"):
            bounds_of(proto)
    proto = plain(0)
    proto.graph.node[13].attribute.append(helper.make_attribute("alpha", 2.0))
    with pytest.raises(InputError, match="Gemm node hidden: transA, alpha and beta"):
        bounds_of(proto)
    proto = plain(0)
    proto.graph.node[5].input[1] = "images"
    proto.graph.node[5].op_type = "Mul"
    with pytest.raises(InputError, match="Mul node skip: its input images is no constant"):
        bounds_of(proto)
    proto = plain(0)
    proto.graph.node[-1].op_type = "Relu"
    with pytest.raises(InputError, match="Relu node logits: the last operator must be a Gemm"):
        bounds_of(proto)
    proto = onnx.load_from_string(network(card()))
    proto.opset_import[0].version = 17
    with pytest.raises(InputError, match="of opset 17: bounds need 18 or more"):
        bounds_of(proto)


@pytest.mark.parametrize("scale", [1e32, np.inf, np.nan])
def test_a_network_whose_bounds_overflow_is_refused(scale: float) -> None:
    proto = plain(0)
    (place,) = [place for place, entry in enumerate(proto.graph.initializer) if entry.name == "w2"]
    weight = numpy_helper.to_array(proto.graph.initializer[place]) * np.float32(scale)
    proto.graph.initializer[place].CopyFrom(numpy_helper.from_array(weight, "w2"))
    with pytest.raises(InputError, match="overflow"):
        bounds_of(proto)


def test_the_runtime_certifies(made: Path, tmp_path: Path) -> None:
    clf = RobustClassifier.load(made, "cpu")
    x = DIGITS.test.head(4).all()[1].numpy()
    found = clf.certified_linf(x, 1e-3)
    assert [each.label for each in found] == [each.label for each in clf.predict(x)]
    assert {each.eps for each in found} == {1e-3}
    assert found[1:2] == clf.certified_linf(x[1], 1e-3), "each image by itself"
    assert not any(each.certified for each in clf.certified_linf(x, 0.5))
    for eps in (-0.1, 8, float("nan")):
        with pytest.raises(InputError, match="out of range: 0 to 1, in pixel units"):
            clf.certified_linf(x, eps)
    with pytest.raises(InputError, match="the pixel 2"):
        clf.certified_linf(2 * np.ones_like(x), 0.1)
    clf.provider = "cuda"
    with pytest.raises(InputError, match="bounds hold on a CPU, not on cuda"):
        clf.certified_linf(x, 1e-3)
    bare = RobustClassifier.load(make(tmp_path / "bare"))
    with pytest.raises(InputError, match=r"bare: has no bounds.onnx to certify by: fdml export --bounds writes it"):
        bare.certified_linf(np.zeros((3, 8, 8), np.float32), 0.1)


def test_eps_is_rounded_so_that_the_claim_holds(made: Path) -> None:
    boxed = Boxed.load(bundle.read(made))
    assert boxed is not None
    image = DIGITS.test.head(1).all()[1][0].numpy()
    fed: list[float] = []
    answer = boxed._run
    boxed._run = lambda names, feed: fed.append(float(feed["eps"])) or answer(names, feed)
    assert boxed.bound(image, 0.3).eps == 0.3 <= fed[-1]
    found = boxed.radius(image, largest=0.7)
    assert found.certified
    assert found.eps in fed, "what is reported was itself shown"
    assert max(fed) <= 0.7
    with pytest.raises(InputError, match="bisection stops between"):
        boxed.radius(image, fine=0)


def test_bounds_of_another_network_are_refused(made: Path, tmp_path: Path) -> None:
    def broken(content: bytes, after: Callable[[Path], object] = bundle.write_sums) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for path in made.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / "bounds.onnx").write_bytes(content)
        after(folder)
        return folder

    content = (made / "bounds.onnx").read_bytes()
    for wrong, said in (
        (bounded(plain(0), "0" * 64).SerializeToString(), "does not bound the model.onnx beside it"),
        ((made / "model.onnx").read_bytes(), "does not bound the model.onnx beside it"),
        (content[: len(content) // 2], "ONNX Runtime cannot read it"),
    ):
        clf = RobustClassifier.load(broken(wrong))
        with pytest.raises(BundleError, match=said) as error:
            clf.certified_linf(np.zeros((1, 8, 8), np.float32), 0.1)
        assert "\n" not in str(error.value)
    clf = RobustClassifier.load(folder := broken(content))
    (folder / "bounds.onnx").write_bytes(content + b"\0")
    with pytest.raises(BundleError, match="was exchanged since"):
        clf.certified_linf(np.zeros((1, 8, 8), np.float32), 0.1)
    with pytest.raises(BundleError, match=r"bounds.onnx: its SHA-256 is"):
        RobustClassifier.load(folder)


def test_only_full_precision_is_bounded(noisy: Path, tmp_path: Path) -> None:
    for precision in ("int8", "fp16"):
        code, _, err = call("export", noisy, "--out", tmp_path / "bundle", "--bounds", f"--{precision}")
        assert code == 2
        assert err == f"fdml: --bounds proves what fp32 answers, not {precision}: export one or the other\n"
    assert not list(tmp_path.iterdir())
