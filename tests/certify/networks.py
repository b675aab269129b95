"""Small random networks, made of the nodes that bounds are computed over."""

import itertools

import numpy as np
import torch
from torch import Tensor

from fdml.certify.graph import Network, _simplified
from fdml.certify.lowering import Builder, _conv, _max_pool


def dense(*sizes: int, seed: int = 0, kind: str = "relu") -> Network:
    """Fully connected layers with ``kind`` between them."""
    random = np.random.default_rng(seed)
    builder = Builder()
    x = builder.emit(None, [], (sizes[0],))
    for i, (before, after) in enumerate(itertools.pairwise(sizes)):
        x = builder.dense(x, random.normal(size=(after, before)) / before**0.5, 0.3 * random.normal(size=after))
        if i < len(sizes) - 2:
            x = builder.activation(kind, x)
    return finished(builder)


def any_network(seed: int) -> Network:
    """Fully connected, convolutional or residual, with mixed activations."""
    random = np.random.default_rng(seed)
    builder = Builder()
    kinds = ["relu"] if seed % 2 else ["relu", "sigmoid", "tanh", "leaky", "abs"]

    def activated(x):
        kind = random.choice(kinds)
        if kind in ("leaky", "abs"):
            return builder.sloped(x, np.array(0.2 if kind == "leaky" else -1.0))
        return builder.activation(str(kind), x)

    def layer(x, width):
        weight = 2 * random.normal(size=(width, x.shape[-1])) / x.shape[-1] ** 0.5
        return builder.dense(x, weight, 0.5 * random.normal(size=width))

    if seed % 3 == 0:
        x = builder.emit(None, [], (5,))
        for _ in range(random.integers(1, 4)):
            x = activated(layer(x, int(random.integers(3, 12))))
    else:
        x = builder.emit(None, [], (1, 2, 4, 4))
        for depth in range(random.integers(1, 3)):
            channels = 2 if seed % 3 == 1 else 3
            weight = random.normal(size=(channels, x.shape[1], 3, 3)) / 2
            step = {"pads": [1, 1, 1, 1]} if seed % 3 == 1 else {"strides": [2, 2], "pads": [1, 0, 1, 1]}
            y = activated(_conv(builder, [x, weight, random.normal(size=channels) / 2], step))
            x = builder.sum(x, y, 1 if depth else -1) if seed % 3 == 1 else y
        if seed % 5 == 0 and x.shape[-1] > 1:
            x = _max_pool(builder, [x], {"kernel_shape": [2, 2], "strides": [2, 2]})
        x = builder.view(x, (1, int(np.prod(x.shape))))
    layer(x, 3)
    return finished(builder)


def finished(builder: Builder) -> Network:
    return Network(_simplified(builder.nodes), torch.float64)


def values(network: Network, x: Tensor) -> list[Tensor]:
    """Of every node, differentiable."""
    found = [x.reshape(-1, *network.nodes[0].shape)]
    for node in network.nodes[1:]:
        assert node.operator is not None
        found.append(node.operator.forward(*(found[j] for j in node.inputs)))  # pyright: ignore
    return found
