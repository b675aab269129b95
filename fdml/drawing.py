"""What every picture of a run shares: its colours, its fonts, and a size that a page loads at once.

Only matplotlib's figures are used, never pyplot, so nothing global is left behind. Colours are those of Okabe and Ito
(2008) for all kinds of colour vision, darkened for text on white, and no meaning hangs on colour alone.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

INK, GREY, PALE = "#222222", "#6b6b6b", "#d9d9d9"
BLUE, ORANGE, GREEN, PURPLE, BROWN = "#0072b2", "#c24e00", "#00795a", "#a3407a", "#8a6100"

MAX_BYTES = 150_000
"""The size a picture is held to, so that a page loads at once."""

DPI = 150
WIDTH = 1350
"""Pixels across; shown at 900, which leaves the rest to screens of high density."""

# DejaVu Sans comes with matplotlib; the others are asked for what it lacks, where a system has them.
_FAMILIES = (
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "PingFang SC",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Malgun Gothic",
    "Arial Unicode MS",
    "WenQuanYi Zen Hei",
)


def families() -> list[str]:
    """The fonts to draw with, in order of preference, as far as this system has them."""
    known = {font.name for font in font_manager.fontManager.ttflist}
    return [family for family in _FAMILIES if family in known]


@contextmanager
def style() -> Iterator[None]:
    """Our own settings, whatever the user's matplotlibrc says, and the user's again afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.family": families(), "font.size": 8})
        yield


def png(figure: Figure, attempts: Sequence[tuple[int, Sequence[int | None]]]) -> bytes:
    """The figure as a PNG of at most ``MAX_BYTES``, or the last attempt where photographs do not allow it."""
    FigureCanvasAgg(figure)
    content = b""
    for dpi, palettes in attempts:
        rendered = io.BytesIO()
        figure.savefig(rendered, format="png", dpi=dpi)
        for colours in palettes:
            buffer = rendered
            if colours:
                image = Image.open(rendered).convert("RGB").quantize(colours, dither=Image.Dither.NONE)
                image.save(buffer := io.BytesIO(), format="png", optimize=True)
            content = buffer.getvalue()
            if len(content) <= MAX_BYTES:
                return content
    return content
