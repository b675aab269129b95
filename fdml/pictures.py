"""One image file to bytes: the same decoding for data sets, for pictures given on the command line, and in an
application."""

import io
import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fdml.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_SIDE = 1024
_GREY = ("1", "L", "LA")
_COLOUR = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
# What Pillow is known to raise on damaged files, besides OSError.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


def read(
    source: Path | bytes | Image.Image, shape: tuple[int, int, int], name: str | None = None, *, still: bool = False
) -> np.ndarray:
    """The image as uint8 (c, h, w): turned as its EXIF says, resized and centre-cropped to ``shape``.

    ``source`` is a path, the bytes of a file or an image of Pillow's; ``name`` is what errors call it. Only PNG, JPEG,
    WebP and BMP of 8 bits are read. The resize (bicubic, antialiased) keeps the aspect ratio; an image that already
    fits is left as it is. Of an animation the first frame is taken, or, with ``still``, none.

    Raises ``InputError`` for an image that is unreadable, truncated, above Pillow's decompression-bomb limit, or of
    another format.
    """
    c, h, w = shape
    image = _load(source, name, still)
    image = image.convert("L" if c == 1 else "RGB")
    if image.size != (w, h):
        image = ImageOps.fit(image, (w, h), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if c == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def read_all(
    sources: Sequence[Path | bytes],
    shape: tuple[int, int, int],
    names: Sequence[str] | None = None,
    threads: int | None = None,
    *,
    still: bool = False,
) -> np.ndarray:
    """``read`` of every source, as uint8 (n, c, h, w), by a pool of threads (Pillow decodes outside Python's lock)."""
    out = np.empty((len(sources), *shape), dtype=np.uint8)

    def fill(place: int) -> None:
        out[place] = read(sources[place], shape, names[place] if names else None, still=still)

    threads = threads or min(8, cpus())
    if threads == 1:
        for place in range(len(sources)):
            fill(place)
        return out
    with ThreadPoolExecutor(threads) as pool:
        try:
            for _ in pool.map(fill, range(len(sources))):
                pass
        except InputError:
            pool.shutdown(cancel_futures=True)
            raise
    return out


def cpus() -> int:
    """How many processors this process may use; a container often has fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shape_of(source: Path | bytes, size: int | None, name: str | None = None) -> tuple[int, int, int]:
    """The shape (c, h, h) that a data set takes from its first image: grey or RGB; ``size``, or the image's own side.

    Raises ``InputError`` when the side must come from the image and that is not square or above 1,024 pixels.
    """
    image = _load(source, name)
    channels = 1 if image.mode in _GREY else 3
    if size is None:
        width, height = image.size
        if width != height or width > MAX_SIDE:
            shown = name or str(source)
            raise InputError(f"{shown}: the first image is {width}x{height}; give a size of at most {MAX_SIDE} pixels")
        size = width
    return channels, size, size


def _load(source: Path | bytes | Image.Image, name: str | None, still: bool = False) -> Image.Image:
    shown = name or ("the image" if isinstance(source, bytes | Image.Image) else str(source))
    try:
        if isinstance(source, Image.Image):
            return _decoded(source, shown, still)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            return _decoded(image, shown, still)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{shown}: no such file") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{shown}: {error}") from error
    except _DAMAGED as error:
        detail = "" if isinstance(error, UnidentifiedImageError) else f" ({error})".replace("\n", " ")
        raise InputError(f"{shown}: not a readable PNG, JPEG, WebP or BMP image{detail}") from error


def _decoded(image: Image.Image, shown: str, still: bool) -> Image.Image:
    width, height = image.size
    if not width or not height:
        raise InputError(f"{shown}: {width}x{height} pixels are no image")
    # Pillow itself refuses only above twice its limit, and warns below that.
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise InputError(f"{shown}: {width}x{height} pixels are too many (limit {Image.MAX_IMAGE_PIXELS:,})")
    if image.mode not in _GREY + _COLOUR:
        raise InputError(f"{shown}: mode {image.mode} is not supported; convert the image to 8 bits a channel")
    # The photographs of many telephones are MPO: a JPEG with a second picture, such as a depth map, behind it.
    frames = getattr(image, "n_frames", 1) if still and image.format != "MPO" else 1
    if frames > 1:
        raise InputError(f"{shown}: an animation of {frames} frames; give one frame as an image of its own")
    if image.mode == "P" and "transparency" in image.info:
        return ImageOps.exif_transpose(image).convert("RGBA")
    image.load()
    return ImageOps.exif_transpose(image)
