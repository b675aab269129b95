import gzip
from fractions import Fraction
from itertools import product
from math import inf, nextafter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fdml.certify import vnnlib
from fdml.certify.vnnlib import read, write_counterexample
from fdml.errors import InputError

DECLARED = """; two inputs, two outputs
(declare-const X_0 Real)
(declare-const X_1 Real)
(declare-const Y_0 Real)
(declare-const Y_1 Real)
"""
BOX = "(assert (>= X_0 0)) (assert (<= X_0 1)) (assert (and (>= X_1 -1) (<= X_1 2.5)))\n"


def parsed(tmp_path, text, inputs=2, outputs=2):
    path = tmp_path / "p.vnnlib"
    path.write_text(text)
    return read(path, inputs, outputs)


def said(prop):
    """A property as plain lists: its box and, for each clause, its (weights, offset) rows."""
    return (
        [prop.lower.tolist(), prop.upper.tolist()],
        [list(zip(c.weight.tolist(), c.offset.tolist(), strict=True)) for c in prop.clauses],
    )


def test_robustness_is_one_box_and_a_clause_for_each_wrong_class(tmp_path):
    (prop,) = parsed(tmp_path, DECLARED + BOX + "(assert (or (>= Y_1 Y_0) (and (<= Y_0 0.5) (>= Y_1 -1.5e-0))))")
    assert said(prop) == (
        [[0, -1], [1, 2.5]],
        [[([-1, 1], 0)], [([-1, 0], 0.5), ([0, 1], 1.5)]],
    )
    assert prop.lower.dtype == prop.upper.dtype == prop.clauses[0].weight.dtype == torch.float64
    assert prop.radius is None


@pytest.mark.parametrize("first", ["(assert (<= Y_0 Y_1))", "(assert (or (>= Y_0 1) (>= Y_1 1)))"])
def test_asserts_hold_together_whatever_their_order(tmp_path, first):
    second = "(assert (or (>= Y_0 1) (>= Y_1 1)))" if "or" not in first else "(assert (<= Y_0 Y_1))"
    (prop,) = parsed(tmp_path, DECLARED + BOX + first + second)
    assert said(prop)[1] == [
        [([-1, 1], 0), ([1, 0], -1)],
        [([-1, 1], 0), ([0, 1], -1)],
    ]


def test_a_disjunction_of_boxes_gives_a_property_for_each(tmp_path):
    text = """(assert (or (and (<= X_0 1) (>= X_0 0) (<= Y_0 0))
                          (and (<= X_0 3) (>= X_0 2) (<= Y_0 0))
                          (and (>= X_0 0) (<= X_0 1) (<= Y_1 0))))
              (assert (<= X_1 1)) (assert (>= X_1 0)) (assert (<= X_1 0.75))"""
    first, second = parsed(tmp_path, DECLARED + text)
    assert said(first) == ([[0, 0], [1, 0.75]], [[([-1, 0], 0)], [([0, -1], 0)]])
    assert said(second) == ([[2, 0], [3, 0.75]], [[([-1, 0], 0)]])


def test_two_disjunctions_multiply(tmp_path):
    text = (
        "(assert (or (and (>= X_0 0) (<= X_0 1)) (and (>= X_0 2) (<= X_0 3)))) (assert (>= X_1 0)) (assert (<= X_1 1))"
    )
    properties = parsed(tmp_path, DECLARED + text + "(assert (or (<= Y_0 0) (<= Y_1 0)))")
    assert [said(p)[0][0][0] for p in properties] == [0, 2]
    assert all(len(p.clauses) == 2 for p in properties)


def test_linear_terms_over_outputs(tmp_path):
    text = BOX + "(assert (<= (+ (* 2 Y_0) (- Y_1) -1) (- 0.5)))(assert (>= (- Y_0 (* Y_1 0.1) 0.25) Y_0 ))"
    (prop,) = parsed(tmp_path, DECLARED + text)
    # 0.1 is no float64: the row is scaled by 10.
    assert said(prop)[1] == [[([-2, 1], 0.5), ([0, -1], -2.5)]]


def test_bounds_may_be_terms(tmp_path):
    text = "(assert (<= (* -2 X_0) 1)) (assert (<= X_0 (+ 1 (- 0.5)))) (assert (>= 3 X_1)) (assert (<= (- 3) X_1))"
    (prop,) = parsed(tmp_path, DECLARED + text + "(assert (<= Y_0 0))")
    assert said(prop)[0] == [[-0.5, -3], [0.5, 3]]


@given(st.decimals(-1000, 1000, allow_nan=False, allow_infinity=False), st.booleans())
def test_decimals_are_rounded_outward_by_less_than_one_unit(tmp_path_factory, value, general):
    path = tmp_path_factory.getbasetemp() / "rounding.vnnlib"
    written = f"(+ {value})" if general else str(value)
    path.write_text(
        "(declare-const X_0 Real)(declare-const Y_0 Real)"
        f"(assert (<= X_0 {written}))(assert (>= X_0 {written}))(assert (<= Y_0 {written}))(assert (>= Y_0 {written}))"
    )
    (prop,) = read(path, 1, 1)
    lower, upper, exact = prop.lower.item(), prop.upper.item(), Fraction(value)
    assert Fraction(lower) <= exact <= Fraction(upper)
    assert upper in (lower, nextafter(lower, inf))
    assert (lower == upper) == (Fraction(lower) == exact)
    assert prop.clauses[0].offset.tolist() == [upper, -lower]


def test_files_may_be_compressed(tmp_path, monkeypatch):
    path = tmp_path / "p.vnnlib.gz"
    content = gzip.compress((DECLARED + BOX + "(assert (<= Y_0 0))").encode())
    path.write_bytes(content)
    assert len(read(path, 2, 2)) == 1
    path.write_bytes(content[:-12])
    with pytest.raises(InputError, match=r"p\.vnnlib\.gz: cannot read it"):
        read(path, 2, 2)
    path.write_bytes(gzip.compress(b" " * (2 << 20)))
    monkeypatch.setattr(vnnlib, "BYTES", 1 << 20)
    with pytest.raises(InputError, match="more than 1 MB of text"):
        read(path, 2, 2)
    with pytest.raises(InputError, match=r"none\.vnnlib: cannot read it: No such file"):
        read(tmp_path / "none.vnnlib", 2, 2)


@pytest.mark.parametrize(
    ("text", "line", "column", "message"),
    [
        ("(assert (< X_0 1))", 1, 10, "unknown operator '<': <=, >=, and, or are known"),
        ("\n (assert (<= X_0 Z_1))", 2, 18, "a variable or a number should stand here, not 'Z_1'"),
        ("(assert (<= X_7 1))", 1, 13, "X_7 is not declared"),
        ("(assert (<= X_0 1)", 1, 19, "assert takes one formula: ) should stand here, not the end of the file"),
        ("; (\n(assert (or", 2, 12, "a formula such as (<= X_0 0.5) should stand here, not the end of the file"),
        ("(assert (<= X_0 1)))", 1, 20, "')' stands outside of any (assert ...)"),
        ("(assert (<= X_0 1 2))", 1, 19, "<= takes two operands: ) should stand here, not '2'"),
        ("(assert (<= X_0 1) (<= X_1 1))", 1, 20, "assert takes one formula"),
        ("(assert (and))", 1, 10, "and needs at least one formula"),
        ("(assert X_0)", 1, 9, "a formula such as"),
        ("(assert (<= X_0 (/ 1 2)))", 1, 18, "unknown operator '/': +, -, * are known here"),
        ("(assert (<= (+) 1))", 1, 15, "a variable or a number should stand here, not ')'"),
        ("(assert (<= 1 2))", 1, 9, "on no variable"),
        ("(assert (<= X_0 X_1))", 1, 9, "over several inputs (X_0, X_1) is not covered"),
        ("(assert (<= X_0 Y_0))", 1, 9, "between inputs and outputs is not covered"),
        ("(assert (<= (* Y_0 Y_1) 1))", 1, 13, "a product of variables is not linear"),
        ("(assert (<= Y_0 1e999))", 1, 17, "'1e999' is out of the range of float64"),
        ("(assert (<= (* 1e-999 Y_0) 1))", 1, 16, "'1e-999' is out of the range of float64"),
        ("(assert (<= (* 1e300 1e300) Y_0))", 1, 9, "a number here is out of the range of float64"),
        ("(assert (<= (* 1.23456789012345678901 Y_0) 1))", 1, 9, "a coefficient here is no float64"),
        ("(assert (<= Y_0 nan))", 1, 17, "a variable or a number should stand here, not 'nan'"),
        ("(assert (<= Y_0 \u0661))", 1, 17, "a variable or a number should stand here"),
        ("(declare-const X_0 Real)", 1, 16, "X_0 is declared twice"),
        ("(declare-const X_2 Real)", 1, 16, "X_2 is declared, but the network has 2 inputs, counted from X_0"),
        ("(declare-const Y_02 Real)", 1, 16, "'Y_02' is declared, but only X_i (inputs) and Y_i (outputs) can be"),
        ("(declare-const Y_2 Int)", 1, 20, "Y_2 is declared as 'Int', but only Real is known"),
        ("(check-sat)", 1, 2, "unknown command 'check-sat': declare-const and assert are known"),
        ("(assert (>= X_0 1))\n(assert (<= X_0 0.5))", 2, 9, "X_0 would be at least 1.0 and at most 0.5: an empty box"),
        ("(assert (>= X_0 1))", 1, 20, "X_1 has no lower bound: every input needs both"),
        ("(assert (>= X_0 1)) (assert (>= X_1 1))", 1, 40, "X_0 has no upper bound"),
        (BOX, 2, 1, "no output is constrained"),
        ("(assert " + "(and " * 101, 1, 509, "formulas are nested more than 100 deep"),
        ("(assert (<= Y_0 " + "(+ " * 101, 1, 317, "terms are nested more than 100 deep"),
    ],
)
def test_mistakes_are_shown_with_their_place(tmp_path, text, line, column, message):
    path = tmp_path / "p.vnnlib"
    path.write_text(DECLARED + text)
    with pytest.raises(InputError) as caught:
        read(path, 2, 2)
    found = str(caught.value)
    assert found.startswith(f"{path}:{line + 5}:{column}: ")
    assert message in found
    assert "\n" not in found


def test_the_network_has_what_is_declared(tmp_path):
    with pytest.raises(InputError, match="2 variables X_i are declared, but the network has 3 inputs"):
        parsed(tmp_path, DECLARED + BOX, inputs=3)
    with pytest.raises(InputError, match=r":5:16: Y_1 is declared, but the network has 1 outputs, counted from Y_0"):
        parsed(tmp_path, DECLARED + BOX, outputs=1)


def test_expansion_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(vnnlib, "NUMBERS", 1000)
    either = "(or (<= Y_0 0) (<= Y_1 0))"
    for text, column in ((f"(assert (and {either * 40}))", 9), (f"(assert {either})" * 40, 211)):
        with pytest.raises(InputError, match=rf":7:{column}: and over or gives more than 1,000 constraints"):
            parsed(tmp_path, DECLARED + BOX + text)
    monkeypatch.setattr(vnnlib, "NUMBERS", 30)
    boxes = "".join(f"(and (<= X_0 0.{digit}) (<= Y_0 0))" for digit in range(1, 10))
    with pytest.raises(InputError, match=r"9 cases of 2 inputs and 2 outputs are too many"):
        parsed(tmp_path, DECLARED + BOX + f"(assert (or {boxes} ))")


def test_terms_have_a_limit(tmp_path):
    with pytest.raises(InputError, match=r":7:13: a product here is out of the range of float64"):
        parsed(tmp_path, DECLARED + BOX + f"(assert (<= (* {'1e300 ' * 1000}) Y_0))")


def test_a_conjunction_is_refused_only_for_its_size_not_its_depth(tmp_path):
    deep = "(<= Y_0 0)"
    for _ in range(90):
        deep = f"(and {deep})"
    assert len(parsed(tmp_path, DECLARED + BOX + f"(assert {deep})")) == 1


PIECES = [
    *DECLARED.split("\n")[1:],
    *BOX.split("\n"),
    *["(", ")", "<=", ">=", "and", "or", "assert", "X_0", "Y_1", "Y_9", "0.5", "-1", "1e9", "-", "+", "*", ";"],
]


@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=30), st.booleans())
def test_whatever_the_text_an_input_error_is_the_worst(tmp_path_factory, pieces, declared):
    path = tmp_path_factory.getbasetemp() / "fuzz.vnnlib"
    path.write_text(DECLARED * declared + " ".join(pieces), encoding="utf-8", errors="replace")
    try:
        assert read(path, 2, 2)
    except InputError as error:
        message = str(error)
    else:
        return
    assert len(message.splitlines()) == 1


formulas = st.recursive(
    st.tuples(st.sampled_from(["<=", ">="]), st.sampled_from(["Y_0", "Y_1"]), st.integers(-2, 2)),
    lambda inner: st.tuples(st.sampled_from(["and", "or"]), st.lists(inner, min_size=1, max_size=3)),
    max_leaves=8,
)


def text_of(formula) -> str:
    if isinstance(formula[1], list):
        return f"({formula[0]} {' '.join(map(text_of, formula[1]))})"
    return f"({formula[0]} {formula[1]} {formula[2]})"


def truth_of(formula, y) -> bool:
    if isinstance(formula[1], list):
        return (all if formula[0] == "and" else any)([truth_of(part, y) for part in formula[1]])
    value = y[int(formula[1][2])]
    return value <= formula[2] if formula[0] == "<=" else value >= formula[2]


@given(st.lists(formulas, min_size=1, max_size=3))
def test_the_clauses_say_what_the_formulas_say(tmp_path_factory, asserted):
    path = tmp_path_factory.getbasetemp() / "truth.vnnlib"
    path.write_text(DECLARED + BOX + "".join(f"(assert {text_of(formula)})" for formula in asserted))
    (prop,) = read(path, 2, 2)
    for y in product([-2.5, -2, -0.5, 0, 1, 2.5], repeat=2):
        point = torch.tensor(y, dtype=torch.float64)
        inside = any(bool((clause.weight @ point + clause.offset >= 0).all()) for clause in prop.clauses)
        assert inside == all(truth_of(formula, y) for formula in asserted)


def test_counterexamples_are_written_in_the_competitions_form(tmp_path):
    path = tmp_path / "found.txt"
    x, y = np.array([0.1, -2, 1e-30], np.float32), np.array([0.5], np.float32)
    write_counterexample(path, x, y)
    text = path.read_text()
    assert text.startswith("((X_0 0.10000000149011612)\n(X_1 -2.0)\n(X_2 ")
    assert text.endswith("(Y_0 0.5))\n")
    values = [float(pair.strip("()").split()[1]) for pair in text.splitlines()]
    assert values == [*x.tolist(), *y.tolist()]
