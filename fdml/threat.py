"""The threat model: what an adversary may do to an image. The only home of norm, eps, projection and membership."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fdml.card import NORMS, threat_words
from fdml.errors import InputError, unknown
from fdml.randomness import Generator, normal, signs, uniform

Images = Float[Tensor, "b c h w"]


@dataclass(frozen=True)
class Threat:
    """All images within ``eps`` of the given one in ``norm``, and inside [0, 1].

    ``eps`` is in pixel units: 8/255 for the usual CIFAR-10 model, never 8. For ``linf`` it is at most 1; for ``l2`` and
    ``l1`` the norm is the sum over all pixels and channels, as in the literature, so eps may exceed 1.

    Raises ``InputError`` for an unknown norm and for an eps that is not finite, negative, or (linf) above 1.
    """

    norm: str
    eps: float

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise unknown("norm", str(self.norm), NORMS)
        if not 0 <= self.eps < float("inf"):
            raise InputError(f"eps must be a finite number of at least 0, got {self.eps}")
        if self.norm == "linf" and self.eps > 1:
            meant = f"; did you mean {self.eps:g}/255?" if self.eps <= 255 else ""
            raise InputError(f"eps {self.eps:g} is larger than the whole pixel range [0, 1]{meant}")

    def __str__(self) -> str:
        return threat_words(self.norm, self.eps)

    def project(self, x_adv: Images, x: Images) -> Images:
        """The point of the threat model around ``x`` that is nearest to ``x_adv`` in the ball, clipped to [0, 1].

        Exact for linf. For l2 and l1 the ball is projected on first and the box second, as attacks in l2 usually do;
        the clipping never leaves the ball, because ``x`` is itself inside the box.
        """
        if self.norm == "linf":
            return torch.clamp(x_adv, (x - self.eps).clamp_(min=0), (x + self.eps).clamp_(max=1))
        delta = x_adv - x
        if self.norm == "l2":
            delta = delta * (self.eps / _l2(delta).clamp(min=1e-12)).clamp(max=1)
        else:
            delta = _project_l1(delta, self.eps)
        return (x + delta).clamp_(0, 1)

    def random(self, x: Images, generator: Generator = None) -> Images:
        """A random start. linf: uniform in the cube. l2: uniform in the ball. l1: Laplace direction, uniform radius."""
        shape = x.shape[1:]
        if self.norm == "linf":
            return (x + (2 * uniform(x, generator, *shape) - 1) * self.eps).clamp_(0, 1)
        radius = uniform(x, generator, 1, 1, 1)
        if self.norm == "l2":
            noise = normal(x, generator, *shape)
            noise = noise / _l2(noise).clamp(min=1e-12) * radius ** (1 / shape.numel())
        else:
            noise = -torch.log1p(-uniform(x, generator, *shape)) * signs(x, generator, *shape)
            noise = noise / noise.abs().sum((1, 2, 3), keepdim=True) * radius
        return (x + self.eps * noise).clamp_(0, 1)

    def ascend(self, x_adv: Images, grad: Images, step_size: float) -> Images:
        """One step of steepest ascent of length ``step_size`` (pixel units of the norm), not projected.

        linf: the sign. l2: the normalised gradient. l1: the largest 1% of the coordinates share the step (sparse
        ascent, Tramèr and Boneh 2019), of those that [0, 1] lets move: a pixel at the border would take it in vain.
        """
        if self.norm == "linf":
            return torch.add(x_adv, grad.sign(), alpha=step_size)
        if self.norm == "l2":
            # Scaled first: squares of the gradient of a confident model vanish in float32.
            grad = grad / grad.abs().amax((1, 2, 3), keepdim=True).clamp(min=torch.finfo(grad.dtype).tiny)
            return x_adv + grad * (step_size / _l2(grad).clamp(min=1e-12))
        stuck = ((x_adv >= 1) & (grad > 0)) | ((x_adv <= 0) & (grad < 0))
        flat = grad.masked_fill(stuck, 0).flatten(1)
        count = max(1, flat.shape[1] // 100)
        top = flat.abs().topk(count, dim=1).indices
        step = torch.zeros_like(flat).scatter_(1, top, flat.gather(1, top).sign()) / count
        return x_adv + step_size * step.view_as(grad)

    def distance(self, x_adv: Images, x: Images) -> Float[Tensor, " b"]:
        """The norm of the perturbation of each image."""
        delta = (x_adv - x).flatten(1)
        if self.norm == "linf":
            return delta.abs().amax(1)
        return delta.abs().sum(1) if self.norm == "l1" else delta.square().sum(1).sqrt()

    def contains(self, x_adv: Images, x: Images, slack: float = 1e-5) -> Bool[Tensor, " b"]:
        """Whether each image is inside the threat model, up to ``slack`` (relative to eps) of floating-point error.

        To this is added the norm of an image of 1e-7: what rounding each pixel to float32 may change.
        """
        inside = (x_adv >= 0).flatten(1).all(1) & (x_adv <= 1).flatten(1).all(1)
        rounding = 1e-7 * x.shape[1:].numel() ** {"linf": 0.0, "l2": 0.5, "l1": 1.0}[self.norm]
        return inside & (self.distance(x_adv, x) <= self.eps * (1 + slack) + rounding)


def _l2(delta: Images) -> Float[Tensor, "b 1 1 1"]:
    # Not `norm`, whose float32 sum over a large image is off by more than the slack of `contains`.
    return delta.flatten(1).square().sum(1).sqrt()[:, None, None, None]


def _project_l1(delta: Images, eps: float) -> Images:
    """Euclidean projection on the l1 ball (Duchi et al. 2008, figure 1): soft-threshold at the exact level."""
    flat = delta.flatten(1)
    size = flat.abs()
    ordered = size.sort(dim=1, descending=True).values
    level = (ordered.cumsum(1) - eps) / torch.arange(1, flat.shape[1] + 1, device=flat.device, dtype=flat.dtype)
    count = (ordered > level).sum(1, keepdim=True).clamp(min=1)
    threshold = level.gather(1, count - 1).clamp(min=0)
    size = (size - threshold).clamp(min=0)
    # The threshold is rounded, once for every coordinate: what that leaves outside the ball goes by scale.
    size = size * (eps / size.sum(1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
    return (flat.sign() * size).view_as(delta)
