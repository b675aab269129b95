"""Interval arithmetic through a model's own forward pass: bounds on its logits over a box of images (IBP).

An ``Interval`` goes wherever an image goes, through our backbones and through a user's own module alike; nothing about
the network has to be declared. The bounds are differentiable, and they are for training and validation: they are not
rounded outward, so that what they show is no proof. Proofs are made of the exported network by ``fdml.certify``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdml.errors import InputError
from fdml.inference import inference


class Affine(NamedTuple):
    """What a linear layer or a convolution was given: ``func(x, weight, bias, *rest)``."""

    func: Callable[..., Tensor]
    x: "Interval"
    weight: Tensor
    bias: Tensor | None
    rest: tuple

    def ball(self) -> tuple[Tensor, Tensor]:
        """The centre and the radius of the outcome: |weight| is what a radius is multiplied by."""
        centre, radius = self.x.ball
        return (
            self.func(centre, self.weight, self.bias, *self.rest),
            self.func(radius, self.weight.abs(), None, *self.rest),
        )


class Interval(Tensor):
    """A batch of values, each between bounds, beside ``nominal``: the batch that a network computes.

    As a tensor it has the shape, dtype and device of ``nominal``; the bounds are plain tensors of that shape.
    Statistics of the batch (BatchNorm in training mode, any sum or mean over the first dimension) are those of
    ``nominal``, and the bounds are normalised by them (Shi et al. 2021). ``affine`` is the linear layer
    that the interval came out of, if any: bounds are computed when they are asked for, and a normalisation that
    follows a convolution is folded into it first.

    A function of torch that the bounds do not cover raises ``InputError`` with its name.
    """

    nominal: Tensor
    affine: Affine | None
    _ends: tuple[Tensor, Tensor] | None
    _ball: tuple[Tensor, Tensor] | None

    @classmethod
    def of(
        cls,
        nominal: Tensor,
        ends: tuple[Tensor, Tensor] | None = None,
        ball: tuple[Tensor, Tensor] | None = None,
        affine: Affine | None = None,
    ) -> "Interval":
        """The interval with these (lower, upper), or this (centre, radius), or that comes out of ``affine``."""
        return nominal.detach().as_subclass(cls)._become(nominal, ends, ball, affine)

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """(lower, upper)"""
        if self._ends is None:
            centre, radius = self.ball
            self._ends = centre - radius, centre + radius
        return self._ends

    @property
    def ball(self) -> tuple[Tensor, Tensor]:
        """(centre, radius)"""
        if self._ball is None:
            if self.affine is not None:
                self._ball = self.affine.ball()
            else:
                assert self._ends is not None
                lower, upper = self._ends
                self._ball = (lower + upper) / 2, (upper - lower) / 2
        return self._ball

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        # A property of a tensor comes as the method `__get__` of what describes it.
        is_property = func.__name__ == "__get__"
        name = (getattr(func, "__self__", func) if is_property else func).__name__.strip("_")
        with torch._C.DisableTorchFunctionSubclass():
            if is_property or name in _QUESTIONS or (name in ("sum", "mean") and 0 in _dimensions(args, kwargs)):
                value = func(*map(_nominal, args), **kwargs)
                if not (is_property and isinstance(value, Tensor)):
                    return value
            elif name in _RULES:
                nominal = func(*map(_nominal, args), **kwargs)
                bounds = _RULES[name](func, *args, **kwargs)
                if nominal is _nominal(args[0]):  # in place: whoever else holds the interval sees it too
                    return args[0]._become(nominal, **bounds)
                return cls.of(nominal, **bounds)
        raise InputError(f"interval bounds do not cover {name!r}: train without ibp, and certify by smoothing")

    def _become(
        self,
        nominal: Tensor,
        ends: tuple[Tensor, Tensor] | None = None,
        ball: tuple[Tensor, Tensor] | None = None,
        affine: Affine | None = None,
    ) -> "Interval":
        self.nominal, self.affine, self._ends, self._ball = nominal, affine, ends, ball
        return self


def box(nominal: Tensor, x: Tensor, eps: float) -> Interval:
    """All images (b, c, h, w) in [0, 1] within ``eps`` of ``x`` in linf; ``nominal`` need not be one of them."""
    return Interval.of(nominal, ends=((x - eps).clamp_(min=0), (x + eps).clamp_(max=1)))


def margins(logits: Interval, y: Tensor) -> Tensor:
    """Upper bounds (b, classes) of z_k − z_y over the box; 0 where k is y. All others negative: no image of the box is
    answered otherwise.

    The last linear layer is taken together with the difference (Gowal et al. 2019), tighter than the
    difference of its bounds.
    """
    if logits.affine is None:
        lower, upper = logits.ends
        upper = upper - lower.gather(1, y[:, None])
    else:
        _, x, weight, bias, _ = logits.affine
        difference = weight - weight[y][:, None]
        centre, radius = x.ball
        upper = (difference @ centre[:, :, None] + difference.abs() @ radius[:, :, None]).squeeze(2)
        if bias is not None:
            upper = upper + (bias - bias[y][:, None])
    return upper.scatter(1, y[:, None], 0.0)


def certified(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, eps: float, batch_size: int = 250) -> Tensor:
    """Whether interval bounds say (b,) that every image within ``eps`` of ``x`` in linf is answered as ``y``."""
    found = []
    with inference(model), torch.no_grad():
        for part, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
            part = part.contiguous(memory_format=torch.channels_last)
            logits = model(box(part, part, eps))
            assert isinstance(logits, Interval)
            others = margins(logits, labels).scatter(1, labels[:, None], -torch.inf)
            found.append((others < 0).all(1))
    return torch.cat(found)


Bounds = dict[str, Any]
"""How a rule gives the bounds: keywords of ``Interval.of``."""


def _nominal(value: Any) -> Any:
    return value.nominal if isinstance(value, Interval) else value


def _ends(value: Any) -> tuple[Any, Any]:
    return value.ends if isinstance(value, Interval) else (value, value)


def _dimensions(args: tuple, kwargs: dict) -> tuple[int, ...]:
    """The dimensions that a reduction is over; all of them where none is named."""
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return (0,) if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)


def _monotone(func: Callable, x: Interval, *args: Any, **kwargs: Any) -> Bounds:
    """Functions that no coordinate's growth lowers."""
    lower, upper = x.ends
    return {"ends": (func(lower, *args, **kwargs), func(upper, *args, **kwargs))}


def _linear(func: Callable, x: Interval, *args: Any, **kwargs: Any) -> Bounds:
    """Functions that only move or average values, so that radii go the way of centres."""
    centre, radius = x.ball
    return {"ball": (func(centre, *args, **kwargs), func(radius, *args, **kwargs))}


def _affine(
    func: Callable, x: Interval, weight: Tensor, bias: Tensor | None = None, *rest: Any, **options: Any
) -> Bounds:
    # A copy of the input as it is now: it may change in place before its bounds are asked for.
    x = Interval.of(x.nominal, x._ends, x._ball, x.affine)
    return {"affine": Affine(partial(func, **options), x, weight, bias, rest)}


def _relu(func: Callable, x: Interval, inplace: bool = False) -> Bounds:
    return {"ball": _Relu.apply(*x.ball)}


class _Relu(torch.autograd.Function):
    """ReLU from (centre, radius) to (centre, radius): a CPU is bound by memory here, and this takes few new tensors."""

    @staticmethod
    def forward(ctx: Any, centre: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper = (centre - radius).relu_(), (centre + radius).relu_()
        ctx.save_for_backward(lower, upper)
        return (lower + upper).mul_(0.5), (upper - lower).mul_(0.5)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (of_centre, of_radius), (lower, upper) = grads, ctx.saved_tensors
        of_lower = torch.ops.aten.threshold_backward((of_centre - of_radius).mul_(0.5), lower, 0)
        of_upper = torch.ops.aten.threshold_backward((of_centre + of_radius).mul_(0.5), upper, 0)
        return of_lower + of_upper, of_upper.sub_(of_lower)


def _batch_norm(
    func: Callable,
    x: Interval,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Bounds:
    if training or mean is None or var is None:
        dims = [dim for dim in range(x.nominal.ndim) if dim != 1]
        var, mean = torch.var_mean(x.nominal, dims, correction=0)
    scale = torch.rsqrt(var + eps) if weight is None else weight * torch.rsqrt(var + eps)
    shift = -mean * scale if bias is None else bias - mean * scale
    if x.affine is not None:
        weight = x.affine.weight * scale.view(-1, *[1] * (x.affine.weight.ndim - 1))
        bias = shift if x.affine.bias is None else shift + x.affine.bias * scale
        return {"affine": x.affine._replace(weight=weight, bias=bias)}
    scale, shift = (value.view(1, -1, *[1] * (x.nominal.ndim - 2)) for value in (scale, shift))
    centre, radius = x.ball
    return {"ball": (centre * scale + shift, radius * scale.abs())}


def _add(func: Callable, x: Any, other: Any) -> Bounds:
    (low, high), (other_low, other_high) = _ends(x), _ends(other)
    return {"ends": (low + other_low, high + other_high)}


def _sub(func: Callable, x: Any, other: Any) -> Bounds:
    (low, high), (other_low, other_high) = _ends(x), _ends(other)
    return {"ends": (low - other_high, high - other_low)}


def _rsub(func: Callable, x: Any, other: Any) -> Bounds:
    return _sub(func, other, x)


def _scale(func: Callable, x: Any, factor: Any) -> Bounds:
    if isinstance(factor, Interval):
        x, factor = factor, x
    if isinstance(factor, Interval) or ("div" in func.__name__ and not isinstance(x, Interval)):
        raise InputError("interval bounds cover products and quotients by constants alone")
    ends = tuple(func(end, factor) for end in x.ends)
    return {"ends": (torch.minimum(*ends), torch.maximum(*ends))}


def _square(func: Callable, x: Interval) -> Bounds:
    lower, upper = x.ends
    ends = lower.square(), upper.square()
    crosses = (lower <= 0) & (upper >= 0)
    return {"ends": (torch.minimum(*ends).masked_fill(crosses, 0), torch.maximum(*ends))}


# By name without underscores: torch.relu, relu_ and F.relu are one function.
_RULES: dict[str, Callable[..., Bounds]] = {
    "relu": _relu,
    **dict.fromkeys(("leaky_relu", "sigmoid", "tanh", "max_pool2d", "adaptive_max_pool2d", "pad"), _monotone),
    **dict.fromkeys(("mean", "sum", "avg_pool2d", "adaptive_avg_pool2d"), _linear),
    **dict.fromkeys(("flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze"), _linear),
    **dict.fromkeys(("getitem", "contiguous"), _linear),
    **dict.fromkeys(("conv2d", "linear"), _affine),
    **dict.fromkeys(("add", "radd", "iadd"), _add),
    **dict.fromkeys(("sub", "isub"), _sub),
    "rsub": _rsub,
    **dict.fromkeys(("mul", "rmul", "imul", "div", "truediv", "itruediv"), _scale),
    "batch_norm": _batch_norm,
    "square": _square,
}
_QUESTIONS = ("size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "len", "repr")
