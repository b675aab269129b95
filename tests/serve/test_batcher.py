"""Who is in a batch, when it runs, and what becomes of the others."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from fdml.serve.batcher import Batcher, Batching, Full, Job

SHAPE = (1, 2, 2)


class Asked(Job):
    """A job that remembers what became of it."""

    def __init__(self, value: float = 0.5, count: int = 1, seconds: float = 5.0, *, noisy: bool = False) -> None:
        super().__init__(np.full((count, *SHAPE), value, np.float32), time.monotonic() + seconds)
        self.noisy_too = noisy
        self.left = False
        self.done = asyncio.Event()
        self.logits: np.ndarray | None = None
        self.error: tuple[int, str] | None = None

    @property
    def noisy(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.noisy_too

    @property
    def gone(self) -> bool:
        return self.left

    def finish(self, logits: np.ndarray, probabilities: np.ndarray) -> None:
        assert np.allclose(probabilities.sum(1), 1)
        self.logits = logits
        self.done.set()

    def fail(self, status: int, message: str) -> None:
        self.error = (status, message)
        self.done.set()


class Network:
    """Logits that are the first pixel and its negative; remembers the batches; waits for ``gate``."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.troubles: list[Exception] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self.sizes.append(len(images))
        assert self.gate.wait(10)
        if (images == 0.125).any():
            raise RuntimeError("a kernel fell over")
        first = images[:, 0, 0, 0]
        return np.stack([np.where(first == 0.25, np.nan, first), -first], 1).astype(np.float32)


def run(test: Callable[[Batcher, Network], Awaitable[None]], how: Batching | None = None, instances: int = 1) -> None:
    async def go() -> None:
        network = Network()
        how_then = how or Batching(largest=8, preferred=(4, 8), delay=0.01)
        batcher = Batcher(network, SHAPE, how_then, instances, trouble=network.troubles.append)
        try:
            await asyncio.wait_for(test(batcher, network), 20)
        finally:
            network.gate.set()
            batcher.close()

    asyncio.run(go())


async def finished(jobs: list[Asked]) -> None:
    for job in jobs:
        await asyncio.wait_for(job.done.wait(), 10)


def test_each_gets_its_own_answer() -> None:
    async def test(batcher: Batcher, network: Network) -> None:
        jobs = [Asked(value / 70, count) for value, count in zip(range(30), [1, 2, 3] * 10, strict=True)]
        for job in jobs:
            batcher.submit(job)
        await finished(jobs)
        for value, job in enumerate(jobs):
            assert job.logits is not None
            assert job.logits.shape == (len(job.images), 2)
            assert np.allclose(job.logits[:, 0], value / 70)
        assert max(network.sizes) <= 8
        assert len(network.sizes) < 20, "they were gathered"
        assert batcher.idle

    run(test)


def test_one_alone_waits_no_longer_than_the_delay() -> None:
    async def test(batcher: Batcher, network: Network) -> None:
        job = Asked()
        began = time.monotonic()
        batcher.submit(job)
        await asyncio.sleep(0)
        assert network.sizes == [], "a batch is waited for"
        await finished([job])
        assert time.monotonic() - began >= 0.01
        assert network.sizes == [1]

    run(test)


def test_a_preferred_size_is_not_waited_for() -> None:
    async def test(batcher: Batcher, network: Network) -> None:
        jobs = [Asked() for _ in range(4)]
        for job in jobs:
            batcher.submit(job)
        await finished(jobs)
        assert network.sizes == [4]

    run(test, Batching(largest=8, preferred=(4, 8), delay=5.0))


def test_a_full_queue_refuses() -> None:
    async def test(batcher: Batcher, network: Network) -> None:
        network.gate.clear()
        jobs = [Asked() for _ in range(4 + 10)]
        for job in jobs:
            batcher.submit(job)
        with pytest.raises(Full) as full:
            batcher.submit(Asked())
        assert full.value.seconds > 0
        network.gate.set()
        await finished(jobs)
        late = Asked()
        batcher.submit(late)
        await finished([late])

    run(test, Batching(largest=4, preferred=(4,), delay=0.001, queue=10))


def test_what_could_not_be_served_in_time_is_refused_at_once() -> None:
    async def test(batcher: Batcher, network: Network) -> None:
        network.gate.clear()
        jobs = [Asked(count=4) for _ in range(5)]
        for job in jobs:
            batcher.submit(job)
        batcher.pace = 1.0
        with pytest.raises(Full):
            batcher.submit(Asked(seconds=0.5))
        network.gate.set()
        await finished(jobs)

    run(test)


def test_a_batch_that_was_held_up_does_not_close_the_queue() -> None:
    async def test(batcher: Batcher, network: Network) -> None:
        network.gate.clear()
        held = Asked()
        batcher.submit(held)
        await asyncio.sleep(0.3)
        network.gate.set()
        await finished([held])
        assert batcher.pace > 0.2
        for _ in range(6):
            jobs = [Asked() for _ in range(4)]
            for job in jobs:
                batcher.submit(job)
            await finished(jobs)
        assert batcher.pace < 0.1

    run(test)


def test_a_deadline_that_passes_is_told_while_the_network_is_busy() -> None:
    async def test(batcher: Batcher, network: Network) -> None:
        network.gate.clear()
        first, late = [Asked() for _ in range(4)], Asked(seconds=0.05)
        for job in [*first, late]:
            batcher.submit(job)
        await asyncio.sleep(0.06)
        batcher.expire()
        assert late.error is not None
        assert late.error[0] == 504
        assert batcher.waiting == 0
        network.gate.set()
        await finished(first)

    run(test)


def test_who_hung_up_is_in_no_batch() -> None:
    async def test(batcher: Batcher, network: Network) -> None:
        network.gate.clear()
        first, rest = [Asked() for _ in range(4)], [Asked() for _ in range(4)]
        for job in [*first, *rest]:
            batcher.submit(job)
        rest[0].left = rest[3].left = True
        network.gate.set()
        await finished([*first, rest[1], rest[2]])
        assert network.sizes == [4, 2]
        assert rest[0].logits is None
        assert rest[0].error is None

    run(test)


@pytest.mark.parametrize(
    ("poison", "status", "message"),
    [
        (float("nan"), 400, "images[1] has the pixel nan"),
        (1.5, 400, "images[1] has the pixel 1.5"),
        (0.125, 500, "could not be run: RuntimeError"),
        (0.25, 500, "not finite"),
    ],
)
def test_a_poisoned_request_fails_alone(poison: float, status: int, message: str) -> None:
    async def test(batcher: Batcher, network: Network) -> None:
        good, bad = [Asked(0.75), Asked(0.5), Asked(-0.0)], Asked(0.5, 2)
        bad.images[1] = poison
        jobs = [good[0], bad, *good[1:]]
        for job in jobs:
            batcher.submit(job)
        await finished(jobs)
        assert bad.error is not None
        assert bad.error[0] == status
        assert message in bad.error[1]
        assert [str(error) for error in network.troubles] == (["a kernel fell over"] if "Runtime" in message else [])
        for job in good:
            assert job.logits is not None
            assert job.logits[0, 0] == job.images[0, 0, 0, 0]

    run(test, Batching(largest=8, preferred=(5,), delay=1.0))


def test_random_copies_wait_for_others_and_never_starve() -> None:
    async def test(batcher: Batcher, network: Network) -> None:
        network.gate.clear()
        copies = [Asked(1.5, 3, noisy=True) for _ in range(2)]
        jobs = [Asked() for _ in range(8 * 8)]
        for job in [Asked() for _ in range(4)]:  # what runs while the others come
            batcher.submit(job)
        for job in [*copies, *jobs]:
            batcher.submit(job)
        network.gate.set()
        await finished([*copies, *jobs])
        assert all(copy.logits is not None and copy.logits[0, 0] == 1.5 for copy in copies), "they may leave [0, 1]"
        places = [place for place, size in enumerate(network.sizes) if size == 3]
        assert places[0] > 1
        assert places[1] < len(network.sizes) - 1

    run(test)


def test_closing_fails_what_waits() -> None:
    async def test(batcher: Batcher, network: Network) -> None:
        network.gate.clear()
        jobs = [Asked() for _ in range(4)]
        waits = Asked()
        for job in [*jobs, waits]:
            batcher.submit(job)
        batcher.close()
        assert waits.error is not None
        assert waits.error[0] == 503
        late = Asked()
        batcher.submit(late)
        assert late.error is not None, "nothing waits for threads that are gone"
        network.gate.set()
        await finished(jobs)
        assert all(job.logits is not None for job in jobs), "what ran is answered"

    run(test)
