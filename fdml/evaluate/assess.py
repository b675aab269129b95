"""A whole evaluation: every entry of a suite on every model, chunk by chunk, resumable, by one process or several."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

import fdml
from fdml.attacks import Model, alma, fmn, mi_fgsm
from fdml.data.dataset import Batch, DataSet
from fdml.errors import InputError
from fdml.evaluate.accuracy import predictions
from fdml.evaluate.corruptions import CORRUPTIONS, corrupt
from fdml.evaluate.curve import around, curve
from fdml.evaluate.store import Record, Store
from fdml.evaluate.suites import Entry, Step, entries
from fdml.evaluate.victim import Victim
from fdml.randomness import Generator, Streams
from fdml.threat import Threat
from fdml.world import World

CHUNK = 256
"""Images of one unit of work: enough that those still standing fill the caches, little enough to lose when killed."""

MATRIX_LIMIT = 512
"""Images of the transfer matrix."""

GUIDES = 256
"""Training images whose features the feature attacks drive towards."""

EXTRAS = {"quick": (), "standard": ("curve", "minimal", "corruptions"), "full": ("curve", "minimal", "corruptions")}

MINIMAL: dict[str, tuple[str, Callable]] = {"alma": ("l2", alma), "fmn": ("linf", fmn)}
"""The minimal-norm attacks and their norms."""

MINIMAL_LIMIT = 256
"""They are run on so many images, the first ones."""

SEVERITIES = (1, 3, 5)


@dataclass(frozen=True)
class Source:
    """A model that the attacker owns; ``protocol`` is gray or black."""

    protocol: str
    victim: Victim


@dataclass(frozen=True)
class Plan:
    """What is evaluated. Two evaluations of equal plans give equal results, however the work was cut."""

    data: DataSet
    threat: Threat
    suite: str = "standard"
    protocols: tuple[str, ...] = ("white", "query", "control")
    attacks: tuple[str, ...] = ()
    limit: int = 1000
    seed: int = 0
    rng: str = "image"
    chunk: int = CHUNK

    def __post_init__(self) -> None:
        if self.limit < 1 or not 1 <= self.chunk <= 10_000:
            raise InputError(f"limit must be at least 1 and chunk from 1 to 10000, got {self.limit} and {self.chunk}")
        if self.rng not in ("image", "reference"):
            raise InputError(f"rng must be 'image' or 'reference', got {self.rng!r}")

    @property
    def count(self) -> int:
        """The images evaluated: the first of the test split."""
        return min(self.limit, len(self.data.test))

    @property
    def starts(self) -> range:
        """The first image of each chunk."""
        return range(0, self.count, self.chunk)

    def batch(self, start: int) -> Batch:
        """The chunk that begins at image ``start``."""
        index = torch.arange(start, min(start + self.chunk, self.count))
        return next(iter(self.data.test.batches([index])))

    def generator(self, index: Tensor, name: str) -> Generator:
        """The random numbers of one step on one chunk."""
        if self.rng == "image":
            return Streams.of(index, self.seed, name)
        return torch.Generator(index.device).manual_seed(self.seed)

    def identity(self, victims: Sequence[Victim], surrogates: Mapping[str, Source]) -> dict[str, Any]:
        """What decides the result, as JSON values."""
        return {
            "fdml": fdml.__version__,
            "models": [[victim.name, victim.sha256()] for victim in victims],
            "surrogates": {name: [each.protocol, each.victim.sha256()] for name, each in surrogates.items()},
            "data": self.data.fingerprint,
            "images": self.count,
            "norm": self.threat.norm,
            "eps": self.threat.eps,
            "suite": self.suite,
            "protocols": list(self.protocols),
            "attacks": list(self.attacks),
            "seed": self.seed,
            "rng": self.rng,
            "chunk": self.chunk,
        }


class Watch(Protocol):
    """Who looks on: ``begins`` before each unit of work, with the share of the work done; ``ends`` after each job, with
    the accuracy of this process's images, where the job has one."""

    def begins(self, victim: str, job: str, share: float) -> None: ...

    def ends(self, victim: str, job: str, accuracy: float | None) -> None: ...


@dataclass(frozen=True)
class Job:
    """One line of work on every chunk: ``run`` takes a chunk's first image and gives what stands of it, or None.

    ``cost`` is a rough number of forward passes an image, for the time that is left.
    """

    name: str
    cost: float
    run: Callable[[int], Tensor | None]


def assess(
    plan: Plan,
    victims: Sequence[Victim],
    store: Store,
    world: World,
    *,
    surrogates: Mapping[str, Source] | None = None,
    watch: Watch | None = None,
) -> None:
    """Runs whatever the store does not hold yet; ``summary.report`` then makes the report of it.

    Each process takes every N-th chunk. Raises ``InputError`` for a model whose answers do not fit the data.
    """
    work = _Work(plan, store, surrogates or {}, victims)
    jobs = [(victim, job) for victim in victims for job in work.jobs(victim)]
    chunks = list(plan.starts)[world.rank :: world.size]
    total = sum(job.cost for _, job in jobs) * max(1, len(chunks))
    done = 0.0
    for victim, job in jobs:
        stands = []
        for start in chunks:
            if watch is not None:
                watch.begins(victim.name, job.name, done / total)
            found = job.run(start)
            stands += [] if found is None else [found]
            done += job.cost
        if watch is not None:
            watch.ends(victim.name, job.name, float(torch.cat(stands).double().mean()) if stands else None)
    world.barrier()


def entries_of(plan: Plan, victim: Victim, surrogates: Mapping[str, Source]) -> list[Entry]:
    """What the plan runs on a victim."""
    return entries(
        plan.suite,
        plan.protocols,
        plan.attacks,
        {name: each.protocol for name, each in surrogates.items()},
        norm=plan.threat.norm,
        gradients=victim.gradients,
        features=victim.outputs is not None,
    )


class _Work:
    """The units of work, each a function of a chunk's first image that does nothing where the store has the result."""

    def __init__(self, plan: Plan, store: Store, surrogates: Mapping[str, Source], victims: Sequence[Victim]) -> None:
        self.plan, self.store, self.surrogates, self.victims = plan, store, surrogates, victims
        self._guides: Batch | None = None
        self._held: tuple[int, Batch] | None = None

    def jobs(self, victim: Victim) -> list[Job]:
        found = [Job("clean", 1, lambda start: self.clean(victim, start))]
        for one in entries_of(self.plan, victim, self.surrogates):
            found.append(Job(one.label, one.cost, lambda start, one=one: self.entry(victim, one, start)))
        if self.plan.attacks:
            return found
        extras = EXTRAS[self.plan.suite]
        if "curve" in extras and victim.gradients:
            found.append(Job("curve over eps", 300, lambda start: self.curve(victim, start)))
        if "minimal" in extras and victim.gradients:
            for name in MINIMAL:
                found.append(
                    Job(f"minimal norm, {name}", 300, lambda start, name=name: self.minimal(victim, name, start))
                )
        if "corruptions" in extras:
            found.append(Job("corruptions", 30, lambda start: self.corruptions(victim, start)))
        if victim is self.victims[-1] and len(self.sources()) > 1 and self.plan.threat.norm != "l1":
            for name in self.sources():
                found.append(Job(f"transfer from {name}", 30, lambda start, name=name: self.matrix(name, start)))
        return found

    def sources(self) -> dict[str, Model]:
        """The rows and columns of the transfer matrix: every model that has gradients."""
        found = {victim.name: victim.model for victim in self.victims if victim.gradients}
        return found | {name: each.victim.model for name, each in self.surrogates.items()}

    def batch(self, start: int) -> Batch:
        if self._held is None or self._held[0] != start:
            self._held = start, self.plan.batch(start)
        return self._held[1]

    def clean(self, victim: Victim, start: int) -> Tensor:
        if self.store.read(victim.name, "clean", start) is None:
            x = self.batch(start).x
            _check_fit(victim, x, len(self.plan.data.classes))
            self.store.write(victim.name, "clean", start, {"answers": predictions(victim.model, x).cpu()}, {})
        return self.right(victim, start)

    def right(self, victim: Victim, start: int) -> Tensor:
        state = self.store.read(victim.name, "clean", start)
        assert state is not None
        return state.tensors["answers"] == self.batch(start).y.cpu()

    def entry(self, victim: Victim, one: Entry, start: int) -> Tensor:
        standing = self.right(victim, start)
        for each in one.steps:
            record = self.store.record(victim.name, each.name, start, len(standing))
            if bool((standing & ~record.tried).any()):
                self.step(victim, each, start, record, standing & ~record.tried, counts=one.counts)
            standing = standing & ~record.fooled
        return standing

    def step(self, victim: Victim, each: Step, start: int, record: Record, todo: Tensor, *, counts: bool) -> None:
        """Runs one step on the images ``todo`` of a chunk, and keeps what came of it."""
        threat = self.plan.threat
        index, x, y = self.batch(start)
        rows = todo.nonzero().squeeze(1)
        here = rows.to(x.device)
        x, y = x[here], y[here]
        generator = self.plan.generator(index[here], each.name)
        options: dict[str, Any] = {}
        model = victim.model
        queries = torch.zeros(len(rows), dtype=torch.int64, device=x.device)
        if each.source is not None:
            model = self.surrogates[each.source].victim.model
        elif each.counted:
            model = victim.forward
            options["queries"] = queries
        elif each.access == "features":
            guides = self.guides()
            options |= {"guides": guides.x, "guide_y": guides.y}
        if each.helped and each.source is None:
            options["forward"] = victim.forward
        began = time.process_time() if x.device.type == "cpu" else time.monotonic()
        x_adv = each.attack(model, x, y, threat, generator=generator, **options)
        assert not counts or bool(threat.contains(x_adv, x).all()), f"{each.name} left the threat model"
        answers = predictions(victim.model, x_adv)
        fooled = answers != y
        record.seconds += (time.process_time() if x.device.type == "cpu" else time.monotonic()) - began
        record.tried[rows], record.fooled[rows] = True, fooled.cpu()
        record.answers[rows], record.queries[rows] = answers.cpu(), queries.cpu()
        new = fooled.cpu()
        known = self.store.fallen(victim.name, start)
        if known is not None:
            new &= ~torch.isin(rows, known[0])
        if not counts:
            new = torch.zeros_like(new)
        self.store.write_record(victim.name, each.name, start, record, rows[new], x_adv[new.to(x.device)].cpu())

    def guides(self) -> Batch:
        if self._guides is None:
            count = min(GUIDES, len(self.plan.data.train))
            self._guides = next(iter(self.plan.data.train.batches([torch.arange(count)])))
        return self._guides

    def curve(self, victim: Victim, start: int) -> None:
        if self.store.read(victim.name, "curve", start) is not None:
            return
        index, x, y = self.batch(start)
        threat, right = self.plan.threat, self.right(victim, start).to(x.device)
        epsilons = around(threat.eps, threat.norm)
        generator = self.plan.generator(index, "curve")
        stands = curve(victim.model, x, y, threat.norm, epsilons, standing=right, generator=generator)
        self.store.write(victim.name, "curve", start, {"stands": stands.cpu()}, {"eps": list(epsilons)})

    def minimal(self, victim: Victim, name: str, start: int) -> None:
        if start >= MINIMAL_LIMIT or self.store.read(victim.name, name, start) is not None:
            return
        index, x, y = (part[: MINIMAL_LIMIT - start] for part in self.batch(start))
        norm, attack = MINIMAL[name]
        began = time.process_time()
        x_adv = attack(victim.model, x, y, norm, generator=self.plan.generator(index, name))
        distances = Threat(norm, 1.0).distance(x_adv, x)
        distances[predictions(victim.model, x_adv) == y] = torch.inf
        values = {"seconds": time.process_time() - began}
        self.store.write(victim.name, name, start, {"distances": distances.double().cpu()}, values)

    def corruptions(self, victim: Victim, start: int) -> None:
        if self.store.read(victim.name, "corruptions", start) is not None:
            return
        index, x, y = self.batch(start)
        right = {}
        for name in CORRUPTIONS:
            for severity in SEVERITIES:
                changed = corrupt(name, x, severity, self.plan.generator(index, f"{name} {severity}"))
                right[f"{name} {severity}"] = (predictions(victim.model, changed) == y).cpu()
        self.store.write(victim.name, "corruptions", start, right, {})

    def matrix(self, source: str, start: int) -> None:
        """One row of the transfer matrix: crafted on ``source``, answered by every model that has gradients."""
        name = f"matrix-{source}"
        if start >= MATRIX_LIMIT or self.store.read("transfer", name, start) is not None:
            return
        index, x, y = self.batch(start)
        models = self.sources()
        x_adv = mi_fgsm(models[source], x, y, self.plan.threat, generator=self.plan.generator(index, "matrix"))
        right = {target: (predictions(model, x_adv) == y).cpu() for target, model in models.items()}
        self.store.write("transfer", name, start, right, {})


def _check_fit(victim: Victim, x: Tensor, classes: int) -> None:
    try:
        with torch.no_grad():
            logits = victim.model(x[:1])
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{victim.name} refused images {tuple(x.shape[1:])}: {reason}") from None
    if logits.ndim != 2 or logits.shape[1] != classes:
        raise InputError(
            f"{victim.name} answers with logits {tuple(logits.shape[1:])}, but the data has {classes} classes"
        )
