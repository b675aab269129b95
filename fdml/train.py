"""Training, top to bottom: a teacher on clean images, then a student on adversarial ones under its guidance."""

import hashlib
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

import fdml
from fdml.adversary import draw_noise
from fdml.attacks import pgd
from fdml.card import Card, read_card
from fdml.checkpoint import CUSTOM, load, load_state, save, save_state
from fdml.data.dataset import DataSet, Files
from fdml.data.extra import epoch_order
from fdml.errors import InputError, Stopped
from fdml.evaluate import evaluate, predictions
from fdml.guidance import Guided, Teacher
from fdml.interval import certified
from fdml.learner import Learner, learning_rate
from fdml.models import RobustModel, build
from fdml.objective import LOGS
from fdml.progress import Progress
from fdml.recipe import Recipe
from fdml.report import write_report
from fdml.run import CHOOSE, Run
from fdml.threat import Threat
from fdml.train_batch import draw, prepare
from fdml.world import World

STATE_SECONDS = 60.0
"""A state is saved at the end of each epoch, and within an epoch whenever the last one is older than this."""

DRAWS = 8
"""Draws of noise that each validation image is seen through."""

Make = Callable[[], RobustModel]

INTERRUPTED = 130
"""The exit status of a command that a signal stopped, as shells have it."""


def train(
    recipe: Recipe,
    data: DataSet,
    out: str | Path,
    *,
    make: Make | None = None,
    teacher: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
    console: Console | None = None,
) -> dict:
    """Trains what the recipe says and writes the run folder ``out``; returns the closing summary (``summary.json``).

    ``make`` builds a fresh network in place of the recipe's architecture: a function that returns ``fdml.wrap`` of your
    own module; ``fdml.load`` of the files then needs one too. ``teacher`` is a model file to take in place of training
    one. ``device`` None takes a GPU where there is one. ``console`` shows progress; None is silent. Under ``torchrun``
    the processes train one model together, and only the first returns the summary.

    Raises ``InputError`` for a recipe, folder or file that cannot be used, and ``Stopped`` when a loss is no longer
    finite or a signal asks to stop. ``resume`` continues a run, stopped or killed at any moment, to the same weights as
    one that was never stopped.
    """
    began = time.monotonic()
    world = World.join(device)
    threat = Threat(recipe.norm, recipe.eps)
    run = Run(Path(out))
    if console is None or not world.leads:
        console = Console(quiet=True)
    if world.leads:
        run.begin(recipe, {"name": data.name, "fingerprint": data.fingerprint}, resume=resume, overwrite=overwrite)
    world.barrier()
    data = data.to(world.device)

    guide = teach(recipe, data, run, world, teacher, console, make) if recipe.needs_teacher else None
    student = fit(recipe, data, run, world, "student", guide, console, make)

    summary: dict = {}
    if world.leads:
        models = {"teacher": guide.model, "student": student} if guide else {"student": student}
        summary = write_report(run, recipe, data, threat, models, began=began, console=console)
    world.leave()
    return summary


def teach(
    recipe: Recipe,
    data: DataSet,
    run: Run,
    world: World,
    teacher: str | Path | None,
    console: Console,
    make: Make | None = None,
) -> Teacher:
    """The recipe's teacher, trained first or, where a model file is named, taken from there; kept in the run folder."""
    if teacher is None:
        model = fit(recipe.teacher(), data, run, world, "teacher", None, console, make)
    else:
        check_teacher(teacher, data)
        model = load(teacher, device=world.device, model=make() if make else None)
        if world.leads:
            save(model, read_card(teacher), run.model("teacher"))
    return Teacher.of(model, recipe, data.train)


def fit(
    recipe: Recipe,
    data: DataSet,
    run: Run,
    world: World,
    role: str,
    guide: Teacher | None,
    console: Console,
    make: Make | None = None,
) -> RobustModel:
    """Trains one model and writes ``ROLE.safetensors``, the best on validation, and ``ROLE-last.safetensors``.

    Goes on where the run folder holds a state of ``role``, and returns at once where it holds the finished model.
    """
    if run.model(role).exists():
        return load(run.model(role), device=world.device, model=make() if make else None)
    threat, inner = Threat(recipe.norm, recipe.eps), Threat(recipe.norm, recipe.attack_radius * recipe.eps)
    _, val_x, val_y = data.val.head(recipe.val_limit).all()
    with torch.random.fork_rng(devices=[]):  # initialisation draws from torch's global generator, which is the caller's
        torch.manual_seed(_seed(recipe.seed, role))
        model = new_model(recipe, data, guide, make)
        peer = new_model(recipe.peer(), data, None, make).to(world.device) if recipe.has_peer else None
        guided = Guided(model.to(world.device), guide, val_x[:2], peer)
    learner = Learner(recipe, guided.to(world.device, memory_format=torch.channels_last), world)  # pyright: ignore[reportCallIssue]
    position = Position()
    if run.state(role).exists():
        position = restore(run.state(role), learner)
    if world.leads:
        run.keep_rows(role, position.epoch)

    custom = make is not None
    batch_size, rows = recipe.batch_size, world.rows(recipe.batch_size)
    own = len(data.train) - data.extra
    steps = own // batch_size
    if steps == 0 or batch_size % (world.size * recipe.accumulate):
        raise InputError(
            f"batch_size={batch_size} does not fit: it must be at most the {own} training images and a multiple of the"
            f" {world.size} processes times accumulate={recipe.accumulate}"
        )
    if data.extra and not recipe.extra_share:
        raise InputError(f"extra_share=0 leaves the {data.extra:,} extra images unseen: give a share or no --extra")
    # A process that streams files reads its own rows; one that holds all images draws the global batch and keeps its
    # rows, so that augmentation and attacks of N processes use the random numbers of one.
    streams = isinstance(data.train, Files)

    with Progress(console, role, recipe.epochs, steps) as progress, interruptible(world) as interrupted:
        progress.resume(position.epoch * steps + position.step)
        for epoch in range(position.epoch, recipe.epochs):
            began = saved = time.monotonic()
            first = position.step
            order = epoch_order(own, data.extra, batch_size, recipe.extra_share, stream(recipe, role, epoch))
            batches = order[first:]
            model.train()
            for step, batch in enumerate(data.train.batches(list(batches[:, rows] if streams else batches)), first):
                generator = stream(recipe, role, epoch, step, world.rank if streams else 0, device=world.device)
                drawn = draw(recipe, batch, len(data.classes), inner, generator)
                pool, drawn_parts = (drawn.x, drawn.y), drawn.split(recipe.accumulate)
                if not streams:
                    drawn_parts = [part.take(world.rows(len(part.x))) for part in drawn_parts]
                parts = [prepare(recipe, learner.attacked, guide, inner, part, pool) for part in drawn_parts]
                done = (epoch * steps + step) / (recipe.epochs * steps)
                values = learner.step(parts, done)
                position.add(values)
                # One step later every term is spoilt; looking at once tells which was first. A GPU would have to wait
                # for the look, and is asked when a state is saved.
                if world.device.type == "cpu" and not torch.isfinite(values["loss"]):
                    check_finite({name: float(value) for name, value in values.items()}, learner, position, role)

                progress.step(epoch, batch_size, position.means)
                if interrupted() or time.monotonic() - saved > STATE_SECONDS:
                    position.step = step + 1
                    persist(run.state(role), learner, position, role, world)
                    saved = time.monotonic()
                if interrupted():
                    raise Stopped(f"stopped in epoch {epoch + 1} of the {role}: go on with --resume", INTERRUPTED)

            position.epoch, position.step = epoch + 1, 0
            means = world.mean(position.means())
            check_finite(means, learner, position, role)
            if world.leads:
                seconds = time.monotonic() - began
                scores = validate(recipe, learner.average, val_x, val_y, threat)
                score = next(scores[name] for name in CHOOSE if name in scores)
                if score >= position.best:
                    position.best = score
                    card = make_card(recipe, data, learner.average, role, custom, {"epoch": epoch + 1, **scores})
                    save(learner.average, card, run.best(role))
                rate = round((steps - first) * batch_size / seconds, 1)
                row = {"role": role, "epoch": epoch + 1, "lr": learning_rate(recipe, (epoch + 1) / recipe.epochs)}
                run.add_row(row | means | scores | {"seconds": round(seconds, 3), "images_per_second": rate})
                progress.validated(scores)
            position.clear()
            persist(run.state(role), learner, position, role, world)

    if world.leads:
        card = make_card(recipe, data, learner.average, role, custom, {"epoch": recipe.epochs})
        save(learner.average, card, run.model(role, "last"))
        best = run.best(role)
        save(load(best, model=make() if make else None), read_card(best), run.model(role))
    world.barrier()
    return load(run.model(role), device=world.device, model=make() if make else None)


def check_teacher(path: str | Path, data: DataSet) -> None:
    """Raises ``InputError`` where the model at ``path`` was made for other images or classes than ``data`` holds."""
    card = read_card(path)
    if (card.input, len(card.classes)) != (data.input, len(data.classes)):
        raise InputError(
            f"{path} is for images of {card.input} and {len(card.classes)} classes, but {data.name} has {data.input}"
            f" and {len(data.classes)}: give a teacher of the same data"
        )


def new_model(recipe: Recipe, data: DataSet, guide: Teacher | None, make: Make | None) -> RobustModel:
    """A model for the data, initialised at random or, with ``start=teacher``, with the teacher's weights."""
    if make:
        model = make()
    else:
        shape = {"input": data.input, "classes": len(data.classes), "mean": data.mean, "std": data.std}
        model = build(recipe.architecture, **shape, options=_options(recipe))
    if recipe.start == "teacher" and guide:
        try:
            model.load_state_dict(guide.model.state_dict())
        except RuntimeError:
            raise InputError("start=teacher needs a teacher of the student's own architecture and width") from None
    return model


def make_card(
    recipe: Recipe, data: DataSet, model: RobustModel, role: str, custom: bool, metrics: dict[str, float]
) -> Card:
    """What the file of a model trained by ``recipe`` on ``data`` says of itself; metrics are those on validation."""
    return Card(
        architecture=CUSTOM if custom else recipe.architecture,
        options={} if custom else _options(recipe),
        classes=data.classes,
        input=data.input,
        mean=tuple(model.mean.flatten().tolist()),
        std=tuple(model.std.flatten().tolist()),
        threat={"norm": recipe.norm, "eps": recipe.eps} if recipe.is_defended else None,
        role=role,
        recipe=recipe.to_dict(),
        seed=recipe.seed,
        data={"name": data.name, "fingerprint": data.fingerprint},
        metrics={"validation": metrics},
        versions={"fdml": fdml.__version__, "torch": torch.__version__, "python": platform.python_version()},
    )


def validate(recipe: Recipe, model: RobustModel, x: Tensor, y: Tensor, threat: Threat) -> dict[str, float]:
    """Clean accuracy on validation images and, where the recipe defends, accuracy under PGD.

    Where the student sees through noise, it is the accuracy under noise in place of that under PGD: what a smoothed
    classifier votes with. Where it learns by interval bounds, also the share of images that these certify.
    """
    attacks = {"pgd": partial(pgd, steps=recipe.val_steps)} if recipe.attack != "none" and not recipe.sigma else {}
    shares = evaluate(model, x, y, threat, attacks, seed=recipe.seed).shares()
    scores = {name: shares[name] for name in ("clean", *attacks)}
    if recipe.sigma:
        noise = draw_noise(replace(recipe, noise_copies=DRAWS), x, stream(recipe, "validation", device=x.device))
        assert noise is not None
        right = [predictions(model, x + one) == y for one in noise]
        scores["noisy"] = float(torch.stack(right).double().mean())
    if recipe.ibp:
        scores["certified"] = float(certified(model, x, y, threat.eps).double().mean())
    return scores


@dataclass
class Position:
    """Where a run is: whole epochs done, steps done in the next, the sums of its losses, the best validation score."""

    epoch: int = 0
    step: int = 0
    best: float = -1.0
    # Sums stay on the device: reading a number at each step would make a GPU wait for it.
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Means since the epoch began: of a term of the loss over all steps, of a log over the steps that had it."""
        steps = self.counts.get("loss", 1)
        return {
            name: float(total) / (self.counts[name] if name in LOGS else steps) for name, total in self.sums.items()
        }

    def clear(self) -> None:
        self.sums, self.counts = {}, {}


def persist(path: Path, learner: Learner, position: Position, role: str, world: World) -> None:
    """Saves the state of a run, after looking that it is worth going back to."""
    check_finite(position.means(), learner, position, role)
    if world.leads:
        sums = {f"sum.{name}": total for name, total in position.sums.items()}
        values = {name: getattr(position, name) for name in ("epoch", "step", "best", "counts")}
        save_state(path, learner.state() | sums, values)


def restore(path: Path, learner: Learner) -> Position:
    """Goes back to the state at ``path``."""
    state = load_state(path)
    learner.restore(state.tensors)
    sums = {name.removeprefix("sum."): total for name, total in state.tensors.items() if name.startswith("sum.")}
    return Position(**state.values, sums=sums)


def check_finite(means: dict[str, float], learner: Learner, position: Position, role: str) -> None:
    """Raises ``Stopped``, naming the term, when a loss or a weight is no longer a number."""
    broken = [name for name, mean in means.items() if mean - mean != 0 and name != "loss"]
    if not broken and learner.is_finite():
        return
    what = f"the loss term {', '.join(broken)} is" if broken else "the weights are"
    raise Stopped(
        f"{what} not finite after epoch {position.epoch} of the {role}: training stopped, the last"
        f" good state is kept; try a lower rate than lr={learner.recipe.lr:g}, or clip=1"
    )


@contextmanager
def interruptible(world: World) -> Iterator[Callable[[], bool]]:
    """Inside the block Ctrl-C and SIGTERM only ask to stop, so that a state can be saved between two steps.

    A second one stops at once. Several processes would not agree on the step, and keep to their last state instead.
    """
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        asked = True
        for name, handler in before.items():
            signal.signal(name, handler)

    before = {}
    if world.size == 1:
        with suppress(ValueError):  # not the main thread: whoever runs it there decides about signals
            before = {name: signal.signal(name, ask) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def stream(recipe: Recipe, *keys: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """The random numbers of one place in the run: they depend on the seed and the place, not on what came before."""
    return torch.Generator(device).manual_seed(_seed(recipe.seed, *keys))


def _seed(*keys: int | str) -> int:
    return int.from_bytes(hashlib.blake2b(repr(keys).encode(), digest_size=7).digest())


def _options(recipe: Recipe) -> dict[str, object]:
    options: dict[str, object] = {} if recipe.width is None else {"width": recipe.width}
    return options | ({"preact": True} if recipe.preact else {})
