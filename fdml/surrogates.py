"""The attacker's own models: what the gray-box and black-box protocols craft on, found, given or trained, and kept.

The literature does not agree on "gray-box", so its variants are named apart:

===================  =================================================================================================
gray-teacher         the clean teacher of the defended student
gray-clone           an undefended network of the same architecture and width, from another seed
gray-defended        the same defence (the recipe of the card), from another seed
transfer-A-standard  another architecture A, undefended
transfer-A-pgd-at    the same architecture A, adversarially trained (Madry et al. 2018) for the victim's threat
===================  =================================================================================================
"""

import hashlib
import json
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock, Timeout
from rich.console import Console

import fdml
from fdml.card import Card, read_card
from fdml.checkpoint import CUSTOM, load
from fdml.data import places
from fdml.data.dataset import Batch, DataSet
from fdml.errors import InputError, Stopped, unknown
from fdml.guidance import Guided, Teacher
from fdml.learner import Learner
from fdml.recipe import Recipe, from_dict
from fdml.recipes import recipe as named
from fdml.run import Run
from fdml.threat import Threat
from fdml.train import fit, new_model
from fdml.train_batch import draw, prepare
from fdml.world import World

SEED = 1_000_003
"""The attacker's seed: one for all victims, so that models which are compared face the same surrogates."""

GRAY = ("gray-teacher", "gray-clone", "gray-defended")

TIMED_IMAGES, TIMED_SECONDS = 16, 2.0
"""A step is timed on so few images, or on as many more, up to a batch, as these seconds allow."""

# What has no influence on a network that is trained without guidance, and without an attack. Brought to the defaults,
# so that victims which differ in nothing else share their surrogates.
_DEFAULT = Recipe(name="default").to_dict()
_UNGUIDED = ("base", "beta", "gamma", "answer", "temperature", "fd", "fd_layers", "ml", "margin", "positive",
             "negative", "attack_target", "one_pass",
             "guidance", "guidance_until", "awp", "awp_after", "start", "teacher_epochs", "teacher_lr", "teacher_width",
             "teacher_kind", "test_limit", "sigma", "noise_copies", "ibp", "ibp_warmup")  # fmt: skip
_UNATTACKED = ("norm", "eps", "attack_radius", "attack_steps", "attack_step", "attack_start", "val_steps")


@dataclass(frozen=True)
class Surrogate:
    """A model that a protocol crafts its images on: what it is called, how it is trained, and why it is there."""

    name: str
    protocol: Literal["gray", "black"]
    recipe: Recipe
    why: str


def wanted(card: Card, data_name: str, protocols: Collection[str]) -> list[Surrogate]:
    """The surrogates for attacks on the model of ``card`` under ``protocols``: ``gray``, ``black``, ``transfer``, or
    names of surrogates; protocols that need none are passed over.

    They follow the card's recipe; where it has none that can be used, ``fdml`` with the settings of ``data_name``. A
    victim whose recipe has no teacher gets no ``gray-teacher``, an undefended one no ``gray-defended``, and a network
    of the user's own code nothing gray. Raises ``InputError`` where the card's network is none that a recipe can name.
    """
    victim, source = _victim(card, data_name)
    seed = SEED if victim.seed != SEED else SEED + 1
    other = replace(victim, seed=seed)
    found = []
    if card.architecture != CUSTOM:
        if victim.needs_teacher and victim.teacher_kind == "clean":
            found.append(Surrogate("gray-teacher", "gray", _undefended(victim), "the clean teacher of this student"))
        clone = _undefended(replace(other, teacher_width=None))
        found.append(Surrogate("gray-clone", "gray", clone, f"the same network undefended, seed {seed}"))
        if victim.attack != "none":
            found.append(Surrogate("gray-defended", "gray", other, f"{source}, seed {seed}"))
    architecture, width = _other_architecture(card.architecture)
    other = replace(other, architecture=architecture, width=width, preact=False, teacher_width=None)
    size = architecture + (f" at width {width}" if width else "")
    for recipe, trained in ((_undefended(other), "undefended"), (_adversarial(other), "adversarially trained")):
        name = f"transfer-{architecture}-{recipe.name}"
        found.append(Surrogate(name, "black", recipe, f"another architecture, {size}, {trained}, seed {seed}"))
    return [surrogate for surrogate in found if _asked(surrogate.name, protocols)]


def surrogate_files(
    card: Card,
    file: Path,
    data: DataSet,
    protocols: Collection[str],
    *,
    given: Mapping[str, str | Path] | None = None,
    cache: Path | None = None,
    world: World,
    console: Console | None = None,
) -> dict[str, Path]:
    """The files of the surrogates that ``protocols`` need against the model in ``file``; what is missing is trained.

    ``given`` are model files by name: they replace the surrogate of that name, and a ``transfer-`` name of the user's
    own adds one. ``gray-teacher`` is ``teacher.safetensors`` beside ``file`` where there is one. The others lie under
    ``cache`` (by default ``$XDG_CACHE_HOME/fdml/surrogates``), one run folder a network, named by a hash of its recipe,
    the data and fdml's version: a finished one is never trained again, one that was stopped or killed goes on, and
    of several commands that need it one trains while the others wait. Images to test with are not looked at. Under
    ``torchrun`` every process must call this. ``console`` is told what is missing and about how long it will take;
    None is silent, and times nothing.

    Raises ``InputError`` for a name that no protocol here uses and for a file that does not fit the data, and
    ``Stopped`` as ``fdml.train.fit`` does.
    """
    cache = cache or places.cache("surrogates")
    talks = console is not None  # the time is measured by all processes, and told by the first
    if console is None or not world.leads:
        console = Console(quiet=True)
    needed = {surrogate.name: surrogate for surrogate in wanted(card, data.name, protocols)}
    paths = _given(given or {}, file, protocols)
    beside = Run(file.parent).model("teacher")
    if "gray-teacher" in needed and beside.exists():
        paths.setdefault("gray-teacher", beside)
    for name, path in paths.items():
        _check_fits(name, path, data)

    ours = {name: surrogate.recipe for name, surrogate in needed.items() if name not in paths}
    networks = [each for r in ours.values() for each in ((_undefended(r), r) if r.needs_teacher else (r,))]
    runs = {recipe: Run(cache / key(recipe, data)) for recipe in networks}
    missing = _missing(ours, _ready(runs, world))
    if missing:
        data = data.to(world.device)
        if talks:
            _announce(missing, runs, data, cache, world, console)
    for recipe, label in missing.items():
        guide = None
        if recipe.needs_teacher:
            teacher = load(runs[_undefended(recipe)].model("teacher"), device=world.device)
            guide = Teacher.of(teacher, recipe, data.train)
        with _alone(runs[recipe].path, label, world, console):
            _train(recipe, label, data, runs[recipe], world, guide, console)
    paths |= {name: runs[recipe].model(_role(recipe)) for name, recipe in ours.items()}
    return {name: paths[name] for name in dict.fromkeys([*needed, *paths])}


def key(recipe: Recipe, data: DataSet) -> str:
    """The name of a network's folder in the cache: a hash of everything that decides its weights."""
    content = [fdml.__version__, recipe.to_dict(), data.name, data.fingerprint]
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=12).hexdigest()


def estimate(recipe: Recipe, data: DataSet, world: World) -> float:
    """About how many seconds training by ``recipe`` takes on this machine: one step, timed, times the steps.

    Validation is counted by its passes; where a step is long, a part of a batch stands for the whole. ``data`` lies on
    the device of ``world``, all of whose processes must call this together.
    """
    inner = Threat(recipe.norm, recipe.attack_radius * recipe.eps)
    few = data.train.head(recipe.batch_size)
    index, images, y = few.all()
    generator = torch.Generator(world.device).manual_seed(recipe.seed)
    with torch.random.fork_rng(devices=[]):  # initialisation draws from the global generator, which is the caller's
        guide = None
        if recipe.needs_teacher:
            # Time does not depend on what the teacher has learnt.
            teacher = new_model(_undefended(recipe), data, None, None).to(world.device)
            guide = Teacher.of(teacher.eval(), recipe, few)
        peer = new_model(recipe.peer(), data, None, None).to(world.device) if recipe.has_peer else None
        guided = Guided(new_model(recipe, data, guide, None).to(world.device), guide, images[:2], peer)
    learner = Learner(recipe, guided.to(world.device, memory_format=torch.channels_last), world)  # pyright: ignore[reportCallIssue]

    def step(count: int) -> float:
        began = time.monotonic()
        drawn = draw(recipe, Batch(index[:count], images[:count], y[:count]), len(data.classes), inner, generator)
        batch = prepare(recipe, learner.attacked, guide, inner, drawn, (drawn.x, drawn.y))
        float(learner.step([batch], 0.5)["loss"])  # a number has to wait for the device
        return world.mean({"seconds": time.monotonic() - began})["seconds"]

    # The better of two: the first one of a size brings what is loaded or compiled for it.
    first = min(step(TIMED_IMAGES), step(TIMED_IMAGES))
    count = min(len(y), TIMED_IMAGES * max(1, round(TIMED_SECONDS / first)))
    passes = {"none": 1, "n-fgsm": 2, "pgd": recipe.attack_steps + 1}[recipe.attack]
    val_passes = 1 if recipe.attack == "none" else recipe.val_steps + 1
    seconds = min(step(count), step(count)) / count
    val = min(len(data.val), recipe.val_limit) * val_passes / passes
    return recipe.epochs * (len(data.train) / world.size + val) * seconds


def _victim(card: Card, data_name: str) -> tuple[Recipe, str]:
    """The recipe that the attacker takes the victim to be made by, with the network of the card; and what it is."""
    try:
        found, source = from_dict(card.recipe), "the recipe of the card"
    except InputError:
        found, source = named("fdml", data_name), "the recipe fdml, since the card has none that can be used"
        if card.threat is not None:
            found = replace(found, norm=card.threat["norm"], eps=card.threat["eps"])
    if card.architecture == CUSTOM:
        return found, source
    network = {"width": None, "preact": False} | card.options | {"architecture": card.architecture}
    return from_dict(found.to_dict() | network), source


def _undefended(recipe: Recipe) -> Recipe:
    """The recipe's teacher, which learns from clean images."""
    clean = replace(recipe, teacher_kind="clean").teacher()
    return replace(clean, **{name: _DEFAULT[name] for name in (*_UNGUIDED, *_UNATTACKED)})


def _adversarial(recipe: Recipe) -> Recipe:
    """Plain adversarial training at the recipe's threat, length and inner attack."""
    return replace(recipe, name="pgd-at", attack="pgd", **{name: _DEFAULT[name] for name in _UNGUIDED})


def _other_architecture(architecture: str) -> tuple[str, int | None]:
    """Another network than the victim's, and its width: small ones, since the user's CPU may have to train them.

    Images of 28 pixels: resnet18 at width 8 has 0.18 million weights and takes 2.4 times the time of `cnn` at its
    default width. Of 32 pixels: wrn-10-2 has 0.30 and resnet18 at width 16 0.70 million weights.
    """
    if architecture == "resnet18":
        return "wrn-10-2", None
    return ("resnet18", 16) if architecture.startswith("wrn") else ("resnet18", 8)


def _asked(name: str, protocols: Collection[str]) -> bool:
    family = name.partition("-")[0]
    return not {name, family, "black" if family == "transfer" else family}.isdisjoint(protocols)


def _given(given: Mapping[str, str | Path], file: Path, protocols: Collection[str]) -> dict[str, Path]:
    for name, path in given.items():
        if name not in GRAY and not (name.startswith("transfer-") and name != "transfer-"):
            raise unknown("surrogate", name, [*GRAY, "transfer-NAME"])
        if not _asked(name, protocols):
            raise InputError(f"the surrogate {name} is given, but no protocol asked for uses it: leave it out")
        if Path(path).exists() and file.exists() and file.samefile(path):
            raise InputError(f"surrogate {name}: {path} is the model that is attacked: give another one")
    return {name: Path(path) for name, path in given.items()}


def _check_fits(name: str, path: Path, data: DataSet) -> None:
    card = read_card(path)
    if (card.input, card.classes) != (data.input, data.classes):
        raise InputError(
            f"surrogate {name}: {path} is for images of {card.input} and {_brief(card.classes)}, but {data.name} has"
            f" {data.input} and {_brief(data.classes)}: give a model of the same data"
        )


def _brief(classes: tuple[str, ...]) -> str:
    return f"{len(classes)} classes ({', '.join(classes[:3])}{', …' if len(classes) > 3 else ''})"


def _missing(ours: Mapping[str, Recipe], ready: Collection[Recipe]) -> dict[Recipe, str]:
    """The networks to train, each once and its teacher before it, with the name of what it is for."""
    labels: dict[Recipe, str] = {}
    for name, recipe in ours.items():
        if recipe not in ready:
            if recipe.needs_teacher:
                labels.setdefault(_undefended(recipe), f"teacher of {name}")
            labels.setdefault(recipe, name)
    return {recipe: label for recipe, label in labels.items() if recipe not in ready}


def _ready(runs: Mapping[Recipe, Run], world: World) -> set[Recipe]:
    """The networks whose training is finished, as the first process sees it: all must agree on what is missing."""
    seen = {str(i): float(world.leads and run.model(_role(r)).exists()) for i, (r, run) in enumerate(runs.items())}
    return {recipe for recipe, share in zip(runs, world.mean(seen).values(), strict=True) if share > 0}


def _role(recipe: Recipe) -> str:
    """Undefended networks are trained as teachers, so that ``gray-teacher`` has the very weights of the victim's."""
    return "teacher" if recipe.attack == "none" else "student"


def _announce(
    missing: Mapping[Recipe, str],
    runs: Mapping[Recipe, Run],
    data: DataSet,
    cache: Path,
    world: World,
    console: Console,
) -> None:
    lines, total = [], 0.0
    for recipe, label in missing.items():
        left = 1 - sum(row["role"] == _role(recipe) for row in runs[recipe].rows()) / recipe.epochs
        seconds = estimate(recipe, data, world) * left
        total += seconds
        with torch.device("meta"):
            weights = sum(p.numel() for p in new_model(recipe, data, None, None).parameters())
        network = f"{recipe.architecture}, {weights:,} weights, {recipe.name}, epochs={recipe.epochs}"
        lines.append(f"  {label}: {network}{'' if left == 1 else ', begun before'}: {_words(seconds)}")
    text = "\n".join(
        [
            f"{len(missing)} surrogate model{'s are' if len(missing) > 1 else ' is'} missing and will be trained:"
            f" {_words(total)} in all, by the time of one step each",
            *lines,
            f"kept in {cache}; to give a model instead: --surrogate NAME=FILE",
        ]
    )
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _words(seconds: float) -> str:
    if seconds < 60:
        return f"about {max(1, round(seconds))} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


@contextmanager
def _alone(folder: Path, label: str, world: World, console: Console) -> Iterator[None]:
    """Inside the block no other command trains in ``folder``. The system drops the lock of a process that dies."""
    lock = FileLock(folder / "lock")
    seconds = 0
    try:
        while True:
            if world.leads:
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    with suppress(Timeout):
                        lock.acquire(timeout=seconds)
                except OSError as error:
                    raise InputError(f"cannot write {folder}: {error.strerror or error}") from error
            # Asked again and again: processes that wait for each other must not wait longer than torch allows.
            if world.mean({"held": float(lock.is_locked)})["held"] > 0:
                break
            if not seconds:
                console.print(f"another command is training {label}: waiting", markup=False, highlight=False)
            seconds = 10
        yield
    finally:
        lock.release()


def _train(
    recipe: Recipe, label: str, data: DataSet, run: Run, world: World, guide: Teacher | None, console: Console
) -> None:
    if run.model(_role(recipe)).exists():
        return  # another command trained it while this one waited
    console.print(f"training {label}", style="bold", markup=False, highlight=False)
    try:
        if world.leads:
            run.begin(recipe, {"name": data.name, "fingerprint": data.fingerprint}, resume=True, overwrite=False)
        world.barrier()
        fit(recipe, data, run, world, _role(recipe), guide, console)
    except InputError as error:
        raise InputError(f"surrogate {label} in {run.path}: {error}") from None
    except Stopped as stopped:
        raise Stopped(f"surrogate {label}: {stopped}", stopped.code) from None
