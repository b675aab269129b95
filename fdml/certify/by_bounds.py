"""Certificates by bounds on what a network may answer."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from fdml.certify.bounds import crown, margins
from fdml.certify.certificate import Certificate, Status, pack
from fdml.certify.graph import Network
from fdml.certify.region import Region, robust
from fdml.certify.runner import OnnxRunner
from fdml.certify.smoothing import ignore
from fdml.certify.verify import verify
from fdml.errors import InputError
from fdml.evaluate.session import onnx_of
from fdml.models import Frozen
from fdml.threat import Threat


@dataclass(frozen=True, kw_only=True)
class Bounding:
    """What to prove: that no image within ``eps`` in ``norm`` (linf or l2) and in [0, 1] is answered otherwise, in at
    most ``timeout`` seconds an image. Raises ``InputError`` for a value out of its range."""

    norm: str
    eps: float
    timeout: float = 30.0
    seed: int = 0

    def __post_init__(self) -> None:
        Threat(self.norm, self.eps)
        if self.norm not in ("linf", "l2"):
            raise InputError(f"norm {self.norm!r} is not covered by bounds: linf or l2")
        if not 0 < self.timeout < math.inf:
            raise InputError(f"timeout={self.timeout:g} is out of range: it must be above 0 seconds")


class BoundsProver:
    """Certificates by linear bounds and, where they do not suffice, search and branch and bound.

    ``source`` is an ONNX file or its content. Images are bounded ``together`` first; those left are taken one by one.
    Where labels are given, an image that is answered wrongly gets no time beyond the first bounds.
    """

    together = 16

    def __init__(self, source: Path | bytes, asked: Bounding, *, watch: Callable[[int], None] = ignore) -> None:
        self.asked, self._watch = asked, watch
        self._network = Network.read(source)
        self._runner = OnnxRunner(source)
        self.classes = self._network.outputs

    def prove(self, numbers: Tensor, images: Tensor, labels: Tensor | None) -> Iterator[Certificate]:
        """One certificate an image, about the answer of the ONNX model."""
        began = time.monotonic()
        flat = images.cpu().flatten(1)
        if flat.shape[1] != self._network.inputs:
            raise InputError(f"the network takes {self._network.inputs} values, an image has {flat.shape[1]}")
        answers = self._runner.run(flat.float().numpy()).argmax(1).tolist()
        classes, ask = self.classes, self.asked
        claims = [
            robust(image, answer, classes, norm=ask.norm, eps=ask.eps)
            for image, answer in zip(flat, answers, strict=True)
        ]
        eye = torch.eye(classes, dtype=torch.float64)
        weight = torch.stack([(eye[answer] - eye)[torch.arange(classes) != answer] for answer in answers])
        bounds = margins(self._network, crown(self._network, Region.of(claims)), weight).amin(1).tolist()
        share = (time.monotonic() - began) / len(flat)
        for row, (number, answer, claim, bound) in enumerate(
            zip(numbers.tolist(), answers, claims, bounds, strict=True)
        ):
            label = None if labels is None else int(labels[row])
            began = time.monotonic()
            status: Status = "certified" if bound > 0 else "unknown"
            method, domains, found = "crown", 1, None
            if bound <= 0 and label in (None, answer):
                verdict = verify(
                    self._network, [claim], runner=self._runner, timeout=ask.timeout, seed=ask.seed + number
                )
                status = "unknown" if verdict.status == "timeout" else cast("Status", verdict.status)
                method, domains = verdict.method, verdict.domains
                bound, found = max(bound, verdict.bound), verdict.x
            certified = status == "certified"
            yield Certificate(
                index=number,
                label=label,
                answer=answer,
                status=status,
                radius=ask.eps if certified else 0.0,
                norm=ask.norm,
                method=method,
                seconds=share + time.monotonic() - began,
                seed=ask.seed + number,
                eps=ask.eps,
                bound=bound if math.isfinite(bound) else None,
                domains=domains,
                counterexample=None if found is None else pack(found),
                fooled_at=None if found is None else _distance(found, flat[row], ask.norm),
            )


def onnx_source(model: nn.Module | Path, like: Tensor) -> Path | bytes:
    """What bounds are computed of: the ONNX file, or the content of one made of a torch model.

    Raises ``InputError`` for a model that cannot be exported, with the way out.
    """
    if isinstance(model, Path):
        return model
    try:
        return onnx_of(model if isinstance(model, Frozen) else Frozen(model), like)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise InputError(
            f"the model cannot be exported to ONNX ({reason}): --method smoothing needs no bounds"
        ) from None


def _distance(found: np.ndarray, image: Tensor, norm: str) -> float:
    delta = np.abs(found.astype(np.float64) - image.double().numpy())
    return float(delta.max() if norm == "linf" else np.sqrt((delta**2).sum()))
