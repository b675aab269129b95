"""What an application has at hand as images — files, bytes, images of Pillow's, arrays — as the pixels that a model
takes: float32 (n, c, h, w) in [0, 1]."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fdml.errors import InputError
from fdml.pictures import read, read_all

File = str | os.PathLike[str] | bytes | Image.Image
"""One image: a path, the bytes of a file, or an image of Pillow's."""

Picture = File | np.ndarray
"""One image, also as an array (c, h, w), (h, w, c) or, grey, (h, w)."""

Pictures = Picture | Sequence[Picture]
"""One image, or a list or tuple of images, or an array of them: (n, c, h, w) or (n, h, w, c)."""

Shape = tuple[int, int, int]

_ONE = int(np.float32(1).view(np.uint32))


class Intake:
    """The images that were given: how many, whether they are ``one`` by itself, and their pixels piece by piece.

    Files and images of Pillow's are turned, resized and centre-cropped to ``shape``, as ``fdml.pictures.read`` does.
    Arrays must have the size already: uint8, or floats in [0, 1]; where the channels are is seen by the shape. Raises
    ``InputError`` for what is none of these, and for 0 images.
    """

    def __init__(self, images: Pictures, shape: Shape) -> None:
        self._shape = shape
        self.one = not isinstance(images, list | tuple) and not (isinstance(images, np.ndarray) and images.ndim == 4)
        if isinstance(images, np.ndarray) and images.ndim == 4:
            self._batch = _channels_first(images, shape, "the array") if len(images) else images
            self._each: Sequence[Picture] = ()
        else:
            self._batch = None
            self._each = [images] if self.one else images  # pyright: ignore[reportAttributeAccessIssue]
        if not len(self):
            raise InputError("0 images were given: at least one is needed")

    def __len__(self) -> int:
        return len(self._each if self._batch is None else self._batch)

    def pixels(self, first: int, count: int) -> np.ndarray:
        """The pixels of at most ``count`` images from the one numbered ``first`` on."""
        if self._batch is not None:
            return _unit(self._batch[first : first + count], "images", first)
        part = self._each[first : first + count]
        out = np.empty((len(part), *self._shape), dtype=np.float32)
        files, names = [], []
        for place, image in enumerate(part):
            name = "the image" if self.one else f"images[{first + place}]"
            if isinstance(image, str | os.PathLike | bytes):
                files.append((place, image if isinstance(image, bytes) else Path(image)))
                names.append(name if isinstance(image, bytes) else os.fspath(image))
            elif isinstance(image, Image.Image):
                name = str(getattr(image, "filename", "")) or name
                out[place] = _unit(read(image, self._shape, name, still=True), name)
            elif isinstance(image, np.ndarray):
                if image.ndim not in (2, 3):
                    raise _misfit(image, self._shape, name)
                out[place] = _unit(_channels_first(image, self._shape, name), name)
            else:
                kind = f"{type(image).__module__}.{type(image).__qualname__}".removeprefix("builtins.")
                raise InputError(
                    f"{name} is of type {kind}: give a path, the bytes of a file, an image of Pillow's or a numpy array"
                )
        if files:
            # A pool of threads costs more than it saves on a few.
            threads = 1 if len(files) < 4 else None
            decoded = read_all([source for _, source in files], self._shape, names, threads, still=True)
            out[[place for place, _ in files]] = _unit(decoded, "images")
        return out


def check_batch(images: np.ndarray, shape: Shape) -> None:
    """Raises ``InputError`` unless it is a float32 array (n, c, h, w), n at least 1, of pixels in [0, 1]."""
    if not isinstance(images, np.ndarray) or images.dtype != np.float32:
        found = images.dtype if isinstance(images, np.ndarray) else type(images).__name__
        raise InputError(f"the batch is {found}: a float32 array is needed, with pixels in [0, 1]; or call predict")
    if images.ndim != 4 or images.shape[1:] != shape:
        raise InputError(f"the batch has the shape {images.shape}: (n, {', '.join(map(str, shape))}) is needed")
    if not len(images):
        raise InputError("0 images were given: at least one is needed")
    _check_range(images, "images", 0)


def _channels_first(array: np.ndarray, shape: Shape, name: str) -> np.ndarray:
    """A view of one image or a batch of them with the channels before the sides."""
    c, h, w = shape
    if array.ndim == 2 and c == 1 and array.shape == (h, w):
        return array[None]
    sides = array.shape[-3:]
    if sides == (c, h, w) and sides == (h, w, c) and c > 1:
        raise InputError(f"{name}: its shape {array.shape} does not tell where the channels are: call logits instead")
    if sides == (c, h, w):
        return array
    if sides == (h, w, c):
        return np.moveaxis(array, -1, -3)
    raise _misfit(array, shape, name)


def _misfit(array: np.ndarray, shape: Shape, name: str) -> InputError:
    c, h, w = shape
    allowed = f"{(c, h, w)} or {(h, w, c)}" + (f" or {(h, w)}" if c == 1 else "")
    return InputError(
        f"{name} has the shape {array.shape}: the model takes {allowed} for one image; resize it, or give an image of"
        " Pillow's or a file, which are fitted"
    )


def _unit(array: np.ndarray, name: str, first: int | None = None) -> np.ndarray:
    """Pixels as float32 in [0, 1]. ``first`` is the number of the first image of a batch."""
    if array.dtype == np.uint8:
        pixels = array.astype(np.float32, order="C")
        pixels /= np.float32(255)
        return pixels
    if array.dtype.kind != "f":
        raise InputError(f"{name}: {array.dtype} is not a type of pixels: uint8 from 0 to 255, or floats in [0, 1]")
    # A value too large for float32 becomes inf, which is refused as it should be.
    with np.errstate(over="ignore"):
        pixels = array.astype(np.float32, order="C", copy=False)
    _check_range(pixels, name, first)
    return pixels


def _check_range(pixels: np.ndarray, name: str, first: int | None) -> None:
    # One pass: by their bits, read as whole numbers, NaN and all that is below 0 or above 1 lie above 1.
    if pixels.view(np.uint32).max() <= _ONE:
        return
    bad = ~((pixels >= 0) & (pixels <= 1))
    if not bad.any():  # −0.0 is a 0, for all that its bits say
        return
    place = np.unravel_index(int(bad.argmax()), bad.shape)
    which = name if first is None else f"{name}[{first + int(place[0])}]"
    hint = "; divide bytes by 255, or give them as uint8" if 1 < pixels.max() <= 255 and pixels.min() >= 0 else ""
    raise InputError(f"{which} has the pixel {pixels[place]:g}: pixels are finite and in [0, 1]{hint}")
