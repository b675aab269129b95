import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fdml.errors import InputError
from fdml.suspicion import suspicion

LOGITS = arrays(np.float32, (5, 4), elements=st.floats(width=32, allow_nan=False, allow_infinity=False))


def rows(*logits: list[float]) -> np.ndarray:
    return np.array(logits, np.float32)


def test_closed_forms() -> None:
    sure, other, even = [0.0, 90.0, 0.0], [90.0, 0.0, 0.0], [1.0, 1.0, 1.0]
    mixed = [math.log(6), math.log(3), math.log(1)]  # 0.6, 0.3, 0.1
    student = rows(sure, sure, sure, even, mixed, mixed)
    teacher = rows(sure, other, even, even, mixed, sure)
    expected = [0, 1, 2 / 3, 2 / 3, 1 - (0.36 + 0.09 + 0.01), 0.7]
    found = suspicion(student, teacher)
    assert found.dtype == np.float32
    assert found.shape == (6,)
    assert np.allclose(found, expected, atol=1e-6)


@given(LOGITS, LOGITS)
def test_it_is_a_probability_however_large_the_logits(student: np.ndarray, teacher: np.ndarray) -> None:
    found = suspicion(student, teacher)
    assert ((found >= 0) & (found <= 1)).all()
    assert np.array_equal(found, suspicion(teacher, student))
    few = np.clip(student, -50, 50), np.clip(teacher, -50, 50)
    assert np.allclose(suspicion(*few), suspicion(few[0] + 7, few[1] - 3), atol=1e-4), "shifts mean nothing"


def test_an_unsure_model_is_heard() -> None:
    random = np.random.default_rng(0)
    student, teacher = (random.normal(0, 3, (200, 10)) for _ in range(2))
    powers = np.exp(student)
    least = 1 - (powers / powers.sum(1, keepdims=True)).max(1)
    assert (suspicion(student, teacher) >= least - 1e-6).all()


def test_what_is_no_number_is_suspect() -> None:
    student = rows([0, 9], [np.nan, 0], [0, 9], [np.inf, 0], [0, 9])
    teacher = rows([0, 9], [0, 9], [0, -np.inf], [0, 9], [0, 9])
    assert suspicion(student, teacher).tolist()[1:4] == [1, 1, 1]
    assert suspicion(student, teacher)[[0, 4]].max() < 1e-3


def test_no_images_have_no_suspicion() -> None:
    assert suspicion(np.zeros((0, 3)), np.zeros((0, 3))).shape == (0,)


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((2, 3), (3, 3)), ((3,), (3,)), ((2, 0), (2, 0))])
def test_logits_must_fit(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(InputError, match="of one shape"):
        suspicion(np.zeros(shapes[0]), np.zeros(shapes[1]))
