"""How far an answer can be trusted: certificates, within bounds of time and samples."""

import asyncio
import hashlib
import secrets
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from fdml.errors import InputError
from fdml.serve.batcher import Full, Job
from fdml.serve.config import CertifyConfig
from fdml.serve.http import Request
from fdml.serve.model import Served
from fdml.smoothed import ArraySmoother, Smoothing, sigma_of

_CHUNK_SECONDS = 0.01
"""About how long a batch of random copies keeps an instance from ordinary requests."""
_MARGIN = 0.05
"""Seconds before its deadline at which a certificate is what was shown until then."""


class Trust:
    """Makes certificates in ``workers`` threads; at most ``queue`` may wait."""

    def __init__(self, how: CertifyConfig) -> None:
        self._how = how
        self._pool = ThreadPoolExecutor(how.workers, "fdml-certify")
        self._pending = 0
        self._known: OrderedDict[tuple[str, bytes, float], dict[str, Any]] = OrderedDict()

    async def certify(
        self,
        served: Served,
        image: np.ndarray,
        radius: float,
        norm: str,
        samples: int,
        deadline: float,
        request: Request,
    ) -> dict[str, Any]:
        """What is certified of the answer about an image (c, h, w), as JSON values.

        ``norm`` "l2" samples the smoothed classifier, at most ``samples`` times and until ``deadline``; "linf" proves
        by bounds, without chance, and remembers. What is not shown is not claimed: ``holds`` says whether ``radius``
        is. Raises ``Full``, and ``InputError`` for what the model cannot do.
        """
        if self._pending >= self._how.workers + self._how.queue:
            raise Full(1.0)
        loop = asyncio.get_running_loop()
        self._pending += 1
        try:
            if norm == "linf":
                key = (served.weights, hashlib.sha256(image.tobytes()).digest(), radius)
                found = self._known.get(key)
                if found is None:
                    found = await loop.run_in_executor(self._pool, _by_bounds, served, image, radius)
                    self._known[key] = found
                    while len(self._known) > self._how.cache:
                        self._known.popitem(last=False)
                return found
            sigma = sigma_of(served.classifier.card, None, force=False)
            how = Smoothing(sigma, samples, self._how.alpha, (radius,), secrets.randbits(63))
            work = _Sampling(served, loop, deadline - _MARGIN, request)
            return await loop.run_in_executor(self._pool, work.certificate, image, how, radius)
        finally:
            self._pending -= 1

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _by_bounds(served: Served, image: np.ndarray, radius: float) -> dict[str, Any]:
    proof = served.classifier.certified_linf(image, radius)[0]
    return {
        "norm": "linf",
        "radius": radius if proof.certified else 0.0,
        "asked": radius,
        "holds": proof.certified,
        "label": proof.label if proof.certified else None,
        "alpha": 0.0,
        "samples": 0,
        "method": "bounds",
        "abstained": not proof.certified,
    }


class _Sampling:
    """The random copies of one image, classified in the batches of its model."""

    def __init__(self, served: Served, loop: asyncio.AbstractEventLoop, deadline: float, request: Request) -> None:
        self._served, self._loop, self._deadline, self._request = served, loop, deadline, request
        pace = served.batcher.pace or _CHUNK_SECONDS
        self._chunk = max(1, min(128, int(_CHUNK_SECONDS / pace)))

    def certificate(self, image: np.ndarray, how: Smoothing, radius: float) -> dict[str, Any]:
        smoother = ArraySmoother(self._classify, self._served.classifier.classes, how, 1)
        found = smoother.certify(image, 0)
        return {
            "norm": "l2",
            "radius": found.radius,
            "asked": radius,
            "holds": found.radius >= radius and not found.abstained,
            "label": found.label,
            "alpha": how.alpha,
            "samples": found.n,
            "sigma": how.sigma,
            "method": "smoothing",
            "abstained": found.abstained,
            "stopped": "deadline" if time.monotonic() >= self._deadline else None,
        }

    def _classify(self, pixels: np.ndarray) -> np.ndarray | None:
        """The logits of random copies; None when the time is over or nobody waits for them any more."""
        jobs = [
            _Copies(pixels[first : first + self._chunk], self._deadline, self._request)
            for first in range(0, len(pixels), self._chunk)
        ]
        self._loop.call_soon_threadsafe(self._submit, jobs)
        for job in jobs:
            # Where the deadline passes the batcher says so; the slack is for a loop that is late.
            if not job.done.wait(max(0.0, self._deadline - time.monotonic()) + 1.0) or job.logits is None:
                return None
        return np.concatenate([job.logits for job in jobs if job.logits is not None])

    def _submit(self, jobs: "list[_Copies]") -> None:
        for job in jobs:
            self._served.batcher.submit(job)


class _Copies(Job):
    __slots__ = ("_request", "done", "logits")
    noisy = True

    def __init__(self, images: np.ndarray, deadline: float, request: Request) -> None:
        super().__init__(images, deadline)
        self._request = request
        self.done = threading.Event()
        self.logits: np.ndarray | None = None

    @property
    def gone(self) -> bool:
        if self._request.gone:
            self.done.set()
        return self._request.gone

    def finish(self, logits: np.ndarray, probabilities: np.ndarray) -> None:
        self.logits = logits
        self.done.set()

    def fail(self, status: int, message: str) -> None:
        self.done.set()


def norm_for(served: Served, asked: str | None) -> str:
    """The norm to certify in: the one that was ``asked`` for, or what the model is made for.

    Raises ``InputError`` for another norm, and for a model that has no certificates of that kind.
    """
    can = served.certificates
    if asked not in (None, "l2", "linf"):
        raise InputError(f"norm={asked[:20]!r}: it is l2 or linf")
    if not can:
        raise InputError(
            f"{served.name} has no certificates: train with noise (`fdml train fdml-smooth`), or export a small network"
            " with --bounds"
        )
    if asked is not None and asked not in can:
        raise InputError(f"{served.name} has no certificates in {asked}; it has in {' and '.join(can)}")
    return asked or can[0]
