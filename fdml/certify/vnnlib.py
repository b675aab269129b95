"""Property files of the verification competition (VNN-LIB 1), and its form of a counter-example.

The subset that its benchmarks use: ``(declare-const X_i Real)``, ``(declare-const Y_i Real)`` and ``(assert F)``, where
F is ``(<= a b)``, ``(>= a b)``, ``(and F ...)`` or ``(or F ...)``, nested at will. a and b are variables, decimals and
their sums, differences and multiples; a constraint is on one input or on outputs alone. All asserts hold together, and
what they say is what would refute the network.
"""

import gzip
import re
import zlib
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from math import inf, isfinite, lcm, nextafter
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch

from fdml.certify.property import Clause, Property
from fdml.errors import InputError
from fdml.files import write_whole

BYTES = 2**26
NUMBERS = 10**7  # constraints after expansion; numbers in all boxes and clauses together
DEPTH = 100
_TOKEN = re.compile(r";[^\n]*|[()]|[^\s();]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")
_VARIABLE = re.compile(r"[XY]_(0|[1-9][0-9]{0,8})")
_END = ""


class _Bound(NamedTuple):
    """Of the input X_i; ``at`` is the token that says so."""

    i: int
    upper: bool
    value: float
    at: int


class _Row(NamedTuple):
    """``sum(coefficient * y[index]) + offset >= 0``"""

    terms: tuple[tuple[int, float], ...]
    offset: float


_Conjunction = list[_Bound | _Row]


def read(path: Path, inputs: int, outputs: int) -> list[Property]:
    """The properties of a ``.vnnlib`` or ``.vnnlib.gz`` file for a network of ``inputs`` and ``outputs``.

    One property for each box, with a clause for each way to be unsafe there. A decimal that is no float64 is rounded
    so that boxes and clauses grow, to the next float64: a proof covers what is written, a counter-example may exceed it
    by one unit in the last place of float64. Raises ``InputError`` with file, line and column for syntax outside the
    subset, variables that do not fit the network, and boxes that are open or empty.
    """
    return _Reader(path, inputs, outputs).properties()


def write_counterexample(path: Path, x: np.ndarray, y: np.ndarray) -> None:
    """Writes ((X_0 v) ... (Y_0 v) ...), a pair a line, with the shortest decimals that are these values in float64."""
    pairs = [f"({name}_{i} {value!r})" for name, row in (("X", x), ("Y", y)) for i, value in enumerate(row.tolist())]
    write_whole(path, "(" + "\n".join(pairs) + ")\n")


class _Reader:
    def __init__(self, path: Path, inputs: int, outputs: int) -> None:
        self._path = path
        self._text = _decompressed(path)
        self._tokens = [token for token in _TOKEN.findall(self._text) if token[0] != ";"]
        self._end = len(self._tokens)
        # A form may then be looked at as a whole, wherever the file breaks off.
        self._tokens += [_END] * 5
        self._sizes = {"X": inputs, "Y": outputs}
        self._variables: dict[str, tuple[str, int]] = {}

    def properties(self) -> list[Property]:
        common: _Conjunction = []
        cases: list[_Conjunction] = [[]]
        at = 0
        while at < self._end:
            command, start = self._tokens[at + 1], at
            if self._tokens[at] != "(":
                self._fail(at, f"{self._shown(at)} stands outside of any (assert ...)")
            if command == "assert":
                found, at = self._formula(at + 2, 0)
                if len(found) == 1:
                    common += found[0]
                else:
                    cases = self._product(cases, found, start)
                at = self._close(at, "assert takes one formula")
            elif command == "declare-const":
                at = self._declare(at + 2)
            else:
                self._fail(at + 1, f"unknown command {self._shown(at + 1)}: declare-const and assert are known")
        for kind, size in self._sizes.items():
            count = sum(1 for found, _ in self._variables.values() if found == kind)
            if count != size:
                what = "inputs" if kind == "X" else "outputs"
                self._fail(self._end, f"{count} variables {kind}_i are declared, but the network has {size} {what}")
        return self._merged(common, cases)

    def _declare(self, at: int) -> int:
        name, sort = self._tokens[at], self._tokens[at + 1]
        if not _VARIABLE.fullmatch(name):
            self._fail(at, f"{self._shown(at)} is declared, but only X_i (inputs) and Y_i (outputs) can be")
        if sort != "Real":
            self._fail(at + 1, f"{name} is declared as {self._shown(at + 1)}, but only Real is known")
        if name in self._variables:
            self._fail(at, f"{name} is declared twice")
        kind, index = name[0], int(name[2:])
        if index >= self._sizes[kind]:
            what = "inputs" if kind == "X" else "outputs"
            self._fail(at, f"{name} is declared, but the network has {self._sizes[kind]} {what}, counted from {kind}_0")
        self._variables[name] = kind, index
        return self._close(at + 2, "declare-const takes a name and a sort")

    def _formula(self, at: int, depth: int) -> tuple[list[_Conjunction], int]:
        """The formula that begins at ``at`` as a disjunction of conjunctions, and where it ends."""
        tokens = self._tokens
        head = tokens[at + 1]
        if tokens[at] != "(":
            self._fail(at, f"a formula such as (<= X_0 0.5) should stand here, not {self._shown(at)}")
        if head in ("<=", ">="):
            variable, number = self._variables.get(tokens[at + 2]), tokens[at + 3]
            if variable and variable[0] == "X" and tokens[at + 4] == ")" and _NUMBER.fullmatch(number):
                upper = head == "<="
                value = self._outward(self._decimal(at + 3), upper, at + 3)
                return [[_Bound(variable[1], upper, value, at)]], at + 5
            return self._comparison(at)
        if head not in ("and", "or"):
            self._fail(at + 1, f"unknown operator {self._shown(at + 1)}: <=, >=, and, or are known")
        if depth >= DEPTH:
            self._fail(at, f"formulas are nested more than {DEPTH} deep")
        start, at = at, at + 2
        parts: list[list[_Conjunction]] = []
        while tokens[at] != ")":
            part, at = self._formula(at, depth + 1)
            parts.append(part)
        if not parts:
            self._fail(start + 1, f"{head} needs at least one formula")
        if head == "or":
            return [conjunction for part in parts for conjunction in part], at + 1
        found: list[_Conjunction] = [[item for part in parts if len(part) == 1 for item in part[0]]]
        for part in parts:
            if len(part) > 1:
                found = self._product(found, part, start)
        return found, at + 1

    def _product(self, left: list[_Conjunction], right: list[_Conjunction], at: int) -> list[_Conjunction]:
        size = len(right) * (sum(map(len, left)) + len(left)) + len(left) * sum(map(len, right))
        if size > NUMBERS:
            self._fail(at, f"and over or gives more than {NUMBERS:,} constraints here: split the property into files")
        return [a + b for a in left for b in right]

    def _comparison(self, start: int) -> tuple[list[_Conjunction], int]:
        """A constraint in its general form, as ``terms + constant >= 0``."""
        left, constant, at = self._linear(start + 2, 0)
        right, other, at = self._linear(at, 0)
        sign = 1 if self._tokens[start + 1] == ">=" else -1
        terms = {
            name: sign * (left.get(name, Fraction(0)) - right.get(name, Fraction(0))) for name in {**left, **right}
        }
        terms = {self._variables[name]: factor for name, factor in terms.items() if factor}
        constant = sign * (constant - other)
        end = self._close(at, f"{self._tokens[start + 1]} takes two operands")
        kinds = {kind for kind, _ in terms}
        if not kinds:
            self._fail(start, "this constraint is on no variable")
        if len(kinds) > 1:
            self._fail(start, "a constraint between inputs and outputs is not covered: bound them apart")
        if kinds == {"Y"}:
            row: _Conjunction = [self._row(terms, constant, start)]
            return [row], end
        if len(terms) > 1:
            names = ", ".join(f"X_{index}" for _, index in sorted(terms)[:4])
            self._fail(start, f"a constraint over several inputs ({names}) is not covered: each input needs its bounds")
        ((_, index), factor) = next(iter(terms.items()))
        upper = factor < 0
        return [[_Bound(index, upper, self._outward(-constant / factor, upper, start), start)]], end

    def _row(self, terms: dict[tuple[str, int], Fraction], constant: Fraction, at: int) -> _Row:
        # A positive factor changes no inequality, and whole numbers are exact.
        scale = lcm(*(factor.denominator for factor in terms.values()))
        if all(factor.denominator & (factor.denominator - 1) == 0 for factor in terms.values()):
            scale = 1
        factors = {index: factor * scale for (_, index), factor in terms.items()}
        if any(abs(factor) > 2**53 or Fraction(float(factor)) != factor for factor in factors.values()):
            self._fail(at, "a coefficient here is no float64, nor a multiple of it small enough")
        offset = self._outward(constant * scale, True, at)
        return _Row(tuple((index, float(factor)) for index, factor in factors.items()), offset)

    def _linear(self, at: int, depth: int) -> tuple[dict[str, Fraction], Fraction, int]:
        """A term that begins at ``at``: its coefficients, its constant, and where it ends."""
        token = self._tokens[at]
        if token in self._variables:
            return {token: Fraction(1)}, Fraction(0), at + 1
        if _NUMBER.fullmatch(token):
            return {}, Fraction(self._decimal(at)), at + 1
        if _VARIABLE.fullmatch(token):
            self._fail(at, f"{token} is not declared")
        if token != "(":
            self._fail(at, f"a variable or a number should stand here, not {self._shown(at)}")
        operator = self._tokens[at + 1]
        if operator not in ("+", "-", "*"):
            self._fail(at + 1, f"unknown operator {self._shown(at + 1)}: +, -, * are known here")
        if depth >= DEPTH:
            self._fail(at, f"terms are nested more than {DEPTH} deep")
        start = at
        terms, constant, at = self._linear(at + 2, depth + 1)
        if operator == "-" and self._tokens[at] == ")":
            return {name: -factor for name, factor in terms.items()}, -constant, at + 1
        while self._tokens[at] != ")":
            more, other, at = self._linear(at, depth + 1)
            if operator == "*":
                if terms and more:
                    self._fail(start, "a product of variables is not linear")
                factors = terms or more
                by = other if terms else constant
                terms, constant = {name: factor * by for name, factor in factors.items()}, constant * other
                if max(by.numerator.bit_length(), by.denominator.bit_length()) > 5000:
                    self._fail(start, "a product here is out of the range of float64")
            else:
                sign = 1 if operator == "+" else -1
                for name, factor in more.items():
                    terms[name] = terms.get(name, Fraction(0)) + sign * factor
                constant += sign * other
        return terms, constant, at + 1

    def _decimal(self, at: int) -> Decimal:
        token = self._tokens[at]
        if len(token) <= 1000 and isfinite(float(token)):
            found = Decimal(token)
            # As an exact fraction, 1e-9999 has ten thousand digits.
            if not found or found.adjusted() >= -400:
                return found
        self._fail(at, f"{self._shown(at)} is out of the range of float64")
        return None

    def _outward(self, value: Decimal | Fraction, upper: bool, at: int) -> float:
        """The smallest float64 that is at least ``value``, or the largest that is at most it."""
        try:
            found = float(value)
        except OverflowError:
            self._fail(at, "a number here is out of the range of float64")
        if upper and found < value:
            return nextafter(found, inf)
        return nextafter(found, -inf) if not upper and found > value else found

    def _merged(self, common: _Conjunction, cases: list[_Conjunction]) -> list[Property]:
        inputs, outputs = self._sizes["X"], self._sizes["Y"]
        rows = [item for item in common if isinstance(item, _Row)]
        outer = np.full(inputs, -np.inf), np.full(inputs, np.inf)
        self._tighten(outer, [item for item in common if isinstance(item, _Bound)])
        merged: dict[bytes, tuple[tuple[np.ndarray, np.ndarray], list[Clause]]] = {}
        numbers = 0
        for case in cases:
            bounds = [item for item in case if isinstance(item, _Bound)]
            own = rows + [item for item in case if isinstance(item, _Row)]
            box = (outer[0].copy(), outer[1].copy()) if bounds else outer
            self._tighten(box, bounds)
            if not (np.isfinite(box[0]).all() and np.isfinite(box[1]).all()):
                side = int(np.isfinite(box[0]).all())
                index = int(np.flatnonzero(~np.isfinite(box[side]))[0])
                self._fail(self._end, f"X_{index} has no {('lower', 'upper')[side]} bound: every input needs both")
            if not own:
                self._fail(self._end, "no output is constrained: (assert (<= Y_0 0.0)) would say when it is unsafe")
            numbers += len(own) * outputs + (len(bounds) and 2 * inputs)
            if numbers > NUMBERS:
                self._fail(self._end, f"{len(cases):,} cases of {inputs} inputs and {outputs} outputs are too many")
            key = box[0].tobytes() + box[1].tobytes()
            merged.setdefault(key, (box, []))[1].append(_clause(own, outputs))
        return [
            Property(torch.from_numpy(lower), torch.from_numpy(upper), tuple(clauses))
            for (lower, upper), clauses in merged.values()
        ]

    def _tighten(self, box: tuple[np.ndarray, np.ndarray], bounds: Sequence[_Bound]) -> None:
        lower, upper = box
        for index, above, value, at in bounds:
            if above:
                upper[index] = min(upper[index], value)
            else:
                lower[index] = max(lower[index], value)
            if lower[index] > upper[index]:
                self._fail(at, f"X_{index} would be at least {lower[index]} and at most {upper[index]}: an empty box")

    def _close(self, at: int, rule: str) -> int:
        if self._tokens[at] != ")":
            self._fail(at, f"{rule}: ) should stand here, not {self._shown(at)}")
        return at + 1

    def _shown(self, at: int) -> str:
        token = self._tokens[at]
        return ascii(token if len(token) <= 40 else token[:40] + "...") if token else "the end of the file"

    def _fail(self, at: int, what: str) -> NoReturn:
        starts = (found.start() for found in _TOKEN.finditer(self._text) if found.group()[0] != ";")
        offset = next((start for index, start in enumerate(starts) if index == at), len(self._text))
        line = self._text.count("\n", 0, offset) + 1
        column = offset - self._text.rfind("\n", 0, offset)
        raise InputError(f"{self._path}:{line}:{column}: {what}")


def _clause(rows: list[_Row], outputs: int) -> Clause:
    weight = torch.zeros(len(rows), outputs, dtype=torch.float64)
    for row, (terms, _) in zip(weight, rows, strict=True):
        for index, factor in terms:
            row[index] = factor
    return Clause(weight, torch.tensor([row.offset for row in rows], dtype=torch.float64))


def _decompressed(path: Path) -> str:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot read it: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > BYTES:
        raise InputError(f"{path}: more than {BYTES >> 20} MB of text, but property files are smaller")
    return content.decode(errors="replace")
