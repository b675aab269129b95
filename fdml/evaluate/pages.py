"""What the pages of reports share: templates that escape what they show, and how numbers are written."""

import base64
import hashlib
from collections.abc import Sequence

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from fdml.showing import shorten


def pages(package: str = "fdml.evaluate") -> Environment:
    """The templates of ``package`` and those they all build on: every string is escaped, nothing may be undefined."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=ChoiceLoader([PackageLoader(name, "") for name in dict.fromkeys([package, "fdml.evaluate"])]),
    )
    environment.filters |= {"pc": percent, "span": span, "duration": duration, "short": shorten, "sha256": sha256}
    return environment


def percent(share: float) -> str:
    """0.123 as 12.3%."""
    return f"{100 * share:.1f}%"


def span(interval: Sequence[float]) -> str:
    """An interval of shares in per cent."""
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as a person would say it."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def sha256(text: str) -> str:
    """The digest by which a page's policy allows its own style."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
