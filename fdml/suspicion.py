"""How far a clean teacher and its defended student disagree about an image: a hint that it may be adversarial.

The teacher never saw an attack and follows a perturbation elsewhere than the student does, or further. It is a hint and
no defence: who knows the score can attack both models at once (docs/suspect.md has the figures).
"""

import numpy as np

from fdml.errors import InputError


def suspicion(student_logits: np.ndarray, teacher_logits: np.ndarray) -> np.ndarray:
    """The probability (n,), float32 in [0, 1], that a class drawn from the student's softmax is another than one drawn
    from the teacher's: 1 − Σ_k p_k q_k.

    Both logits are (n, classes). 0 where both are sure of the same class, 1 where they are sure of different ones.
    Where either is unsure the score is no lower than that doubt, one less its largest probability. An image with a
    logit that is not finite scores 1. Raises ``InputError`` for logits that are not (n, classes) of one shape.
    """
    student, teacher = np.asarray(student_logits), np.asarray(teacher_logits)
    if student.ndim != 2 or student.shape != teacher.shape or not student.shape[1]:
        raise InputError(f"logits must be (n, classes) of one shape, got {student.shape} and {teacher.shape}")
    finite = np.isfinite(student).all(1) & np.isfinite(teacher).all(1)
    alike = (_softmax(student[finite]) * _softmax(teacher[finite])).sum(1)
    found = np.ones(len(student), np.float32)
    # Rounding may take a sum of products of probabilities a little past 1.
    found[finite] = np.clip(1 - alike, 0, 1)
    return found


def _softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    powers = np.exp(logits - logits.max(1, keepdims=True, initial=-np.inf))
    return powers / powers.sum(1, keepdims=True)
