"""The clean teacher of a run, beside its student in a bundle: with it the runtime tells how suspicious an image is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fdml.card import Card, read_card
from fdml.checkpoint import load
from fdml.errors import InputError
from fdml.evaluate.session import Session
from fdml.export.convert import convert
from fdml.export.evidence import TOLERANCE, Parity, logits_of
from fdml.models import Frozen
from fdml.suspicion import suspicion


class Teacher:
    """The teacher of the run folder ``run`` whose student has the card ``student``, converted in fp32: ``content`` is
    the ONNX file, ``file`` what it was made of.

    Raises ``InputError`` for a model file by itself, a run without a teacher, and one whose teacher takes other images
    or names other classes than the student.
    """

    def __init__(self, run: Path, student: Card) -> None:
        if not run.is_dir():
            raise InputError(f"{run} is a model by itself, which has no teacher: --teacher needs the run folder")
        self.file = run / "teacher.safetensors"
        if not self.file.exists():
            raise InputError(f"{run} has no teacher.safetensors: --teacher needs a run that was trained with a teacher")
        card = read_card(self.file)
        if (card.input, card.classes) != (student.input, student.classes):
            raise InputError(
                f"{self.file} is for images {card.input} of {_words(card.classes)}, the student for {student.input} of"
                f" {_words(student.classes)}: --teacher needs the same of both"
            )
        model = load(self.file)
        self.source = Frozen(model)
        self.content: bytes = convert(model, card).SerializeToString()

    def evidence(self, artefact: Session, index: Tensor, x: Tensor) -> dict[str, Any]:
        """As JSON values: how far the file's logits are from the model's on clean images x (b, c, h, w) at places
        ``index`` of the test split, whether within the tolerance of fp32 (``reason`` where not), and the median and the
        95th percentile of the suspicion that these images raise beside the student's network ``artefact``."""
        before, after = logits_of(self.source, x), logits_of(Session(self.content), x)
        parity = Parity.of(before, after, index)
        scores = suspicion(logits_of(artefact, x).numpy(), after.numpy())
        reason = None
        if not parity.largest <= TOLERANCE["fp32"]:
            reason = f"the teacher's logits of image {parity.worst} differ by {parity.largest:.3g} (fp32)"
        return {
            "file": self.file.name,
            "clean": parity.to_dict(),
            "tolerance": TOLERANCE["fp32"],
            "suspicion": {"median": float(np.median(scores)), "p95": float(np.quantile(scores, 0.95))},
            "reason": reason,
        }


def _words(classes: Sequence[str]) -> str:
    """How many classes there are, and the first of them."""
    first = ", ".join(classes[:3])
    return f"{len(classes)} classes ({first[:60]}, …)"
