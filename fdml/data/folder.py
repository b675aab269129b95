"""A folder of images, one sub-folder a class."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from jaxtyping import Int64
from torch import Tensor

from fdml import pictures
from fdml.data.dataset import Files, Split
from fdml.data.splits import Parts
from fdml.errors import InputError

IN_MEMORY = 1 << 30
"""Decoded size in bytes up to which the images are kept in memory; larger folders are streamed from disk."""

_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


@final
@dataclass(frozen=True, eq=False)
class Paths:
    """Image files below ``root``: ``names`` are paths relative to it."""

    root: Path
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def take(self, index: Int64[Tensor, " k"]) -> "Paths":
        """The files at ``index``, in that order."""
        return Paths(self.root, tuple(self.names[i] for i in index.tolist()))

    def encoded(self, index: Sequence[int]) -> tuple[list[Path | bytes], list[str]]:
        """The paths at ``index``, and the same as text."""
        paths = [self.root / self.names[i] for i in index]
        return list(paths), [str(path) for path in paths]

    def listed(self) -> Iterator[tuple[str, int]]:
        """The relative path and the size in bytes of each file."""
        return ((name, (self.root / name).stat().st_size) for name in self.names)


def read(root: Path, size: int | None) -> Parts:
    """The images below ``root``: ``CLASS/…`` or ``train/CLASS/…`` with ``val/`` and ``test/`` beside it.

    Classes are the sorted names of the (training) folders; images may lie deeper. PNG, JPEG, WebP and BMP count, other
    and hidden files are passed over. Missing splits are cut from train; with ``val/`` but no ``test/`` (as ImageNet is
    packed), ``val/`` is the test split. The first image decides between grey and RGB and, without ``size``, the side in
    pixels.

    A symbolic link is refused, not skipped, when it leads out of ``root`` or to a folder.

    Raises ``InputError`` for that, for fewer than two classes, for a class without images, for a class that train does
    not have, and for an unreadable image (once it is read, in a folder that is streamed).
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    root = root.resolve()
    folders = _split_folders(root)
    classes = tuple(sorted(path.name for path in _subfolders(folders["train"])))
    if len(classes) < 2:
        raise InputError(f"{folders['train']}: needs a folder for each of at least two classes, has {len(classes)}")
    listed = {kind: _listed(root, folder, classes) for kind, folder in folders.items()}
    shape = pictures.shape_of(root / listed["train"][0][0], size)
    in_memory = sum(len(names) for names, _ in listed.values()) * shape[0] * shape[1] * shape[2] <= IN_MEMORY
    splits: dict[str, Split] = {}
    for kind, (names, labels) in listed.items():
        files = Files(Paths(root, tuple(names)), torch.tensor(labels), shape)
        splits[kind] = files.head(len(files)) if in_memory else files
    if "test" not in splits and "val" in splits:
        splits["test"] = splits.pop("val")
    return Parts(classes, splits["train"], splits.get("test"), splits.get("val"), shuffle=True)


def _split_folders(root: Path) -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for kind, names in _SPLITS.items():
        found = [root / name for name in names if (root / name).is_dir()]
        if len(found) > 1:
            raise InputError(f"{root}: has both {found[0].name}/ and {found[1].name}/; keep one")
        if found:
            folders[kind] = found[0]
    if "train" in folders:
        for folder in folders.values():
            _refuse_link(folder)
        return folders
    if folders and all(path in folders.values() for path in _subfolders(root)):
        raise InputError(f"{root}: has {next(iter(folders.values())).name}/ but no train/")
    return {"train": root}


def _subfolders(folder: Path) -> list[Path]:
    found = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    for path in found:
        _refuse_link(path)
    return found


def _refuse_link(folder: Path) -> None:
    if folder.is_symlink():
        raise InputError(f"{folder}: a linked folder is not followed; move the images there, or give that path itself")


def _listed(root: Path, folder: Path, classes: Sequence[str]) -> tuple[list[str], list[int]]:
    """Paths relative to ``root`` and labels, sorted by class and path."""
    names: list[str] = []
    labels: list[int] = []
    for path in _subfolders(folder):
        if path.name not in classes:
            raise InputError(f"{path}: train has no class {path.name!r}")
        found = sorted(_image_files(root, path))
        if not found:
            raise InputError(f"{path}: no images ({', '.join(pictures.SUFFIXES)}) in this class")
        names += found
        labels += [classes.index(path.name)] * len(found)
    if not names:
        raise InputError(f"{folder}: no images")
    return names, labels


def _image_files(root: Path, folder: Path) -> list[str]:
    found: list[str] = []
    for parent, subfolders, files in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in subfolders:
            _refuse_link(Path(parent, name))
        for name in files:
            if name.startswith(".") or not name.lower().endswith(pictures.SUFFIXES):
                continue
            path = Path(parent, name)
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise InputError(f"{path}: a symbolic link that leads out of {root}")
            if not path.is_file():  # a pipe would hang the reader
                raise InputError(f"{path}: not a file")
            found.append(path.relative_to(root).as_posix())
    return found
