"""What certificates add up to: certified accuracy by radius, between which and the attack's the truth lies."""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from fdml.certify.certificate import Certificate
from fdml.evaluate.accuracy import interval

_POINTS = 120


def report(header: Mapping[str, Any], certificates: Sequence[Certificate], *, seconds: float) -> dict[str, Any]:
    """The report of a certificates file, as JSON values (docs/certificates.md).

    ``seconds`` is the wall time of the process that wrote it; the images' own times add up over all processes.
    """
    n = len(certificates)
    radii = _radii(header, certificates)
    samples = [c.n0 + c.n for c in certificates if c.n is not None and c.n0 is not None]
    times = sorted(c.seconds for c in certificates)
    return {
        **header,
        "n": n,
        "clean": _share(c.correct for c in certificates),
        "table": [_row(radius, certificates) for radius in radii],
        "curve": _curve(certificates),
        "average_radius": statistics.fmean(c.radius if c.correct else 0.0 for c in certificates) if n else 0.0,
        "statuses": dict(Counter(c.status for c in certificates)),
        "methods": dict(Counter(c.method for c in certificates)),
        "samples": _spread(samples) if samples else None,
        "seconds": {"wall": round(seconds, 3), "images": _spread(times)},
    }


def certificate_table(found: Mapping[str, Any]) -> Table:
    """The report as a table for a terminal."""
    norm = "linf" if found["settings"].get("norm") == "linf" else "l2"
    words = f"{found['model']['name']}: {found['n']} test images of {found['data']['name']}, {found['method']}"
    notes = [f"average certified radius {found['average_radius']:.4g}"]
    notes += [f"{count} {status}" for status, count in found["statuses"].items() if status != "certified"]
    if found["samples"]:
        notes.append(f"{found['samples']['mean']:,.0f} samples an image (median {found['samples']['median']:,.0f})")
    notes.append(f"{found['seconds']['images']['mean']:.3g} s an image")
    table = Table(
        Column(f"{norm} radius", justify="right"),
        Column("certified", justify="right"),
        Column("95% interval", justify="right", style="dim"),
        Column("stands under attack", justify="right"),
        title=Text(words, style="bold"),
        title_justify="left",
        caption=", ".join(notes),
        caption_justify="left",
    )
    for row in found["table"]:
        low, high = row["interval"]
        stands = "" if row["stands"] is None else f"{100 * row['stands']:.1f}%"
        range_ = f"{100 * low:.1f} to {100 * high:.1f}"
        table.add_row(f"{row['radius']:.4g}", f"{100 * row['certified']:.1f}%", range_, stands)
    return table


def _radii(header: Mapping[str, Any], certificates: Sequence[Certificate]) -> list[float]:
    asked = header["settings"].get("radii") or [c.eps for c in certificates[:1] if c.eps is not None]
    return sorted({0.0, *asked})


def _row(radius: float, certificates: Sequence[Certificate]) -> dict[str, Any]:
    held = sum(c.holds(radius) for c in certificates)
    attacked = any(c.fooled_at is not None for c in certificates)
    return {
        "radius": radius,
        "certified": held / len(certificates),
        "interval": list(interval(held / len(certificates), len(certificates))),
        "stands": _share(c.stands(radius) for c in certificates) if attacked else None,
    }


def _curve(certificates: Sequence[Certificate]) -> dict[str, list[float]]:
    """Certified accuracy at radii from 0 to the largest."""
    right = sorted(c.radius for c in certificates if c.correct and c.status == "certified")
    largest = right[-1] if right else 0.0
    radii = [largest * k / (_POINTS - 1) for k in range(_POINTS)] if largest else [0.0]
    shares = [sum(radius >= at for radius in right) / len(certificates) for at in radii]
    shares[0] = _share(c.correct for c in certificates)
    return {"radius": [round(r, 6) for r in radii], "certified": shares}


def _share(found: Any) -> float:
    values = list(found)
    return sum(values) / len(values) if values else math.nan


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "mean": statistics.fmean(values),
        "median": statistics.median(values),
        "largest": max(values),
        "total": sum(values),
    }
