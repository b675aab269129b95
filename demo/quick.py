"""gradio, imported in half of its time, with its reports home turned off.

At every import gradio writes a stub file for editors beside each of its components, which takes two of four seconds. It
skips that for a class that lies in no file: for the time of the import, that is what its own classes say.
"""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Read when gradio is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


@contextmanager
def _without_stubs() -> Iterator[None]:
    getfile = inspect.getfile

    def elsewhere(thing: Any) -> str:
        if isinstance(thing, type) and str(thing.__module__).startswith("gradio."):
            raise OSError("no stub is wanted")
        return getfile(thing)

    inspect.getfile = elsewhere
    try:
        yield
    finally:
        inspect.getfile = getfile


with _without_stubs():
    import gradio as gr
    from gradio.events import api as endpoint_of
    from gradio.themes import Base

__all__ = ["Base", "endpoint_of", "gr"]
