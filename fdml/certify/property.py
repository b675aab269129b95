"""What is to be proved: that no input of a region gives an output of an unsafe set."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Clause:
    """Outputs y (m,) for which every row of ``weight @ y + offset`` is at least 0; float64, (r, m) and (r,)."""

    weight: Tensor
    offset: Tensor


@dataclass(frozen=True)
class Property:
    """The claim that no x with ``lower`` <= x <= ``upper`` (and, with ``radius``, ‖x − center‖₂ <= radius) has an
    output in any of the ``clauses``.

    The bounds are (n,), float64, in the C order of the network's input. One x in one clause refutes it. Of several
    properties that stand together (a disjunction of regions), one refuted property refutes all.
    """

    lower: Tensor
    upper: Tensor
    clauses: tuple[Clause, ...]
    center: Tensor | None = None
    radius: float | None = None
