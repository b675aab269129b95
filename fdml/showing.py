"""How figures and pictures are said and shown to people, whatever draws them."""

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from fdml.threat import Threat


def magnification(changes: Sequence[np.ndarray], threat: "Threat") -> float:
    """What brings a change of eps (linf), or nearly the largest of the changes, to black or white; to two digits."""
    if threat.norm == "linf" and threat.eps:
        return float(f"{0.5 / threat.eps:.2g}")
    sizes = np.concatenate([np.abs(change).ravel() for change in changes])
    sizes = sizes[sizes > 1e-6]
    return float(f"{0.5 / np.quantile(sizes, 0.99):.2g}") if len(sizes) else 1.0


def percent(share: float) -> str:
    """A confidence in whole percent; what is not certain is never said to be."""
    return ">99%" if share > 0.995 else f"{100 * share:.0f}%"


def shorten(name: str, length: int = 20) -> str:
    """The name on one line, and with an ellipsis where it is longer than ``length`` characters."""
    name = " ".join(name.split())
    return name if len(name) <= length else name[: length - 1].rstrip(" ,;") + "…"


def pixels(image: np.ndarray, side: int) -> str:
    """An image (c, h, w) in [0, 1] as a data URI; averaged down where it is larger than ``side``."""
    drawn = _drawn(image)
    if max(drawn.size) > side:
        drawn.thumbnail((side, side), Image.Resampling.BOX)
    return data_uri(drawn)


def change(delta: np.ndarray, scale: float, side: int) -> str:
    """A change (c, h, w) times ``scale`` around grey, as a data URI. Never averaged: it would seem less than it is."""
    stride = -(-max(delta.shape[1:]) // side)
    return data_uri(_drawn(0.5 + scale * delta[:, ::stride, ::stride]))


def _drawn(image: np.ndarray) -> Image.Image:
    grey = image if image.shape[0] == 3 else image.mean(0, keepdims=True)
    levels = np.rint(255 * np.clip(grey, 0, 1)).astype(np.uint8).transpose(1, 2, 0)
    return Image.fromarray(levels if levels.shape[2] == 3 else levels[:, :, 0])


def data_uri(image: Image.Image | bytes) -> str:
    """An image, or the bytes of a PNG, as an address that holds it."""
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, format="png", optimize=True)
        image = buffer.getvalue()
    return "data:image/png;base64," + base64.b64encode(image).decode()
