"""Data sets by name. Importing this package imports no torch: ``load`` does, when it is called."""

from pathlib import Path
from typing import TYPE_CHECKING

from fdml.errors import InputError, unknown

if TYPE_CHECKING:
    from fdml.data.dataset import DataSet
    from fdml.data.splits import Parts

CATALOGUE: dict[str, str] = {
    "digits": "1,797 handwritten digits, 8x8 grey, 10 classes; embedded in scikit-learn, no network",
    "mnist": "70,000 handwritten digits, 28x28 grey, 10 classes; 12 MB download",
    "fashion-mnist": "70,000 pictures of clothes, 28x28 grey, 10 classes; 31 MB download",
    "cifar10": "60,000 photographs, 32x32 RGB, 10 classes; 170 MB download",
    "cifar100": "60,000 photographs, 32x32 RGB, 100 classes; 169 MB download",
    "svhn": "99,289 house-number digits, 32x32 RGB, 10 classes; 246 MB download",
    "folder:PATH": "your images: one sub-folder a class, with or without train/, val/ and test/ above them",
    "hf:NAME": "a data set of the Hugging Face hub (or hf:NAME:CONFIG), or a local one of its library",
    "npz:FILE": "numpy arrays x_train, y_train, x_test, y_test (or x, y) in one .npz file",
}
"""Name (or form of a name) to one line of description."""


def load(
    name: str,
    *,
    data_dir: str | Path | None = None,
    size: int | None = None,
    val_fraction: float = 0.1,
    download: bool = True,
) -> "DataSet":
    """The data set called ``name``, split into train, val and test.

    ``name`` is one of ``CATALOGUE``. ``data_dir`` is looked in first for the files of the named sets; without files
    anywhere they are downloaded to the cache folder, unless ``download`` is false. ``size`` is the side in pixels that
    the images of ``folder:`` and ``hf:`` are brought to. Without a validation split of its own, ``val_fraction`` of the
    training images is set aside for validation, by a fixed seed and in the proportions of the classes; the test split
    is never touched. The same arguments give the same splits in the same order on every machine.

    Raises ``InputError`` for an unknown name, for files that are missing or damaged, and for a fraction outside (0, 1).
    """
    if not 0 < val_fraction < 1:
        raise InputError(f"val_fraction must lie between 0 and 1, got {val_fraction:g}")
    if size is not None and not 1 <= size <= 1024:
        raise InputError(f"size must be from 1 to 1024 pixels, got {size}")
    from fdml.data.splits import assemble

    parts = _read(name, Path(data_dir).expanduser() if data_dir is not None else None, size, download)
    height, width = parts.train.shape[1:]
    if size is not None and (height, width) != (size, size):
        raise InputError(f"{name} is {height}x{width}: size {size} applies to folder: and hf: data sets only")
    return assemble(name, parts, val_fraction)


def _read(name: str, data_dir: Path | None, size: int | None, download: bool) -> "Parts":
    form, colon, rest = name.partition(":")
    if colon and rest and form in ("folder", "hf", "npz"):
        if form == "folder":
            from fdml.data import folder

            return folder.read(Path(rest).expanduser(), size)
        if form == "hf":
            from fdml.data import hub

            return hub.read(rest, size, download=download)
        from fdml.data import npz

        return npz.read(Path(rest).expanduser())
    if name == "digits":
        from fdml.data import digits

        return digits.read()
    if name in ("mnist", "fashion-mnist"):
        from fdml.data import idx

        return idx.read(name, data_dir, download=download)
    if name in ("cifar10", "cifar100"):
        from fdml.data import cifar

        return cifar.read(name, data_dir, download=download)
    if name == "svhn":
        from fdml.data import svhn

        return svhn.read(data_dir, download=download)
    if name and Path(name).is_dir():
        raise InputError(f"unknown data set {name!r}: for a folder of images write 'folder:{name}'")
    raise unknown("data set", name, CATALOGUE)
