"""Requests gathered into batches: when a batch is run, who is in it, and what becomes of those who are not.

Everything that decides runs in the event loop; only the network runs elsewhere, in one thread an instance. A job waits
until an instance is free and either a preferred number of images is there or the oldest job has waited long enough.
Random copies of images, which certificates are made of, are run when no ordinary job is ready, and now and then
although one is, so that they are slow under load and never starve.
"""

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fdml.errors import InputError
from fdml.pixels import check_batch

Run = Callable[[np.ndarray], np.ndarray]
"""Images (n, c, h, w), float32, to logits (n, classes), float32."""

_ONE = np.float32(1).view(np.uint32)
_SHARE = 4
"""Where both wait, one batch in so many is of random copies."""
_HELD = 0.7
"""The part of a job's time in which it must be expected to be answered: a shorter queue answers as many, and sooner."""


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How to gather: the largest batch, the sizes at which one is run at once, how long the oldest waits for more, and
    how many images may wait."""

    largest: int = 64
    preferred: tuple[int, ...] = (8, 16, 32, 64)
    delay: float = 0.002
    queue: int = 1024

    @property
    def sizes(self) -> list[int]:
        """The sizes at which a batch is run at once, the smallest first; the largest batch is one of them."""
        return sorted({size for size in self.preferred if size < self.largest} | {self.largest})


class Full(Exception):  # noqa: N818 — it is an answer
    """The queue is full, or would not be served in time; ``seconds`` is when to try again."""

    def __init__(self, seconds: float) -> None:
        super().__init__("the queue is full; try again")
        self.seconds = seconds


class Job:
    """Images (n, c, h, w), float32, that wait to be classified before ``deadline`` (of ``time.monotonic``).

    Sub-classes say what becomes of them: ``finish`` gets logits and probabilities (n, classes), ``fail`` an HTTP status
    and a line; one of them is called once, in the event loop, unless the client is ``gone``. ``noisy`` images are
    random copies, whose pixels may lie outside [0, 1].
    """

    __slots__ = ("deadline", "images", "since")
    noisy = False

    def __init__(self, images: np.ndarray, deadline: float) -> None:
        self.images, self.deadline = images, deadline
        self.since = 0.0

    @property
    def gone(self) -> bool:
        """Whether nobody waits for it any more."""
        return False

    def finish(self, logits: np.ndarray, probabilities: np.ndarray) -> None:
        """Takes the answer."""
        raise NotImplementedError

    def fail(self, status: int, message: str) -> None:
        """Takes an error."""
        raise NotImplementedError


class Batcher:
    """Gathers jobs for ``run``, which ``instances`` threads call. Its methods are called in the event loop.

    ``watch`` is told of each batch: its images, the seconds that they waited at most and that it ran; ``trouble``, of
    what went wrong in the network.
    """

    def __init__(
        self,
        run: Run,
        shape: tuple[int, int, int],
        how: Batching,
        instances: int,
        watch: Callable[[int, float, float], None] = lambda images, waited, ran: None,
        trouble: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        self._how, self._shape, self._watch, self._trouble = how, shape, watch, trouble
        self._sizes = how.sizes[::-1]
        self._least = self._sizes[-1]
        self._loop = asyncio.get_running_loop()
        self._jobs: deque[Job] = deque()
        self._copies: deque[Job] = deque()
        self.waiting = 0
        """Images that wait, without random copies."""
        self._free = instances
        self._instances = instances
        self._turn = 0
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self.pace = 0.0
        """Seconds an image takes in an instance: what most of the last batches kept to; 0 before the first."""
        self._paces: deque[float] = deque(maxlen=15)
        self._running = 0
        self._work: queue.SimpleQueue[list[Job] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._serve, args=(run,), name=f"fdml-run-{number}", daemon=True)
            for number in range(instances)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        """Takes a job of at most ``largest`` images, to be finished or failed later.

        Raises ``Full`` where as many images wait as may, or more than will surely be run before the job's deadline.
        """
        if self._closed:
            job.fail(503, "the model is being unloaded")
            return
        count, now = len(job.images), time.monotonic()
        job.since = now
        if job.noisy:
            self._copies.append(job)
        else:
            ahead = (self.waiting + self._running + count) * self.pace / self._instances
            if self.waiting + count > self._how.queue or ahead > _HELD * (job.deadline - now):
                raise Full(min(max(ahead, 0.1), 60.0))
            self._jobs.append(job)
            self.waiting += count
        if self._free:
            self._dispatch(now)

    def expire(self) -> None:
        """Fails the jobs whose time is over, and drops those that nobody waits for: a few times a second."""
        now = time.monotonic()
        for jobs in (self._jobs, self._copies):
            if any(job.gone or job.deadline <= now for job in jobs):
                kept = [job for job in jobs if self._alive(job, now)]
                jobs.clear()
                jobs.extend(kept)
        self.waiting = sum(len(job.images) for job in self._jobs)

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self._jobs and not self._copies and self._free == self._instances

    def close(self) -> None:
        """Ends the threads after what runs; jobs that still wait fail."""
        self._closed = True
        for job in [*self._jobs, *self._copies]:
            job.fail(503, "the model is being unloaded")
        self._jobs.clear()
        self._copies.clear()
        self.waiting = 0
        for _ in self._threads:
            self._work.put(None)

    # When a batch is run ---------------------------------------------------------------------------------------------

    def _dispatch(self, now: float) -> None:
        """Gives the free instances what is ready, and sees to it that what is not will be looked at in time."""
        while self._free:
            ready = bool(self._jobs) and (self.waiting >= self._least or now - self._jobs[0].since >= self._how.delay)
            if ready and not (self._copies and self._turn % _SHARE == _SHARE - 1):
                batch = self._ordinary(now)
            elif self._copies:
                batch = self._random(now)
            else:
                break
            self._turn += 1
            if batch:
                self._free -= 1
                self._running += sum(len(job.images) for job in batch)
                self._work.put(batch)
        if self._free and self._jobs and self._timer is None:
            self._timer = self._loop.call_later(max(0.0, self._jobs[0].since + self._how.delay - now), self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._dispatch(time.monotonic())

    def _ordinary(self, now: float) -> list[Job]:
        """The oldest jobs, as many as the largest preferred size that they fill, or all where they fill none."""
        room = next((size for size in self._sizes if size <= self.waiting), self.waiting)
        batch: list[Job] = []
        while self._jobs and (not batch or len(self._jobs[0].images) <= room):
            job = self._jobs.popleft()
            self.waiting -= len(job.images)
            if self._alive(job, now):
                batch.append(job)
                room -= len(job.images)
        return batch

    def _random(self, now: float) -> list[Job]:
        while self._copies:
            job = self._copies.popleft()
            if self._alive(job, now):
                return [job]
        return []

    def _alive(self, job: Job, now: float) -> bool:
        if job.gone:
            return False
        if job.deadline <= now:
            job.fail(504, "the deadline passed before the answer was there")
            return False
        return True

    # In the threads --------------------------------------------------------------------------------------------------

    def _serve(self, run: Run) -> None:
        while (batch := self._work.get()) is not None:
            began = time.monotonic()
            outcomes = self._outcomes(run, batch)
            ran = time.monotonic() - began
            try:
                self._loop.call_soon_threadsafe(self._done, batch, outcomes, began, ran)
            except RuntimeError:  # the loop is closed
                return

    def _outcomes(self, run: Run, batch: Sequence[Job]) -> list[Any]:
        """For each job (logits, probabilities), or (status, message), or the error of the network."""
        images = np.concatenate([job.images for job in batch])  # also where it is one, which may not be aligned
        if not batch[0].noisy and images.view(np.uint32).max() > _ONE:
            faults = [_fault(job, self._shape) for job in batch]
            if any(faults):
                good = [job for job, fault in zip(batch, faults, strict=True) if fault is None]
                rest = iter(self._outcomes(run, good) if good else [])
                return [next(rest) if fault is None else fault for fault in faults]
        try:
            logits = run(images)
        except Exception as error:
            if len(batch) == 1:
                return [error]
            return [outcome for job in batch for outcome in self._outcomes(run, [job])]
        if not np.isfinite(logits).all() and not batch[0].noisy:
            if len(batch) == 1:
                return [(500, "the model gave a logit that is not finite")]
            return [outcome for job in batch for outcome in self._outcomes(run, [job])]
        with np.errstate(all="ignore"):
            powers = np.exp(logits - logits.max(1, keepdims=True))
            powers /= powers.sum(1, keepdims=True)
        outcomes, first = [], 0
        for job in batch:
            last = first + len(job.images)
            outcomes.append((logits[first:last], powers[first:last]))
            first = last
        return outcomes

    def _done(self, batch: list[Job], outcomes: list[Any], began: float, ran: float) -> None:
        self._free += 1
        images = sum(len(job.images) for job in batch)
        self._running -= images
        self._paces.append(ran / images)
        # A promise is kept in four of five cases; a few batches that were held up say nothing about the next.
        self.pace = sorted(self._paces)[int(0.8 * len(self._paces))]
        self._watch(images, began - batch[0].since, ran)
        # The instance is given its next batch before the answers to this one are written.
        self._dispatch(time.monotonic())
        for job, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Exception):
                self._trouble(outcome)
                job.fail(500, f"the model could not be run: {type(outcome).__name__}")
            elif isinstance(outcome[0], int):
                job.fail(*outcome)
            else:
                job.finish(*outcome)


def _fault(job: Job, shape: tuple[int, int, int]) -> tuple[int, str] | None:
    try:
        check_batch(job.images, shape)
    except InputError as error:
        return 400, str(error)
    return None
