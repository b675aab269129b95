"""The form of a model that is attacked: a copy with every normalisation folded, for inference and input gradients."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fdml.models.conv import convolution
from fdml.models.norm import ConvNorm
from fdml.models.robust import Outputs, RobustModel

SMALLEST = 8
"""Rows of the smallest batch that the network is given on a CPU; matrix products of fewer rows round differently."""


class Folded(nn.Module):
    """A ``ConvNorm`` of inference: one convolution with constant weights."""

    weight: Tensor
    bias: Tensor

    def __init__(self, unit: ConvNorm) -> None:
        super().__init__()
        weight, bias = unit.folded()
        self.register_buffer("weight", weight.detach().contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", bias.detach().clone())
        self.stride, self.padding = unit.conv.stride, (unit.conv.kernel_size[0] // 2,) * 2

    def forward(self, x: Tensor) -> Tensor:
        return convolution(x, self.weight, self.bias, self.stride, self.padding)


class Frozen(nn.Module):
    """A callable from images in [0, 1] to logits, equal to ``model`` in eval mode up to rounding, and faster.

    On a CPU a batch of fewer than ``SMALLEST`` images is filled up, so that what is computed for an image is the same
    to the last bit whatever the images beside it: the outcome of an attack then depends on no batch size.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        model = copy.deepcopy(model).eval().requires_grad_(False)
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, ConvNorm):
                    setattr(parent, name, Folded(child))
        self.model = model
        self.tap_names = getattr(model, "tap_names", ())

    def forward(self, x: Tensor) -> Tensor:
        return self._filled(self.model, x)

    def outputs(self, x: Tensor) -> Outputs:
        """Logits and taps."""
        assert isinstance(self.model, RobustModel)
        logits, taps = self._filled(self.model.outputs, x)
        return Outputs(logits, taps)

    def _filled(self, look: Callable[[Tensor], Any], x: Tensor) -> Any:
        x = x.contiguous(memory_format=torch.channels_last)
        missing = SMALLEST - len(x) if x.device.type == "cpu" else 0
        if missing <= 0 or not len(x):
            return look(x)
        found = look(torch.cat([x, x[-1:].detach().expand(missing, -1, -1, -1)]))
        if isinstance(found, Tensor):
            return found[: len(x)]
        return found.logits[: len(x)], {name: tap[: len(x)] for name, tap in found.taps.items()}
