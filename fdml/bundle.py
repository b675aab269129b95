"""The bundle: the folder in which a model is deployed. Reading one needs the standard library only.

The format
----------
==============  ======================================================================================================
model.onnx      the network: input ``images``, float32 (batch, c, h, w), pixels in [0, 1]; output ``logits``, float32
                (batch, classes). Normalisation is inside. Its metadata holds the card's JSON at ``fdml.card``
card.json       the same card
evidence.json   what was measured of the exported network: an object with at least ``passed`` (true or false) and
                ``precision`` ("fp32", "fp16" or "int8")
bounds.onnx     there after `fdml export --bounds`: proves answers in linf. Inputs ``images``, as above, and ``eps``, a
                float32 scalar in pixel units; outputs ``label`` (batch), int64, the network's answer, and ``margin``
                (batch), float32: above 0 where every image in [0, 1] within eps is proved to be answered so by
                model.onnx on a CPU. Its metadata holds the SHA-256 of model.onnx at ``fdml.model``
teacher.onnx    there after `fdml export --teacher`: the clean teacher, in fp32, with the input, output and classes of
                model.onnx and its own card in its metadata; evidence.json then has an object ``teacher``
SHA256SUMS      one line a file, ``<sha256 in hex>  <name>``, sorted by name, for every other file of the folder:
                ``sha256sum --check SHA256SUMS`` checks it anywhere
==============  ======================================================================================================

Further files, such as engines, may lie beside these. There are no sub-folders and no links. The sums find a file that
was damaged, exchanged or forgotten on the way; they are no signature: who may write to the folder can write new ones.
"""

import hashlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fdml.card import CARD_LIMIT, Card, parse_object
from fdml.errors import InputError
from fdml.files import write_whole

MODEL = "model.onnx"
CARD = "card.json"
EVIDENCE = "evidence.json"
BOUNDS = "bounds.onnx"
TEACHER = "teacher.onnx"
SUMS = "SHA256SUMS"
Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")

EVIDENCE_LIMIT = 16 << 20
SUMS_LIMIT = 1 << 20

_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^\0\n\r]+)")
_CHUNK = 1 << 20


class BundleError(InputError):
    """A bundle, or a file that should be a model of one, that is not as it must be: one line that names it."""


@dataclass(frozen=True)
class Bundle:
    """A bundle whose sums were right when it was read: ``files`` maps the name of each file to its SHA-256."""

    folder: Path
    card: Card
    evidence: dict[str, Any]
    files: dict[str, str]

    @property
    def model(self) -> Path:
        """The path of the network."""
        return self.folder / MODEL

    @property
    def passed(self) -> bool:
        """Whether the exported network did what its evidence asks of it."""
        return self.evidence["passed"]


def read(folder: str | os.PathLike[str]) -> Bundle:
    """The bundle in ``folder``, after every file of it was found to be the one that its sums name.

    Files are hashed piece by piece, whatever their size; JSON is read within limits. Raises ``BundleError``, in one
    line that names the file: for a folder without sums, model, card or evidence; for a wrong sum; for a file that is
    listed and missing, or there and not listed; for a link, a sub-folder or a name that leads elsewhere; and for a card
    or evidence that is not valid.
    """
    folder = Path(folder)
    present = _names(folder)
    if SUMS not in present:
        raise BundleError(f"{folder}: has no {SUMS}, so it is no bundle: name the folder that `fdml export` wrote")
    listed = _sums(folder / SUMS)
    for name in (MODEL, CARD, EVIDENCE):
        if name not in listed:
            raise BundleError(f"{folder / SUMS}: does not list {name}, which every bundle has; export the model anew")
    for name in listed:
        if name not in present:
            raise BundleError(f"{folder / name}: is missing, though {SUMS} lists it; copy the whole bundle anew")
    for name in present:
        if name != SUMS and name not in listed:
            raise BundleError(f"{folder / name}: is not listed in {SUMS}; take it out of the bundle, or export anew")
    # The small files are read once, so that what is parsed is what was summed.
    small = {name: _content(folder / name, limit) for name, limit in ((CARD, CARD_LIMIT), (EVIDENCE, EVIDENCE_LIMIT))}
    for name, wanted in listed.items():
        found = hashlib.sha256(small[name]).hexdigest() if name in small else sha256(folder / name)
        if found != wanted:
            raise BundleError(
                f"{folder / name}: its SHA-256 is {found[:12]}…, but {SUMS} says {wanted[:12]}…: it was damaged or"
                " changed; copy the bundle anew"
            )
    return Bundle(folder, _card(folder / CARD, small[CARD]), _evidence(folder / EVIDENCE, small[EVIDENCE]), listed)


def write_sums(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Writes ``SHA256SUMS`` for all other files in ``folder`` and gives them back: the last step of making a bundle.

    Raises ``BundleError`` for a folder with sub-folders, links or names that a line of sums cannot hold.
    """
    folder = Path(folder)
    sums = {name: sha256(folder / name) for name in _names(folder) if name != SUMS}
    write_whole(folder / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    return sums


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hex, read piece by piece."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(_CHUNK):
                digest.update(piece)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()


def _names(folder: Path) -> list[str]:
    """The names of the regular files in ``folder``, sorted; there may be nothing else."""
    names = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_symlink():
                    raise BundleError(f"{folder / entry.name}: is a link; a bundle holds the files themselves")
                if not stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
                    raise BundleError(f"{folder / entry.name}: is no regular file; a bundle has no sub-folders")
                _check_name(str(folder), entry.name)
                names.append(entry.name)
    except FileNotFoundError:
        raise BundleError(f"{folder}: no such folder") from None
    except NotADirectoryError:
        raise BundleError(f"{folder}: is no folder, as a bundle is") from None
    except OSError as error:
        raise BundleError(f"{folder}: cannot be read: {error.strerror or error}") from None
    return sorted(names)


def _sums(path: Path) -> dict[str, str]:
    text = _text(path, _content(path, SUMS_LIMIT))
    listed: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise BundleError(f"{path}: line {number} is not `<sha256>  <name>`, as sha256sum writes it")
        digest, name = match.groups()
        _check_name(f"{path}: line {number}", name)
        if name in listed or name == SUMS:
            raise BundleError(f"{path}: line {number} lists {name!r}, which must not be listed {_again(name)}")
        listed[name] = digest
    return listed


def _again(name: str) -> str:
    return "at all" if name == SUMS else "twice"


def _check_name(where: str, name: str) -> None:
    """Nothing in a bundle points out of its folder, on any system."""
    if name in (".", "..") or any(c in name for c in "/\\:") or not name.isprintable():
        raise BundleError(f"{where}: the file name {name[:60]!r} is not allowed: a plain name without a path is")


def _content(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(content) > limit:
        raise BundleError(f"{path}: has more than the {limit} bytes that are allowed")
    return content


def _text(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise BundleError(f"{path}: is not UTF-8 text") from None


def _card(path: Path, content: bytes) -> Card:
    try:
        return Card.from_json(_text(path, content))
    except BundleError:
        raise
    except InputError as error:
        raise BundleError(f"{path}: {error}") from None


def _evidence(path: Path, content: bytes) -> dict[str, Any]:
    try:
        found = parse_object(_text(path, content), "the evidence")
    except BundleError:
        raise
    except InputError as error:
        raise BundleError(f"{path}: {error}") from None
    if not isinstance(found.get("passed"), bool):
        raise BundleError(f"{path}: the evidence must say `passed`, true or false")
    if found.get("precision") not in PRECISIONS:
        raise BundleError(f"{path}: the evidence must say `precision`, one of {', '.join(PRECISIONS)}")
    return found
