"""`fdml` as a person calls it, without the seconds that a process of its own takes."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import patch

import pytest

from fdml.cli import main


def call(*words: object) -> tuple[int, str, str]:
    """The exit status, standard output and standard error of ``fdml words…``, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["fdml", *map(str, words)]),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as stop,
    ):
        main()
    return int(stop.value.code or 0), out.getvalue(), err.getvalue()
