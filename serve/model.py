"""The models that a server holds: loaded, tested, warmed up, exchanged while requests go on."""

import asyncio
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fdml import bundle as bundles
from fdml.errors import InputError, unknown
from fdml.runtime import RobustClassifier
from fdml.serve.batcher import Batcher
from fdml.serve.config import Config, ModelConfig
from fdml.serve.wire import Reader, Writer

_APART = 1e-3
"""How far the logits of an image may differ by what else is in its batch, relative to the largest of them."""

Watch = Callable[[str, int, float, float], None]
"""Is told of a batch: the model, its images, the seconds that they waited at most and that it ran."""
Trouble = Callable[[Exception], None]


class Served:
    """One version of a model, ready to answer; made in the event loop after ``load`` elsewhere.

    Who asks it more than once, or later, counts among the ``holders``, so that it stays until then. ``inferences`` are
    the images that it was run on, random copies with them.
    """

    def __init__(
        self, of: ModelConfig, classifier: RobustClassifier, config: Config, watch: Watch, trouble: Trouble
    ) -> None:
        name = of.called
        self.name, self.version = name, of.version
        self.classifier = classifier
        self.shape = classifier.input
        self.weights = classifier.sha256
        self.reader = Reader(self.shape, config.batching.largest)
        self.writer = Writer(name, of.version, classifier.classes)

        def seen(images: int, waited: float, ran: float) -> None:
            self.inferences += images
            watch(name, images, waited, ran)

        self.holders = self.inferences = 0
        instances = config.compute.instances
        self.batcher = Batcher(classifier.run, self.shape, config.gathering, instances, seen, trouble)
        self.teacher: Batcher | None = None
        if classifier.has_teacher:
            run = classifier.teacher_logits
            self.teacher = Batcher(run, self.shape, config.gathering, 1, trouble=trouble)

    @property
    def batchers(self) -> list[Batcher]:
        """All that gather for it."""
        return [self.batcher, *([self.teacher] if self.teacher else [])]

    @property
    def certificates(self) -> list[str]:
        """The norms that it can certify in."""
        return (["l2"] if self.sigma else []) + (["linf"] if self.classifier.has_bounds else [])

    @property
    def sigma(self) -> float:
        """The noise that it was trained with; 0 for none."""
        return float(self.classifier.card.recipe.get("sigma") or 0.0)

    async def retire(self) -> None:
        """Answers what it has taken, and ends."""
        while self.holders or not all(batcher.idle for batcher in self.batchers):
            for batcher in self.batchers:
                batcher.expire()
            await asyncio.sleep(0.01)
        for batcher in self.batchers:
            batcher.close()


def load(path: Path, config: Config) -> RobustClassifier:
    """A bundle, checked, loaded and warmed up: what takes long, to be called in a thread.

    Raises ``InputError`` for a bundle that cannot be loaded, and one whose answers are no numbers or depend on what
    else is in the batch.
    """
    threads = config.compute.threads or os.cpu_count() or 1
    # Threads that wait in a loop would take the cores from the connections.
    classifier = RobustClassifier.load(path, config.compute.provider, threads, spin=False)
    random = np.random.default_rng(0)
    preferred = config.gathering.sizes
    # A GPU chooses its kernels by the batch; a CPU has seen all with the smallest, and a large network takes long.
    sizes = [1, *(preferred[:1] if classifier.provider == "cpu" else preferred)]
    images = random.random((sizes[-1], *classifier.input), np.float32)
    images[0], images[-1] = 0, 1
    alone = None
    for size in sizes:
        logits = classifier.run(images[:size])
        alone = logits[0] if alone is None else alone
        if logits.shape != (size, len(classifier.classes)) or not np.isfinite(logits).all():
            raise InputError(f"{path}: its self-test failed: the logits of {size} images are not all numbers")
        if np.abs(logits[0] - alone).max() > _APART * max(1.0, float(np.abs(alone).max())):
            raise InputError(f"{path}: its self-test failed: the answer depends on what else is in the batch")
    if classifier.has_teacher:
        classifier.teacher_logits(images[:1])
    if classifier.has_bounds:
        classifier.certified_linf(images[0], 0.0)
    return classifier


@dataclass
class Place:
    """A version of a model that is or could be served: where it lies, and what it is just now."""

    of: ModelConfig
    served: Served | None = None
    reason: str = ""
    stamp: tuple[int, int, int] | None = None
    """What the file of sums was when it was last looked at."""
    wanted: bool = True
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def state(self) -> str:
        """As the model repository extension of the protocol names it."""
        return "READY" if self.served else "UNAVAILABLE"


class Repository:
    """All models. Every method is called in the event loop; loading happens in threads."""

    def __init__(self, config: Config, watch: Watch, trouble: Trouble) -> None:
        self._config, self._watch, self._trouble = config, watch, trouble
        self._places = [Place(of) for of in config.models]
        self.ready: dict[str, dict[str, Served]] = {}
        """By name and version."""
        self.infer: dict[bytes, Served] = {}
        """By the path of a request to infer."""

    def __iter__(self) -> Iterator[Served]:
        return (served for versions in self.ready.values() for served in versions.values())

    @property
    def places(self) -> list[Place]:
        """All versions of all models, also those that are not loaded."""
        return list(self._places)

    def find(self, name: str, version: str | None = None) -> Served:
        """The version of a model, or its highest. Raises ``InputError`` for one that is not there."""
        versions = self.ready.get(name)
        if not versions:
            raise unknown("model", name[:100], self.ready)
        if version is None:
            return versions[max(versions, key=_order)]
        if version not in versions:
            raise unknown(f"version of {name!r}", version[:100], versions)
        return versions[version]

    def named(self, name: str) -> list[Place]:
        """The versions of a model. Raises ``InputError`` for a name that was not configured."""
        found = [place for place in self._places if place.of.called == name]
        if not found:
            raise unknown("model", name[:100], {place.of.called for place in self._places})
        return found

    async def load(self, place: Place) -> None:
        """Loads a place, or loads it anew; the old one serves until the new one has passed its test, and on if it does
        not. Raises ``InputError``."""
        async with place.lock:
            place.wanted = True
            path = Path(place.of.path)
            place.stamp = stamp(path)
            try:
                classifier = await asyncio.to_thread(load, path, self._config)
            except (InputError, ImportError) as error:
                place.reason = str(error)
                raise
            old, place.served = place.served, Served(place.of, classifier, self._config, self._watch, self._trouble)
            place.reason = ""
            self._index()
            if old is not None:
                await old.retire()

    async def unload(self, place: Place) -> None:
        """Takes a place out of service after what it has taken."""
        async with place.lock:
            old, place.served = place.served, None
            place.wanted, place.reason = False, "unloaded"
            self._index()
            if old is not None:
                await old.retire()

    def changed(self) -> list[Place]:
        """The places whose bundle is another than when they were last loaded or refused."""
        return [place for place in self._places if place.wanted and stamp(Path(place.of.path)) != place.stamp]

    def _index(self) -> None:
        self.ready = {}
        for place in self._places:
            if place.served is not None:
                self.ready.setdefault(place.of.called, {})[place.of.version] = place.served
        self.infer = {}
        for name, versions in self.ready.items():
            self.infer[f"/v2/models/{name}/infer".encode()] = self.find(name)
            for version, served in versions.items():
                self.infer[f"/v2/models/{name}/versions/{version}/infer".encode()] = served


def stamp(path: Path) -> tuple[int, int, int] | None:
    """What tells that a bundle was written anew: its sums are written last."""
    try:
        found = (path / bundles.SUMS if path.is_dir() else path).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def _order(version: str) -> tuple[int, int, str]:
    return (1, int(version), "") if version.isdigit() else (0, 0, version)
