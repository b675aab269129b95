"""One network and one property file, in the words of the verification competition (VNN-COMP)."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdml.certify.graph import Network
from fdml.certify.runner import OnnxRunner
from fdml.certify.verify import verify
from fdml.certify.vnnlib import read, write_counterexample
from fdml.errors import InputError

WORDS = {"certified": "unsat", "falsified": "sat", "unknown": "unknown", "timeout": "timeout"}


@dataclass(frozen=True)
class Decision:
    """``word`` is sat (a counter-example was found), unsat (there is none), unknown or timeout; ``bound`` is the margin
    that was proved, ``domains`` how many parts of the input region were bounded."""

    word: str
    method: str
    bound: float
    domains: int
    seconds: float
    counterexample: str | None

    def to_dict(self) -> dict[str, Any]:
        """JSON values; a bound that is no number is null."""
        return {
            "verdict": self.word,
            "seconds": round(self.seconds, 3),
            "method": self.method,
            "bound": self.bound if math.isfinite(self.bound) else None,
            "domains": self.domains,
            "counterexample": self.counterexample,
        }


def decide(
    model: Path, vnnlib: Path, *, timeout: float, out: Path | None = None, seed: int = 0, began: float | None = None
) -> Decision:
    """Decides whether any input that the property file allows gives an output that it asks for, within ``timeout``
    seconds in all, which count from ``began`` (time.monotonic; None: now). A counter-example, confirmed by running the
    ONNX file itself, is written to ``out``.

    Raises ``InputError`` for a network that bounds do not cover and for a file that does not fit it.
    """
    began = time.monotonic() if began is None else began
    if model.name.removesuffix(".gz").rpartition(".")[2] != "onnx":
        raise InputError(f"{model}: --vnnlib is about an ONNX file: .onnx or .onnx.gz")
    if not 0 < timeout < math.inf:
        raise InputError(f"--timeout {timeout:g}: the seconds must be above 0")
    runner = OnnxRunner(model)
    network = Network.read(model)
    properties = read(vnnlib, network.inputs, network.outputs)
    left = max(0.1, timeout - (time.monotonic() - began))
    verdict = verify(network, properties, runner=runner, timeout=left, seed=seed)
    if verdict.x is not None and verdict.y is not None and out is not None:
        write_counterexample(out, verdict.x, verdict.y)
    return Decision(
        WORDS[verdict.status],
        verdict.method,
        verdict.bound,
        verdict.domains,
        time.monotonic() - began,
        str(out) if verdict.x is not None and out is not None else None,
    )
