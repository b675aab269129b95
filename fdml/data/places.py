"""Where the files of the well-known data sets lie on this machine, and the cache folder they are downloaded to."""

import os
from collections.abc import Sequence
from pathlib import Path

from fdml.data.download import Remote, fetch
from fdml.errors import InputError

_SUBFOLDERS = {
    "mnist": ("MNIST/raw",),
    "fashion-mnist": ("FashionMNIST/raw",),
    "cifar10": ("cifar-10-batches-bin", "cifar-10-batches-py"),
    "cifar100": ("cifar-100-binary", "cifar-100-python"),
    "svhn": (),
}
_SYSTEM = {"fashion-mnist": (Path("/usr/share/datasets/fashion-mnist"),)}  # Debian's package dataset-fashion-mnist


def cache(name: str) -> Path:
    """The folder that ``name`` is downloaded to: ``$XDG_CACHE_HOME/fdml/NAME``, by default under ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "fdml" / name


def places(name: str, data_dir: Path | None) -> list[Path]:
    """The folders that are looked in, in order: ``data_dir``, ``$FDML_DATA``, the system's, the cache."""
    roots = [data_dir] if data_dir is not None else []
    if from_environment := os.environ.get("FDML_DATA"):
        roots.append(Path(from_environment).expanduser())
    return [place for root in roots for place in (root, root / name)] + [*_SYSTEM.get(name, ()), cache(name)]


def find(
    name: str,
    forms: Sequence[Sequence[str]],
    remotes: Sequence[Remote],
    data_dir: Path | None,
    *,
    download: bool,
) -> tuple[Path, ...]:
    """The files of data set ``name``, downloaded if they are nowhere.

    ``forms`` are the sets of file names that will do, the first being what ``remotes`` brings; a file may also be there
    under its name with ``.gz`` added. All files of a form must be in one folder.

    Raises ``InputError`` that names every place looked in and, after a failed download, the address.
    """
    looked = places(name, data_dir)
    partial = ""
    for place in looked:
        for folder in (place, *(place / sub for sub in _SUBFOLDERS[name])):
            for form in forms:
                found = [_present(folder, file) for file in form]
                if None not in found:
                    return tuple(path for path in found if path is not None)
                if any(found) and folder != cache(name):
                    partial = partial or f" ({folder} has no {form[found.index(None)]})"
    where = f"{name} is in none of {', '.join(map(str, looked))}{partial}"
    if not download:
        raise InputError(f"{where}; allow the download, or put {forms[0][0]} and its companions there")
    try:
        for remote in remotes:
            fetch(remote, cache(name))
    except InputError as error:
        raise InputError(f"{where}, and {error}") from error
    return find(name, forms, remotes, data_dir, download=False)


def _present(folder: Path, file: str) -> Path | None:
    for path in (folder / file, folder / f"{file}.gz"):
        if path.is_file():
            return path
    return None
