"""Numpy arrays in one .npz file."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from fdml.data.dataset import Arrays
from fdml.data.splits import Parts, arrays
from fdml.errors import InputError

MAX_BYTES = 4 << 30
MAX_SIDE = 1024

# Names of (images, labels) of train, test and val in use: Keras, MedMNIST, then files without splits.
_NAMES = (
    (("x_train", "y_train"), ("x_test", "y_test"), ("x_val", "y_val")),
    (("train_images", "train_labels"), ("test_images", "test_labels"), ("val_images", "val_labels")),
    (("x", "y"),),
    (("image", "label"),),
    (("images", "labels"),),
)


def read(path: Path) -> Parts:
    """The arrays ``x_train, y_train`` with ``x_test, y_test`` and ``x_val, y_val`` if there; or ``x, y``.

    Also under MedMNIST's names (``train_images``, …), and as ``image(s), label(s)``. Images are n x h x w (grey),
    n x h x w x c or n x c x h x w with c 1 or 3, uint8 or floats in [0, 1] (rounded to 256 levels); labels are integers
    from 0, of shape (n,) or (n, 1). An optional ``classes`` holds the names. Splits are put in a fixed random order.

    Raises ``InputError`` for anything else, and before reading for arrays that announce more than 4 GiB together.
    """
    contents = _load(path)
    names = next((names for names in _NAMES if names[0][0] in contents and names[0][1] in contents), None)
    if names is None:
        raise InputError(f"{path}: needs x_train and y_train, or x and y; has {', '.join(contents) or 'nothing'}")
    classes = _classes(path, contents, names[0][1])
    splits: list[Arrays | None] = [None, None, None]
    for place, (x, y) in enumerate(names):
        if (x in contents) != (y in contents):
            raise InputError(f"{path}: has {x if x in contents else y} without {y if x in contents else x}")
        if x in contents:
            labels = _labels(path, y, contents[y])
            splits[place] = arrays(_images(path, x, contents[x]), labels, len(classes), f"{path}: {x}, {y}")
    train, test, val = splits
    assert train is not None
    return Parts(classes, train, test, val, shuffle=True)


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            _check_sizes(path, archive)
        with np.load(path, allow_pickle=False) as file:
            wanted = {name for names in _NAMES for pair in names for name in pair} | {"classes"}
            return {name: file[name] for name in file.files if name in wanted}
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, ValueError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: not a readable .npz file ({error})".replace("\n", " ")) from error


def _check_sizes(path: Path, archive: zipfile.ZipFile) -> None:
    """Reads only the header of each array: what it announces must be what the archive holds, and not too much."""
    total = 0
    for info in archive.infolist():
        if not info.filename.endswith(".npy"):
            continue
        with archive.open(info) as member:
            version = np.lib.format.read_magic(member)
            if version not in ((1, 0), (2, 0)):
                raise InputError(f"{path}: {info.filename} has an unknown version {version}")
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = header(member)
            begin = member.tell()
        if dtype.hasobject:
            raise InputError(f"{path}: {info.filename} holds Python objects; save it as numbers or text")
        announced = dtype.itemsize
        for side in shape:
            announced *= side
        if announced != info.file_size - begin:
            raise InputError(f"{path}: {info.filename} announces {announced:,} bytes, has {info.file_size - begin:,}")
        total += announced
        if total > MAX_BYTES:
            raise InputError(f"{path}: more than {MAX_BYTES >> 30} GiB of arrays; use a folder of images")


def _images(path: Path, name: str, images: np.ndarray) -> np.ndarray:
    """uint8, n x c x h x w."""
    shown = f"{path}: {name}"
    shape = "x".join(map(str, images.shape))
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4:
        first, last = images.shape[1] in (1, 3), images.shape[3] in (1, 3)
        if first == last:
            reason = "could have its channels first or last" if first else "has neither 1 nor 3 channels"
            raise InputError(f"{shown} is {shape}, which {reason}")
        images = images.transpose(0, 3, 1, 2) if last else images
    else:
        raise InputError(f"{shown} is {shape}; images are n x h x w, n x h x w x c or n x c x h x w")
    if max(images.shape[2:]) > MAX_SIDE or 0 in images.shape[1:]:
        raise InputError(f"{shown} is {shape}; sides go from 1 to {MAX_SIDE} pixels")
    if images.dtype == np.uint8 or not len(images):
        return images
    if images.dtype.kind != "f":
        raise InputError(f"{shown} is {images.dtype}; images are uint8, or floats in [0, 1]")
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        hint = "; divide by 255" if low >= 0 and 1 < high <= 255 else ""
        raise InputError(f"{shown} goes from {low:g} to {high:g}; float images lie in [0, 1]{hint}")
    return np.rint(images * 255).astype(np.uint8)


def _labels(path: Path, name: str, labels: np.ndarray) -> np.ndarray:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        shape = "x".join(map(str, labels.shape))
        raise InputError(f"{path}: {name} is {labels.dtype} {shape}; labels are integers, one an image")
    return labels


def _classes(path: Path, contents: dict[str, np.ndarray], train_labels: str) -> tuple[str, ...]:
    if "classes" in contents:
        names = contents["classes"]
        if names.ndim != 1 or names.dtype.kind != "U" or len(names) < 2:
            raise InputError(f"{path}: classes must be a list of at least two names")
        return tuple(names.tolist())
    highest = int(_labels(path, train_labels, contents[train_labels]).max(initial=0))
    if not 1 <= highest < 100_000:
        raise InputError(f"{path}: the highest label is {highest}; a classifier needs at least two classes")
    return tuple(str(k) for k in range(highest + 1))
