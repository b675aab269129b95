"""Sets of inputs, and linear forms on them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fdml.certify.property import Clause, Property
from fdml.errors import InputError


@dataclass(frozen=True)
class Region:
    """d boxes, (d, n) each bound; with ``radius`` (d,), each cut with the L2 ball around ``center`` (d, n)."""

    lower: Tensor
    upper: Tensor
    center: Tensor | None = None
    radius: Tensor | None = None

    @classmethod
    def of(cls, properties: Sequence[Property]) -> "Region":
        """The regions of properties that all have a ball or none."""
        lower = torch.stack([prop.lower for prop in properties])
        upper = torch.stack([prop.upper for prop in properties])
        if properties[0].radius is None:
            return cls(lower, upper)
        center = torch.stack([prop.center for prop in properties if prop.center is not None])
        radius = lower.new_tensor([prop.radius for prop in properties])
        return cls(lower, upper, center, radius)

    def __len__(self) -> int:
        return len(self.lower)

    def single(self) -> "Region":
        """In float32, rounded outward."""
        lower, upper = self.lower.float(), self.upper.float()
        infinity = torch.full_like(lower, torch.inf)
        lower = torch.where(lower.double() > self.lower, lower.nextafter(-infinity), lower)
        upper = torch.where(upper.double() < self.upper, upper.nextafter(infinity), upper)
        if self.center is None or self.radius is None:
            return Region(lower, upper)
        center = self.center.float()
        radius = self.radius + (center.double() - self.center).norm(dim=1)
        return Region(lower, upper, center, radius.float() * (1 + 1e-6))

    def rows(self, index: Tensor | slice) -> "Region":
        if self.center is None or self.radius is None:
            return Region(self.lower[index], self.upper[index])
        return Region(self.lower[index], self.upper[index], self.center[index], self.radius[index])

    def expand(self, count: int) -> "Region":
        """The same one box ``count`` times."""
        return self.rows(torch.zeros(count, dtype=torch.int64, device=self.lower.device))

    @property
    def magnitude(self) -> Tensor:
        return torch.maximum(self.lower.abs(), self.upper.abs())

    def minimum(self, form: Tensor, dot: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """A lower bound of form · x over each region, (s, d), for forms (s, d, n); ``dot`` is ``inner`` or
        ``exact_inner``."""
        middle, reach = (self.lower + self.upper) / 2, (self.upper - self.lower) / 2
        found = dot(form, middle) - dot(form.abs(), reach)
        if self.center is None or self.radius is None:
            return found
        length = torch.linalg.vector_norm(form, dim=2, dtype=torch.float64)
        ball = dot(form, self.center) - length * self.radius
        return torch.maximum(found, ball)

    def minimiser(self, form: Tensor) -> Tensor:
        """Where in the box each form is least, (s, d, n); with a ball, where in the ball, moved into the box."""
        if self.center is None or self.radius is None:
            return torch.where(form > 0, self.lower, self.upper)
        length = form.norm(dim=2, keepdim=True).clamp_min(torch.finfo(form.dtype).tiny)
        x = self.center - form / length * self.radius[:, None]
        return torch.minimum(torch.maximum(x, self.lower), self.upper)


def inner(form: Tensor, value: Tensor) -> Tensor:
    """form · value, (s, d), for forms (s, d, *shape) and values (d, *shape)."""
    return torch.einsum("sdn,dn->sd", form.flatten(2), value.flatten(1))


def exact_inner(form: Tensor, value: Tensor) -> Tensor:
    """The same, summed in float64: only the products are rounded to the dtype of the forms."""
    return (form * value).flatten(2).sum(2, dtype=torch.float64)


def robust(
    x: Tensor,
    label: int,
    classes: int,
    *,
    norm: str,
    eps: float,
    lower: float = 0.0,
    upper: float = 1.0,
) -> Property:
    """The claim that no image within ``eps`` of ``x`` (n,) and within [lower, upper] has another class's output at
    least as large as that of ``label``; ``norm`` is "linf" or "l2"."""
    if not 0 <= label < classes:
        raise InputError(f"label {label} is none of the {classes} classes, 0 to {classes - 1}")
    if not eps >= 0:
        raise InputError(f"eps is {eps}, but a number of at least 0 is needed")
    if norm not in ("linf", "l2"):
        raise InputError(f"norm {norm!r} is not covered by bounds: linf or l2")
    exact = x.double().flatten()
    clauses = []
    for other in range(classes):
        if other != label:
            weight = torch.zeros(1, classes, dtype=torch.float64)
            weight[0, other], weight[0, label] = 1, -1
            clauses.append(Clause(weight, torch.zeros(1, dtype=torch.float64)))
    # One unit in the last place outward: the difference itself is rounded.
    infinity = torch.full_like(exact, torch.inf)
    low = (exact - eps).nextafter(-infinity).clamp(lower, upper)
    high = (exact + eps).nextafter(infinity).clamp(lower, upper)
    ball = (exact, float(eps)) if norm == "l2" else (None, None)
    return Property(low, high, tuple(clauses), *ball)
