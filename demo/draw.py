"""The demo's charts, as SVG in the colours of the page: sharp on every screen, light or dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

WIDTH, HEIGHT = 460, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 42


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("fdml.demo", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **values: Any) -> Markup:
    """A template of the demo, filled in; every value is escaped unless it is markup itself."""
    return Markup(_templates().get_template(template).render(**values))


@dataclass(frozen=True)
class Line:
    """Points (x, y) of one model; ``key`` chooses the colour and the dash, ``name`` is its legend."""

    key: str
    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Mark:
    """A vertical line at ``x``, named."""

    x: float
    name: str


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    across: str,
    up: str,
    marks: Sequence[Mark] = (),
    percent: bool = False,
) -> Markup:
    """A line chart that says in words what it shows. With ``percent`` values go from 0 to 1; else from 0, or below, to
    what there is."""
    points = [point for line in lines for point in line.points]
    right = max([x for x, _ in points] + [mark.x for mark in marks], default=1.0) or 1.0
    low, high = (
        (0.0, 1.0) if percent else (min([0.0] + [y for _, y in points]), max([y for _, y in points], default=1.0))
    )
    high = high if high > low else low + 1.0
    xs, ys = ticks(0.0, right), ticks(low, high)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            round(_LEFT + (WIDTH - _LEFT - _RIGHT) * x / right, 1),
            round(HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * (y - low) / (high - low), 1),
        )

    return render(
        "chart.svg.jinja",
        title=title,
        width=WIDTH,
        height=HEIGHT,
        box=(_LEFT, _TOP, WIDTH - _RIGHT, HEIGHT - _BOTTOM),
        across=across,
        up=up,
        xs=[(place(x, low)[0], f"{x:g}") for x in xs],
        ys=[(place(0, y)[1], f"{100 * y:.0f}%" if percent else f"{y:g}") for y in ys],
        lines=[(line.key, line.name, [place(*point) for point in line.points]) for line in lines],
        marks=[(place(mark.x, low)[0], mark.name) for mark in marks],
    )


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``, about so many."""
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(times * unit for times in (1, 2, 5, 10) if times * unit >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def ring(certified: float, broken: float | None, tried: float | None, picture: str, words: str) -> Markup:
    """The picture in the middle of what is proved: a disc of the certified radius, the ring in which the truth lies,
    and what lies beyond the attack that succeeded. Radii are in l2, on one axis."""
    end = max(broken or 0.0, 1.25 * (tried or 0.0), 1.6 * certified, 1e-3) * 1.12
    scale = (WIDTH - 2 * _LEFT) / end

    def at(radius: float) -> float:
        return round(radius * scale, 1)

    return render(
        "ring.svg.jinja",
        width=WIDTH,
        height=HEIGHT,
        origin=_LEFT,
        middle=(HEIGHT - _BOTTOM) / 2 + 6,
        certified=at(certified),
        broken=None if broken is None else at(broken),
        tried=None if tried is None else at(tried),
        end=at(end),
        picture=picture,
        words=words,
        values=(math.floor(1000 * certified) / 1000, broken),  # toward 0, as a proof is
        xs=[(at(x), f"{x:g}") for x in ticks(0.0, end)],
        floor=HEIGHT - _BOTTOM,
    )
