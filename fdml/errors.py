"""What a user did wrong, said in one line."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """A mistake in what came from outside: the message shows the value and says what would be right.

    The command line prints it without a traceback and exits with 2. Everything else that escapes is a defect of ours.
    """


class Stopped(RuntimeError):  # noqa: N818 — stopping is no mistake
    """A run that ended before its end, with its last good state on the disk; ``code`` is the command's exit status."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name that is not among ``known``, with the nearest one that is."""
    known = sorted(known)
    near = get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return InputError(f"unknown {kind} {name!r}: {hint}")
