import time

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from networks import any_network, dense

from fdml.certify.graph import Network
from fdml.certify.property import Clause, Property
from fdml.certify.region import robust
from fdml.certify.verify import Verdict, verify


class Runner:
    """Our own network in float32 in the place of an ONNX file."""

    def __init__(self, network: Network) -> None:
        self.network = network

    def run(self, x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.network.single.forward(torch.from_numpy(x)).numpy()


def decided(network: Network, *properties: Property, **settings) -> Verdict:
    settings = {"timeout": 30, "runner": Runner(network)} | settings
    return verify(network, properties, **settings)  # pyright: ignore


def image(network: Network, seed: int = 0) -> tuple[torch.Tensor, int]:
    x = torch.rand(network.inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x, int(network.forward(x[None]).argmax())


def test_verdicts_change_with_eps_and_counter_examples_are_real() -> None:
    network = dense(30, 24, 24, 24, 5, seed=1)
    x, label = image(network)
    seen = []
    for eps in (1e-4, 0.02, 0.05, 0.1, 0.2, 0.4):
        prop = robust(x, label, 5, norm="linf", eps=eps)
        verdict = decided(network, prop)
        seen.append(verdict.status)
        if verdict.status == "falsified":
            assert verdict.x is not None
            assert verdict.y is not None
            assert verdict.x.dtype == verdict.y.dtype == np.float32
            assert (verdict.x.astype(np.float64) >= prop.lower.numpy()).all()
            assert (verdict.x.astype(np.float64) <= prop.upper.numpy()).all()
            assert np.delete(verdict.y, label).max() >= verdict.y[label]
        else:
            assert verdict.bound > 0
    assert seen[0] == "certified"
    assert seen[-1] == "falsified"
    assert seen == sorted(seen)


@pytest.mark.parametrize("seed", range(6))
def test_certified_is_never_said_where_points_refute(seed: int) -> None:
    network = any_network(seed)
    x, label = image(network, seed)
    prop = robust(x, label, 3, norm="l2" if seed % 2 else "linf", eps=0.3)
    verdict = decided(network, prop, timeout=3)
    points = prop.lower + torch.rand(4000, network.inputs, dtype=torch.float64) * (prop.upper - prop.lower)
    if prop.radius is not None and prop.center is not None:
        points = points[(points - prop.center).norm(dim=1) <= prop.radius]
    y = network.forward(points)
    refuted = bool((y.argmax(1) != label).any())
    assert not (refuted and verdict.status == "certified")
    if verdict.status == "certified":
        margin = y[:, label] - y.scatter(1, torch.full((len(y), 1), label), -torch.inf).amax(1)
        assert len(y) == 0 or verdict.bound <= margin.min()


def test_without_a_runner_nothing_is_falsified() -> None:
    network = dense(30, 10, 3, seed=2)
    x, label = image(network)
    prop = robust(x, label, 3, norm="linf", eps=0.5)
    assert decided(network, prop).status == "falsified"
    assert decided(network, prop, runner=None, timeout=1).status in ("unknown", "timeout")
    assert decided(network, prop, attack=False, split=False).status == "unknown"


def test_one_refuted_region_refutes_all() -> None:
    network = dense(4, 10, 3, seed=2)
    x, label = image(network)
    held = robust(x, label, 3, norm="linf", eps=1e-4)
    broken = robust(x, (label + 1) % 3, 3, norm="linf", eps=1e-4)
    assert decided(network, held).status == "certified"
    assert decided(network, held, held).status == "certified"
    assert decided(network, held, broken).status == "falsified"
    assert decided(network).status == "certified"  # of nothing there is nothing to refute


def test_a_conjunction_of_rows_is_outside_where_one_row_is() -> None:
    network = dense(3, 8, 2, seed=4)
    x, _ = image(network)
    y = network.forward(x[None])[0]
    weight = torch.eye(2, dtype=torch.float64)
    lower, upper = x - 1e-3, x + 1e-3
    apart = Clause(weight, torch.stack([1 - y[0], -1 - y[1]]))  # the second row fails
    short = Clause(weight[:1], -1 - y[:1])
    assert decided(network, Property(lower, upper, (apart, short))).status == "certified"
    met = Clause(weight, torch.stack([1 - y[0], 1 - y[1]]))
    assert decided(network, Property(lower, upper, (apart, met))).status == "falsified"


def test_the_time_limit_is_kept() -> None:
    network = dense(40, 60, 60, 60, 60, 10, seed=3)
    x, label = image(network)
    prop = robust(x, label, 10, norm="linf", eps=0.15)
    told = []
    begun = time.monotonic()
    verdict = decided(network, prop, runner=None, timeout=0.5, watch=lambda *args: told.append(args))
    if verdict.status == "timeout":  # no wall time is asserted: that the clock was looked at, is
        assert verdict.seconds >= 0.5
        assert verdict.bound <= 0
    assert time.monotonic() - begun >= verdict.seconds - 0.1
    methods = [method for method, _, _ in told]
    assert methods[0] == "crown"
    assert {"alpha-crown"} >= set(methods[1:]) - {"branch-and-bound"}


def test_a_verdict_does_not_depend_on_the_run() -> None:
    network = dense(30, 20, 20, 3, seed=5)
    x, label = image(network)
    prop = robust(x, label, 3, norm="linf", eps=0.08)
    one, other = decided(network, prop), decided(network, prop)
    assert (one.status, one.bound, one.domains) == (other.status, other.bound, other.domains)
