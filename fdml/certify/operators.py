"""The nodes that a network is lowered to: affine maps, sums, and elementwise activations.

A value of one example has a fixed shape; everywhere it carries one leading axis b, of examples or of linear forms.
Each affine operator knows its map (``forward``), its adjoint without the constant (``back``), the constant
(``constant``) and its map with absolute values (``magnitude``); intervals follow from those.
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import prod
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor


class Operator:
    """What all share. The methods take and return tensors with a leading axis."""

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Self:
        """The operator with its constants in ``dtype`` on ``device``; indices keep theirs."""
        moved = {
            field.name: value.to(device, dtype if value.is_floating_point() else value.dtype)
            for field in fields(self)  # pyright: ignore[reportArgumentType]
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved) if moved else self  # pyright: ignore[reportArgumentType]

    terms = 1
    """The length of the longest sum that the map or its adjoint computes."""


class Affine(Operator):
    def forward(self, *xs: Tensor) -> Tensor:
        raise NotImplementedError

    def back(self, form: Tensor) -> list[Tensor]:
        """For each input the forms whose sum, with ``constant``, equals ``form`` of the output."""
        raise NotImplementedError

    def constant(self, form: Tensor) -> Tensor | None:
        """The part of ``form`` of the output that depends on no input, (b,)."""
        return None

    def magnitude(self, *xs: Tensor) -> Tensor:
        """A bound of the sum of the terms' absolute values, for inputs of at most ``xs`` >= 0 in absolute value."""
        return self.forward(*xs)

    def interval(self, *boxes: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.forward(*(low for low, _ in boxes)), self.forward(*(high for _, high in boxes))


@dataclass(frozen=True)
class Dense(Affine):
    """weight (out, in) times the last axis, plus bias (out,)."""

    weight: Tensor
    bias: Tensor

    @property
    def terms(self) -> int:
        return max(self.weight.shape)

    def forward(self, *xs: Tensor) -> Tensor:
        return F.linear(xs[0], self.weight, self.bias)

    def back(self, form: Tensor) -> list[Tensor]:
        return [form @ self.weight]

    def constant(self, form: Tensor) -> Tensor:
        return (form * self.bias).flatten(1).sum(1, dtype=torch.float64)

    def magnitude(self, *xs: Tensor) -> Tensor:
        return F.linear(xs[0], self.weight.abs(), self.bias.abs())

    def interval(self, *boxes: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        ((low, high),) = boxes
        middle = F.linear((low + high) / 2, self.weight, self.bias)
        reach = F.linear((high - low) / 2, self.weight.abs())
        return middle - reach, middle + reach


@dataclass(frozen=True)
class Conv(Affine):
    """A two-dimensional convolution of an image (1, c, h, w) whose zero padding is the same on opposite sides."""

    weight: Tensor
    bias: Tensor
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    size: tuple[int, int]  # of the input image

    @property
    def terms(self) -> int:
        return max(self.weight[0].numel(), self.weight.shape[0] * self.weight[0, 0].numel())

    def _conv(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.conv2d(x[:, 0], weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return y[:, None]

    def forward(self, *xs: Tensor) -> Tensor:
        return self._conv(xs[0], self.weight, self.bias)

    def back(self, form: Tensor) -> list[Tensor]:
        kernel = self.weight.shape[2:]
        missing = [
            self.size[i]
            - ((form.shape[3 + i] - 1) * self.stride[i] - 2 * self.padding[i] + self.dilation[i] * (kernel[i] - 1) + 1)
            for i in (0, 1)
        ]
        found = F.conv_transpose2d(
            form[:, 0], self.weight, None, self.stride, self.padding, missing, self.groups, self.dilation
        )
        return [found[:, None]]

    def constant(self, form: Tensor) -> Tensor:
        return (form.sum((1, 3, 4), dtype=torch.float64) * self.bias).sum(1)

    def magnitude(self, *xs: Tensor) -> Tensor:
        return self._conv(xs[0], self.weight.abs(), self.bias.abs())

    def interval(self, *boxes: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        ((low, high),) = boxes
        middle = self._conv((low + high) / 2, self.weight, self.bias)
        reach = self._conv((high - low) / 2, self.weight.abs(), None)
        return middle - reach, middle + reach


@dataclass(frozen=True)
class Scale(Affine):
    """scale · x + shift, elementwise; both have the shape of the value, with axes of size 1 where they are constant."""

    scale: Tensor
    shift: Tensor

    def forward(self, *xs: Tensor) -> Tensor:
        return torch.addcmul(self.shift, xs[0], self.scale)

    def back(self, form: Tensor) -> list[Tensor]:
        return [form * self.scale]

    def constant(self, form: Tensor) -> Tensor:
        return (form * self.shift).flatten(1).sum(1, dtype=torch.float64)

    def magnitude(self, *xs: Tensor) -> Tensor:
        return xs[0] * self.scale.abs() + self.shift.abs()

    def interval(self, *boxes: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        one, other = self.forward(boxes[0][0]), self.forward(boxes[0][1])
        return torch.minimum(one, other), torch.maximum(one, other)


@dataclass(frozen=True)
class View(Affine):
    """The same elements, in C order, in another shape."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def forward(self, *xs: Tensor) -> Tensor:
        return xs[0].reshape(-1, *self.after)

    def back(self, form: Tensor) -> list[Tensor]:
        return [form.reshape(-1, *self.before)]


@dataclass(frozen=True)
class Permute(Affine):
    """The axes in another order."""

    order: tuple[int, ...]

    def forward(self, *xs: Tensor) -> Tensor:
        return xs[0].permute(0, *(axis + 1 for axis in self.order))

    def back(self, form: Tensor) -> list[Tensor]:
        return [form.permute(0, *(self.order.index(axis) + 1 for axis in range(len(self.order))))]


@dataclass(frozen=True)
class Select(Affine):
    """Elements by their index in C order; −1 gives 0. ``index`` has the shape of the output."""

    index: Tensor
    before: tuple[int, ...]

    @cached_property
    def terms(self) -> int:
        return int(self.index[self.index >= 0].bincount().amax()) if (self.index >= 0).any() else 1

    def forward(self, *xs: Tensor) -> Tensor:
        found = xs[0].flatten(1)[:, self.index.flatten().clamp_min(0)]
        found = torch.where(self.index.flatten() < 0, 0, found)
        return found.reshape(-1, *self.index.shape)

    def back(self, form: Tensor) -> list[Tensor]:
        form = torch.where(self.index < 0, 0, form).flatten(1)
        found = form.new_zeros(len(form), prod(self.before))
        found = found.index_add(1, self.index.flatten().clamp_min(0), form)
        return [found.reshape(-1, *self.before)]


@dataclass(frozen=True)
class Reduce(Affine):
    """The sum over ``axes`` of a value of shape ``before``, which stay as axes of size 1."""

    axes: tuple[int, ...]
    before: tuple[int, ...]

    @property
    def terms(self) -> int:
        return prod(self.before[axis] for axis in self.axes)

    def forward(self, *xs: Tensor) -> Tensor:
        return xs[0].sum([axis + 1 for axis in self.axes], keepdim=True)

    def back(self, form: Tensor) -> list[Tensor]:
        return [form.expand(-1, *self.before)]


@dataclass(frozen=True)
class Sum(Affine):
    """The sum of values of one shape, each with the sign of ``signs``."""

    signs: tuple[int, ...]

    @property
    def terms(self) -> int:
        return len(self.signs)

    def forward(self, *xs: Tensor) -> Tensor:
        total = xs[0] if self.signs[0] > 0 else -xs[0]
        for sign, x in zip(self.signs[1:], xs[1:], strict=True):
            total = total + x if sign > 0 else total - x
        return total

    def back(self, form: Tensor) -> list[Tensor]:
        return [form if sign > 0 else -form for sign in self.signs]

    def magnitude(self, *xs: Tensor) -> Tensor:
        return sum(xs[1:], xs[0])

    def interval(self, *boxes: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        pairs = [box if sign > 0 else (-box[1], -box[0]) for sign, box in zip(self.signs, boxes, strict=True)]
        low, high = pairs[0]
        for lower, upper in pairs[1:]:
            low, high = low + lower, high + upper
        return low, high


@dataclass(frozen=True)
class Concat(Affine):
    """Values one after the other along ``axis``, where they are ``sizes`` long."""

    axis: int
    sizes: tuple[int, ...]

    def forward(self, *xs: Tensor) -> Tensor:
        return torch.cat(xs, self.axis + 1)

    def back(self, form: Tensor) -> list[Tensor]:
        return list(form.split(self.sizes, self.axis + 1))


@dataclass(frozen=True)
class Activation(Operator):
    """An elementwise function: ``relu``, ``sigmoid`` or ``tanh``, all non-decreasing and 1-Lipschitz."""

    kind: str

    def forward(self, *xs: Tensor) -> Tensor:
        return getattr(torch, self.kind)(xs[0])

    def interval(self, *boxes: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.forward(boxes[0][0]), self.forward(boxes[0][1])
