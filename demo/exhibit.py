"""What the demo shows: one or two models, the threat between them, pictures to try, and what evaluations said of them.

Nothing here imports torch: a page can be drawn from it while torch is still being loaded.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fdml.card import Card, read_card
from fdml.errors import InputError
from fdml.run import Run

SHIPPED = Path(__file__).parent / "shipped"
TITLES = {"fashion-mnist": "Clothes", "digits": "Handwritten digits"}
EACH = 10
"""Pictures of each class that are there to be tried."""

MAX_REPORT = 64 << 20


@dataclass(frozen=True)
class Side:
    """One model: ``key`` is ``clean`` or ``defended``, ``name`` its name on the page, ``about`` how it was trained."""

    key: str
    name: str
    about: str
    file: Path
    card: Card

    @cached_property
    def sha256(self) -> str:
        """The digest of the file."""
        return hashlib.sha256(self.file.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Exhibit:
    """Models to compare, all of the same input and classes. ``images`` (n, c, h, w) are uint8, ``labels`` (n,) their
    classes; both may be empty. ``reports`` are what ``fdml evaluate`` wrote of them."""

    name: str
    title: str
    sides: tuple[Side, ...]
    images: np.ndarray
    labels: np.ndarray
    reports: tuple[Path, ...] = ()

    @property
    def card(self) -> Card:
        """The card of the defended model, or of the only one."""
        return self.sides[-1].card

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the answers."""
        return self.card.classes

    @property
    def input(self) -> tuple[int, int, int]:
        """(c, h, w) of every picture."""
        return self.card.input

    @property
    def norm(self) -> str:
        """The norm of the threat: linf where the models know of none."""
        return str(self.card.threat["norm"]) if self.card.threat else "linf"

    @property
    def eps(self) -> float:
        """The size of the threat, in pixel units of its norm: 8/255 where the models know of none."""
        return float(self.card.threat["eps"]) if self.card.threat else 8 / 255

    @property
    def sigma(self) -> float:
        """The noise that certificates begin with: that of the training, else as much a pixel as an attack may change
        it (linf), or half of what it may change in all (l2, l1)."""
        trained = self.card.recipe.get("sigma")
        if isinstance(trained, int | float) and trained > 0:
            return float(trained)
        return self.eps if self.norm == "linf" else self.eps / 2

    def side(self, key: str) -> Side:
        """The model of that key; raises ``InputError`` where there is none."""
        for side in self.sides:
            if side.key == key:
                return side
        raise InputError(f"no model {key!r} here: {' or '.join(repr(side.key) for side in self.sides)}")

    def class_index(self, name: str) -> int:
        """The index of a class by its name; raises ``InputError`` for a name that is none."""
        if name not in self.classes:
            raise InputError(f"unknown class {name!r}: one of {', '.join(self.classes)}")
        return self.classes.index(name)

    @cached_property
    def scores(self) -> list[dict[str, Any]]:
        """What evaluations found, a row a model and report: the leaderboard."""
        return [row for report in self.reports for row in _scores(report, self.sides)]


def shipped() -> list[Exhibit]:
    """The pairs that come with the package."""
    return [_shipped(SHIPPED / name, title) for name, title in TITLES.items()]


def _shipped(folder: Path, title: str) -> Exhibit:
    with np.load(folder / "images.npz", allow_pickle=False) as file:
        images, labels = file["x"], file["y"]
    sides = (
        _side("clean", folder / "teacher.safetensors"),
        _side("defended", folder / "student.safetensors"),
    )
    return Exhibit(folder.name, title, sides, images, labels, (folder / "report.json",))


def opened(
    paths: Sequence[Path],
    reports: Sequence[Path] = (),
    *,
    data: str | None = None,
    data_dir: Path | None = None,
) -> list[Exhibit]:
    """The exhibits of run folders, one each, and of one or two model files, the clean one first, which make one.

    ``reports`` are folders that ``fdml evaluate`` wrote, or ``report.json`` files. ``data`` names the data set that
    pictures are taken from, by default that of the card; where its files are not at hand there are none.

    Raises ``InputError`` for what is neither a run folder nor a model file, and for models that do not fit each other.
    """
    found = [path / "report.json" if path.is_dir() else path for path in reports]
    for report in found:
        _report(report)  # says at once what cannot be read
    files = [path for path in paths if not path.is_dir()]
    exhibits = []
    for path in paths:
        if path.is_dir():
            run = Run(path)
            if not run.model("student").exists():
                raise InputError(
                    f"{path} is no run folder: it holds no student.safetensors; give what fdml train wrote"
                )
            roles = ("teacher", "student") if run.model("teacher").exists() else ("student",)
            exhibits.append(_opened(path.resolve().name, [run.model(role) for role in roles], found, data, data_dir))
    if len(files) > 2:
        raise InputError(f"{len(files)} model files: give one, or two to compare, the clean one first; or run folders")
    if files:
        exhibits.append(_opened(" and ".join(file.stem for file in files), files, found, data, data_dir))
    names = [exhibit.name for exhibit in exhibits]
    if len(set(names)) < len(names):
        raise InputError(f"two run folders are called {max(names, key=names.count)!r}: rename one to tell them apart")
    return exhibits


def _opened(
    title: str, files: Sequence[Path], reports: Sequence[Path], data: str | None, data_dir: Path | None
) -> Exhibit:
    for file in files:
        if not file.suffix and not file.exists():
            raise InputError(f"{file} does not exist: give a .safetensors file or a run folder")
        if file.suffix != ".safetensors":
            raise InputError(f"{file} gives no gradients to attack with: give a .safetensors file or a run folder")
    keys = ("clean", "defended") if len(files) == 2 else ("defended",)
    sides = tuple(_side(key, file) for key, file in zip(keys, files, strict=True))
    first, last = sides[0].card, sides[-1].card
    if (first.input, first.classes) != (last.input, last.classes):
        raise InputError(f"{files[0]} and {files[-1]} differ in input or classes, so they cannot be shown side by side")
    images, labels = _pictures(last, data, data_dir)
    return Exhibit(title, title, sides, images, labels, tuple(reports))


def _side(key: str, file: Path) -> Side:
    card = read_card(file)
    recipe = str(card.recipe.get("name") or "an unknown recipe")
    clean = key == "clean" and card.threat is None
    about = "trained on clean images" if clean else f"trained by {recipe} against {_threat(card)}"
    return Side(key, "Clean model" if key == "clean" else "Defended model", about, file, card)


def _threat(card: Card) -> str:
    return f"{card.threat['norm']} {float(card.threat['eps']):.3g}" if card.threat else "no threat"


def _pictures(card: Card, data: str | None, data_dir: Path | None) -> tuple[np.ndarray, np.ndarray]:
    from fdml import data as sets

    name = data or str(card.data["name"])
    size = card.input[1] if name.startswith(("folder:", "hf:")) else None
    try:
        found = sets.load(name, data_dir=data_dir, size=size, download=False)
    except InputError:
        if data is not None:
            raise
        return np.empty((0, *card.input), np.uint8), np.empty(0, np.int64)
    test = found.test
    if test.shape != card.input:
        raise InputError(f"pictures of {name} are {test.shape}, the model takes {card.input}")
    if len(found.classes) != len(card.classes):
        raise InputError(f"pictures of {name} are of {len(found.classes)} classes, the model knows {len(card.classes)}")
    part = test.take(chosen(test.labels)).head(EACH * len(card.classes))
    return part.images.numpy(), part.labels.numpy()


def chosen(labels: Any) -> Any:
    """The places of the first ``EACH`` images of each class, in their order: nothing is picked by how it fares."""
    seen: dict[int, int] = {}
    places = []
    for place, label in enumerate(labels.tolist()):
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= EACH:
            places.append(place)
    return labels.new_tensor(places)


# What evaluations said ------------------------------------------------------------------------------------------------

KEPT = ("pgd100x5", "autoattack", "square")
"""The attacks that the leaderboard has a column for, beside the worst case."""


def _report(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        found = None if size > MAX_REPORT else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not JSON"
        raise InputError(f"{path} cannot be read ({reason}): give a folder that fdml evaluate wrote") from None
    if size > MAX_REPORT:
        raise InputError(f"{path} is larger than {MAX_REPORT >> 20} MiB, which no report is")
    if (
        not isinstance(found, dict)
        or found.get("format") != 1
        or not isinstance(found.get("models"), list)
        or not all(isinstance(model, dict) for model in found["models"])
    ):
        raise _no_report(path)
    return found


def _scores(path: Path, sides: Iterable[Side]) -> list[dict[str, Any]]:
    """The rows of a report that are about these models, known by the digests of their files."""
    report = _report(path)
    found = [(side, model) for side in sides for model in report["models"] if model.get("sha256") == side.sha256]
    try:
        return [_row(report, model, side) for side, model in found]
    except (KeyError, TypeError, AttributeError):
        raise _no_report(path) from None


def _row(report: dict[str, Any], model: dict[str, Any], side: Side) -> dict[str, Any]:
    attacks = {attack["name"]: attack["accuracy"] for attack in model["attacks"] if attack["source"] is None}
    return {
        "model": side.name,
        "recipe": str(side.card.recipe.get("name", "")),
        "data": report["data"]["name"],
        "n": report["data"]["n"],
        "norm": report["threat"]["norm"],
        "eps": report["threat"]["eps"],
        "clean": model["clean"]["accuracy"],
        **{name: attacks.get(name) for name in KEPT},
        "worst": model["worst"]["accuracy"],
        "flags": [flag["name"] for flag in model["flags"]],
    }


def _no_report(path: Path) -> InputError:
    return InputError(f"{path} is no report of this version of fdml evaluate")
