"""A network as a list of affine operators and activations: what bounds are computed over."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fdml.certify.operators import Activation, Conv, Dense, Operator, Scale
from fdml.errors import InputError


@dataclass(frozen=True)
class Node:
    """One value of an example: ``operator`` of the values at ``inputs``, earlier in the list. The first node, without
    an operator, is the input."""

    operator: Operator | None
    inputs: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Network:
    """Nodes in the order of their computation; the last one is the output. The constants are in ``dtype``."""

    nodes: tuple[Node, ...]
    dtype: torch.dtype

    @classmethod
    def read(cls, source: Path | bytes) -> "Network":
        """The network of an ONNX file (``.onnx`` or ``.onnx.gz``) or of its content, in float64.

        Raises ``InputError`` for a file that cannot be read, for an operator that the bounds do not cover, and where
        the network, run in float32, differs from ONNX Runtime on random points by more than rounding, or ONNX Runtime
        from itself.
        """
        from fdml.certify.lowering import lower

        nodes, what = lower(source)
        network = cls(_simplified(nodes), torch.float64)
        _compare(network, source, what)
        return network

    @property
    def inputs(self) -> int:
        return self.nodes[0].size

    @property
    def outputs(self) -> int:
        return self.nodes[-1].size

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> "Network":
        moved = [replace(node, operator=node.operator and node.operator.to(dtype, device)) for node in self.nodes]
        return Network(tuple(moved), dtype)

    @cached_property
    def single(self) -> "Network":
        """The network in float32: for the search, never for a proof."""
        return self.to(torch.float32)

    @cached_property
    def rounding(self) -> tuple[float, ...]:
        """For each node what rounding can add to a form that passes it, relative to its sum of absolute terms: of
        sums as long as the operator's in ``dtype``, and of one over the whole value in float64."""
        unit = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}[self.dtype]
        terms = (node.operator.terms if node.operator else 1 for node in self.nodes)
        whole = (node.size + len(self.nodes) for node in self.nodes)
        return tuple(4 * (n + 8) * unit + 4 * m * 2.0**-53 for n, m in zip(terms, whole, strict=True))

    @cached_property
    def activations(self) -> tuple[int, ...]:
        """The indices of the nodes that are activations."""
        return tuple(i for i, node in enumerate(self.nodes) if isinstance(node.operator, Activation))

    @cached_property
    def last_use(self) -> tuple[int, ...]:
        """For each node the index of the last node that reads it."""
        last = list(range(len(self.nodes)))
        for i, node in enumerate(self.nodes):
            for j in node.inputs:
                last[j] = i
        return tuple(last)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (b, m) of inputs (b, n), flat in C order, in the dtype of the network; differentiable."""
        values: dict[int, Tensor] = {0: x.to(self.dtype).reshape(-1, *self.nodes[0].shape)}
        for i, node in enumerate(self.nodes):
            if node.operator is not None:
                values[i] = node.operator.forward(*(values[j] for j in node.inputs))  # pyright: ignore
                for j in node.inputs:
                    if self.last_use[j] == i:
                        values.pop(j, None)
        return values[len(self.nodes) - 1].flatten(1)

    __call__ = forward


def _simplified(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """Without what the output does not need, and with scales folded into the affine operator before them."""
    nodes = _needed(nodes)
    readers = [0] * len(nodes)
    for node in nodes:
        for j in node.inputs:
            readers[j] += 1
    found: list[Node] = []
    place: list[int] = []  # of each old node in the new list
    for node in nodes:
        inputs = tuple(place[j] for j in node.inputs)
        folded = None
        if isinstance(node.operator, Scale) and readers[node.inputs[0]] == 1 and inputs[0] == len(found) - 1:
            folded = _folded(found[-1], node.operator)
        if folded is not None:
            found[-1] = folded
        else:
            found.append(replace(node, inputs=inputs))
        place.append(len(found) - 1)
    return tuple(found)


def _needed(nodes: Sequence[Node]) -> list[Node]:
    needed = {0, len(nodes) - 1}
    for i in range(len(nodes) - 1, 0, -1):
        if i in needed:
            needed.update(nodes[i].inputs)
    place = {old: new for new, old in enumerate(sorted(needed))}
    return [replace(nodes[old], inputs=tuple(place[j] for j in nodes[old].inputs)) for old in sorted(needed)]


def _folded(node: Node, after: Scale) -> Node | None:
    """``after`` of ``node`` as one node, where the scale is one number for each output channel."""
    operator, dims = node.operator, len(node.shape)
    axis = {Dense: dims - 1, Conv: 1}.get(type(operator))
    if isinstance(operator, Scale):
        scale, shift = operator.scale * after.scale, operator.shift * after.scale + after.shift
        return replace(node, operator=Scale(scale, shift))
    constants = [after.scale, after.shift]
    if axis is None or any(prod(c.shape) != c.shape[axis] for c in constants):
        return None
    assert isinstance(operator, Dense | Conv)
    scale, shift = (c.flatten().expand(node.shape[axis]) for c in constants)
    weight = operator.weight * scale.reshape(-1, *[1] * (operator.weight.dim() - 1))
    return replace(node, operator=replace(operator, weight=weight, bias=operator.bias * scale + shift))


def _compare(network: Network, source: Path | bytes, what: str) -> None:
    from fdml.certify.runner import OnnxRunner

    runner = OnnxRunner(source)
    if (runner.inputs, runner.outputs) != (network.inputs, network.outputs):
        raise InputError(
            f"{what}: it was read as a network of {network.inputs} inputs and {network.outputs} outputs, but ONNX "
            f"Runtime gives {runner.inputs} and {runner.outputs}"
        )
    points = np.random.default_rng(0).random((3, network.inputs)).astype(np.float32)
    found, again = runner.run(points), runner.run(points)
    if not np.array_equal(found, again, equal_nan=True):
        raise InputError(f"{what}: two runs on equal input differ, so there is no function to bound")
    with torch.no_grad():
        ours = network.forward(torch.from_numpy(points)).numpy()
    scale = max(1.0, float(np.abs(ours).max()))
    if not np.isfinite(found).all() or np.abs(found - ours).max() > 1e-3 * scale:
        raise InputError(
            f"{what}: the network as it was read differs from ONNX Runtime by {np.abs(found - ours).max():.3g} on "
            "random points, so bounds would not hold; randomised smoothing covers any network"
        )
