"""The tables of the paper's claim: rows are trained, attacked from outside and inside, and collected, seed by seed.

A row is a recipe with perhaps other keys: ``trades`` or ``trades:epochs=2,augment=flip,crop``. The rows of a seed learn
from one clean teacher, where they have one at all and no row asks for another. Whatever was finished is not done again,
and what was stopped goes on.
"""

import json
import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from torch import Tensor

import fdml
from fdml.attacks import ATTACKS, Attack
from fdml.checkpoint import load as load_model
from fdml.data import load
from fdml.data.dataset import DataSet
from fdml.data.extra import extend
from fdml.errors import InputError, Stopped, unknown
from fdml.evaluate import evaluate
from fdml.evaluate.suites import CASCADES
from fdml.files import write_whole
from fdml.models import Frozen
from fdml.outcomes import SPLITS, Outcome, collect
from fdml.randomness import Generator
from fdml.recipe import Recipe, from_dict, override
from fdml.recipes import recipe as named
from fdml.run import Run
from fdml.threat import Threat
from fdml.train import INTERRUPTED, fit, teach
from fdml.world import World

RIVALS = ("pgd-at", "trades", "mart", "alp", "tla", "agkd-bml", "lbgat", "hat", "rslad", "fast-at")
METHODS = (*RIVALS, "fd", "ml", "fdml")
"""The rivals, then the method's two halves and the method."""

ABLATIONS = (
    "fdml:positive=student",
    "fdml:negative=adversarial",
    "fdml:attack_target=confused",
    "fdml:base=trades,one_pass=true",
    "fdml:base=mart,beta=5,one_pass=true",
    "pgd-at:start=teacher",
)
"""The method with the student's own clean features as positives, the confused class's adversarial images as negatives,
the targeted inner attack of AGKD-BML, and other terms for the label; and what is left of it without its two terms, the
start from the teacher's weights."""

_GRAY = ("mi-fgsm", "di-ti", "pgd50-transfer")


@dataclass(frozen=True, kw_only=True)
class Table:
    """What is compared: a data set (``size`` pixels, where it is a folder), rows, ``keys`` that every row has, seeds 0,
    1, …, and the images that judge: ``limit`` of a ``split``, ``test`` or, to choose by, ``val``.

    ``white`` and ``black`` are attacks on the model itself, with and without its gradient; the gray ones are crafted on
    the seed's clean teacher, an undefended network of the table's architecture. ``ours`` is the row that the others are
    held against.
    """

    data: str
    about: str = ""
    size: int | None = None
    rows: tuple[str, ...] = METHODS
    keys: tuple[str, ...] = ()
    seeds: int = 3
    split: str = "test"
    limit: int = 1000
    white: tuple[str, ...] = ("fgsm", "pgd20", "apgd-ce", "apgd-t3")
    gray: tuple[str, ...] = _GRAY
    black: tuple[str, ...] = ("square1000",)
    ours: str = "fdml"


_PHOTOGRAPHS = Table(
    data="cifar10",
    rows=(*METHODS, *ABLATIONS),
    keys=(
        "architecture=resnet18", "augment=flip,crop", "precision=bf16", "compile=true", "epochs=30",
        "teacher_epochs=30",
    ),
    limit=10_000,
    white=("pgd20", *CASCADES["autoattack"][1]),
    black=(),
)  # fmt: skip
"""What the tables of a GPU share; AutoAttack counts as one white attack, its black-box part included."""

_LONG = ("epochs=120", "awp=0.005", "awp_after=0.1", "augment=flip,cropshift,colorshape,erase")

_FASHION = Table(data="fashion-mnist", keys=("width=8", "epochs=4", "teacher_epochs=3"))

_FASHION_TIME = (
    "pgd-at:epochs=6", "trades", "mart", "alp", "tla", "agkd-bml:epochs=2", "lbgat", "hat:epochs=3", "rslad",
    "fast-at:epochs=8", "fdml:epochs=6",
)  # fmt: skip
"""As many epochs as come nearest to the time of six of PGD-AT, by the cost of a step (docs/results.md): four of a
method that looks at clean and adversarial images. What FDML's halves cost is what FDML costs."""

_MNIST = Table(data="mnist", keys=("width=8", "epochs=2", "teacher_epochs=2"), limit=500)

_MNIST_TIME = (
    "pgd-at:epochs=3", "trades", "mart", "alp", "tla", "agkd-bml:epochs=1", "lbgat", "hat", "rslad",
    "fast-at:epochs=8", "fdml:epochs=3",
)  # fmt: skip
"""The same for three of PGD-AT, whose attack has more steps here."""

TABLES: dict[str, Table] = {
    "fashion-mnist": _FASHION,
    "fashion-mnist-time": replace(
        _FASHION, about="all in the time of six epochs of PGD-AT", rows=_FASHION_TIME, ours=_FASHION_TIME[-1]
    ),
    "mnist": _MNIST,
    "mnist-time": replace(
        _MNIST, about="all in the time of three epochs of PGD-AT", rows=_MNIST_TIME, ours=_MNIST_TIME[-1]
    ),
    "digits": Table(data="digits", limit=360),
    "cifar10-linf": _PHOTOGRAPHS,
    "cifar10-linf-long": replace(_PHOTOGRAPHS, about="long, with AWP", rows=METHODS, keys=(*_PHOTOGRAPHS.keys, *_LONG)),
    "cifar10-l2": replace(
        _PHOTOGRAPHS,
        rows=tuple(name for name in METHODS if name != "fast-at"),  # whose noise is defined in linf
        keys=(*_PHOTOGRAPHS.keys, "norm=l2", "eps=0.5"),
    ),
    "cifar100-linf": replace(_PHOTOGRAPHS, rows=METHODS, data="cifar100"),
    "svhn-linf": replace(_PHOTOGRAPHS, rows=METHODS, data="svhn", keys=(*_PHOTOGRAPHS.keys, "augment=crop")),
    "tiny-imagenet-linf": replace(_PHOTOGRAPHS, rows=METHODS, data="folder:tiny-imagenet-200", size=64),
}
"""The tables by name. Those of photographs are for a GPU, with ``resnet18``; ``architecture=wrn-28-10`` and
``wrn-34-10`` are keys that they take."""


def smoke(table: Table) -> Table:
    """The same table at toy size, for minutes on a CPU: one seed, one epoch of few images, few steps of each attack."""
    keys = ("epochs=1", "teacher_epochs=1", "batch_size=64", "width=8", "attack_steps=2", "val_limit=40", "val_steps=1")
    plain = ("precision=fp32", "compile=false", "test_limit=20")
    return replace(
        table, keys=(*table.keys, *keys, *plain), seeds=1, limit=20, white=("fgsm", "pgd20"), black=("noise",)
    )


SMOKE_IMAGES = 256
"""Training images of a smoke run."""


def reproduce(
    name: str,
    out: Path,
    *,
    rows: Sequence[str] = (),
    seeds: int | None = None,
    keys: Sequence[str] = (),
    small: bool = False,
    split: str | None = None,
    limit: int | None = None,
    source: str | None = None,
    data_dir: Path | None = None,
    extra: str | None = None,
    device: str | None = None,
    console: Console | None = None,
) -> list[Outcome]:
    """Trains and attacks what is missing of the table ``name``, and collects it in ``out`` after each run.

    ``rows``, ``seeds``, ``split`` and ``limit`` replace the table's own, ``source`` its data set, ``keys`` are added;
    ``small`` is ``smoke``. By ``split="val"``, which is for choosing, those validation images judge that chose no
    epoch. ``extra`` are further training images (``fdml.data.extra``). What each run was made with stands in its
    ``result.json``; a run made otherwise is refused, not mixed in.

    Commands that are started side by side on one folder, one a GPU say, share the runs: each takes what no other is at.

    Raises ``InputError`` for an unknown table or row, and for a folder that holds runs of another table; ``Stopped`` as
    ``fdml.train.fit`` does, with the row that it was at.
    """
    if name not in TABLES:
        raise unknown("table", name, TABLES)
    table = smoke(TABLES[name]) if small else TABLES[name]
    table = replace(table, rows=tuple(rows) or table.rows, seeds=seeds or table.seeds, keys=(*table.keys, *keys))
    table = replace(table, data=source or table.data, split=split or table.split, limit=limit or table.limit)
    if table.split not in SPLITS:
        raise unknown("split", table.split, SPLITS)
    console = console or Console(quiet=True)
    world = World.join(device)
    if world.size > 1:
        raise InputError("a table is run by one process: start it without torchrun")
    chosen = {row: _recipe(row, table) for row in table.rows}
    for recipe in chosen.values():
        Threat(recipe.norm, recipe.eps)  # what is wrong is refused before anything is trained
    val_fraction = next(iter(chosen.values())).val_fraction
    data = load(table.data, data_dir=data_dir, size=table.size, val_fraction=val_fraction)
    if small:
        data = replace(data, train=data.train.head(SMOKE_IMAGES))
    if extra is not None:
        data = extend(data, extra)
    for recipe in chosen.values():
        _judges(table, recipe, data)
    runs = {(row, seed): replace(recipe, seed=seed) for seed in range(table.seeds) for row, recipe in chosen.items()}
    found: dict[tuple[str, int], Outcome] = {}
    for patience in (0, -1):  # first what no other command is at, then what others are at, once they are done
        for (row, seed), recipe in runs.items():
            if (row, seed) in found:
                continue
            try:
                with _alone(_folder(out, row, seed), patience):
                    outcome = _one(row, recipe, table, data, out, world, console)
            except Timeout:
                continue
            except Stopped as stopped:
                why = "give the same command again" if stopped.code == INTERRUPTED else str(stopped)
                raise Stopped(f"stopped at {row}, seed {seed}; what is done is kept: {why}", stopped.code) from None
            found[row, seed] = outcome
            console.print(
                f"{row}, seed {seed}: clean {100 * outcome.accuracies['clean']:.1f}, worst {100 * outcome.worst:.1f}"
            )
            done = [
                other for key, each in runs.items() if (other := found.get(key) or _kept(*key, each, table, data, out))
            ]
            collect(done, data.name, out, table.ours)
    console.print(f"table: {out}/table.md, results.json, table.png", markup=False, highlight=False, soft_wrap=True)
    return [found[key] for key in runs]


def _folder(out: Path, row: str, seed: int) -> Path:
    name = re.sub(r"[^\w.=]", "-", row)
    return out / f"{name}-{seed}"


def _alone(folder: Path, patience: float = -1) -> FileLock:
    """Held while a run is made; ``patience`` in seconds, -1 for as long as it takes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.with_name(folder.name + ".lock"), timeout=patience)


def _kept(row: str, seed: int, recipe: Recipe, table: Table, data: DataSet, out: Path) -> Outcome | None:
    """What a run gave, where it is finished; raises ``InputError`` where it is one of other settings."""
    result = _folder(out, row, seed) / "result.json"
    if not result.exists():
        return None
    kept = json.loads(result.read_text(encoding="utf-8"))
    # A key that came later than the run has its default, which is what the run had.
    kept["recipe"] = from_dict(kept["recipe"]).to_dict()
    found, judges = Outcome(**kept), _judges(table, recipe, data)
    if (found.row, found.recipe, found.split, found.n) != (row, recipe.to_dict(), table.split, len(judges)):
        raise InputError(f"{result.parent} holds a run of other settings: name another folder with --out")
    return found


def _judges(table: Table, recipe: Recipe, data: DataSet) -> range:
    """The places of the images that judge: the first of the test split, or of the validation images those that follow
    the ones that choose the epoch."""
    if table.split == "test":
        return range(min(table.limit, len(data.test)))
    if recipe.val_limit >= len(data.val):
        raise InputError(f"all {len(data.val):,} validation images choose the epoch: set val_limit below that")
    return range(recipe.val_limit, min(recipe.val_limit + table.limit, len(data.val)))


def _recipe(row: str, table: Table) -> Recipe:
    method, _, text = row.partition(":")
    changes = re.split(r",(?=[^,]*=)", text) if text else []  # a comma may stand in a value: augment=flip,crop
    recipe = override(named(method, table.data), [*table.keys, *changes])
    if recipe.teacher_kind == "robust":
        # A table's teacher_epochs are the clean teacher's; a robust one has its student's, where the row names none.
        recipe = override(replace(recipe, teacher_epochs=recipe.epochs), changes)
    return recipe


def _one(row: str, recipe: Recipe, table: Table, data: DataSet, out: Path, world: World, console: Console) -> Outcome:
    kept = _kept(row, recipe.seed, recipe, table, data, out)
    if kept is not None:
        return kept
    clean = _clean(table, recipe.seed)
    with _alone(out / f"teacher-{recipe.seed}"):
        teacher = _teacher(clean, data, out, world, console)
    folder = _folder(out, row, recipe.seed)
    own = recipe.teacher_kind == "robust" or any(getattr(recipe, key) != getattr(clean, key) for key in _TEACHER)
    data, run = data.to(world.device), Run(folder)
    run.begin(recipe, {"name": data.name, "fingerprint": data.fingerprint}, resume=True, overwrite=False)
    guide = teach(recipe, data, run, world, None if own else teacher, console) if recipe.needs_teacher else None
    whole = not run.state("student").exists()
    clock = time.process_time if world.device.type == "cpu" else time.monotonic
    began = clock()
    fit(recipe, data, run, world, "student", guide, console)
    seconds = round(clock() - began, 1) if whole else None
    outcome = judge(row, recipe, table, data, run.model("student"), teacher, seconds, world)
    write_whole(folder / "result.json", json.dumps(asdict(outcome), indent=1) + "\n")
    return outcome


_TEACHER = (
    "architecture", "width", "preact", "batch_size", "augment", "precision", "compile", "teacher_epochs", "teacher_lr",
    "teacher_width", "val_fraction", "val_limit", "weight_decay",
)  # fmt: skip
"""A row that differs from its table in one of these learns from a clean teacher of its own. Other keys that a teacher
is trained by, label smoothing say, leave the table's, so that such a row shows what they do to the student."""


def _clean(table: Table, seed: int) -> Recipe:
    """The recipe whose teacher the rows of a seed share."""
    return replace(_recipe("fdml", table), seed=seed)


def _teacher(clean: Recipe, data: DataSet, out: Path, world: World, console: Console) -> Path:
    """The seed's clean teacher, trained once for all rows: what they learn from, and what gray attacks are made on.

    Raises ``InputError`` where the folder holds another one.
    """
    run, recipe = Run(out / f"teacher-{clean.seed}"), clean.teacher()
    run.begin(recipe, {"name": data.name, "fingerprint": data.fingerprint}, resume=True, overwrite=False)
    if not run.model("teacher").exists():
        fit(recipe, data.to(world.device), run, world, "teacher", None, console)
    return run.model("teacher")


def judge(
    row: str,
    recipe: Recipe,
    table: Table,
    data: DataSet,
    student: Path,
    teacher: Path,
    seconds: float | None,
    world: World,
) -> Outcome:
    """Attacks one student on the images that judge: white-box, gray-box from the teacher, and by queries."""
    places = _judges(table, recipe, data)
    split = (data.test if table.split == "test" else data.val).to(world.device)
    _, x, y = split.take(torch.tensor(places)).head(len(places)).all()
    x = x.contiguous(memory_format=torch.channels_last)
    model, threat = Frozen(load_model(student, device=world.device)), Threat(recipe.norm, recipe.eps)
    source = Frozen(load_model(teacher, device=world.device))
    attacks: dict[str, Any] = {name: ATTACKS[name] for name in (*table.white, *table.black)}
    attacks |= {f"gray {name}": partial(_crafted, ATTACKS[name], source) for name in table.gray}
    found = evaluate(model, x, y, threat, attacks, seed=recipe.seed)
    shares = found.shares()

    def together(names: Sequence[str]) -> float | None:
        if not names:
            return None
        every = torch.stack([found.standing[name] for name in names])
        return float(every.all(0).double().mean())

    return Outcome(
        row,
        recipe.seed,
        len(y),
        str(threat),
        {name: share for name, share in shares.items() if name != "worst"},
        together(table.white) or 0.0,
        together([f"gray {name}" for name in table.gray]),
        together(table.black),
        shares["worst"],
        seconds,
        recipe.to_dict(),
        _hardware(world),
        {"fdml": fdml.__version__, "torch": torch.__version__},
        datetime.now(UTC).date().isoformat(),
        table.split,
    )


def _crafted(
    attack: Attack, source: Frozen, _model: object, x: Tensor, y: Tensor, threat: Threat, *, generator: Generator = None
) -> Tensor:
    """What an attack makes against another model, for the one that is judged to be tried with."""
    return attack(source, x, y, threat, generator=generator)


def _hardware(world: World) -> str:
    if world.device.type == "cuda":
        return torch.cuda.get_device_name(world.device)
    return f"{platform.machine()}, {os.cpu_count()} processors, {torch.get_num_threads()} threads"


def described() -> Mapping[str, str]:
    """The tables in a few words."""
    return {
        name: f"{table.data}, {len(table.rows)} rows, {table.seeds} seeds, {table.limit:,} {SPLITS[table.split]} images"
        + (f"; {table.about}" if table.about else "")
        for name, table in TABLES.items()
    }
