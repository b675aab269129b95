"""The log: one JSON object a line on standard error, gathered and written a few times a second."""

import sys
import time
import traceback
from typing import Any, TextIO

import msgspec

from fdml.serve.http import Request

_encode = msgspec.json.Encoder().encode
_LARGEST = 10_000
"""Lines that are held at most; what comes beyond is counted and dropped, so that a log that is not read costs no
memory."""


class Answered(msgspec.Struct):
    """The line of a request; times in seconds since 1970 and in milliseconds, sizes in bytes."""

    time: float
    level: str
    event: str
    id: str
    method: str
    path: str
    status: int
    ms: float
    received: int
    sent: int


class Log:
    """Writes what happens: with ``requests`` every answered request, otherwise those that the server failed."""

    def __init__(self, requests: bool, stream: TextIO | None = None) -> None:
        self._requests = requests
        self._stream = stream or sys.stderr
        self._lines: list[bytes] = []
        self._dropped = 0

    def request(self, request: Request, status: int, size: int) -> None:
        """An answered request."""
        if self._requests or status >= 500:
            level = "error" if status >= 500 and status != 503 else "info"
            path = request.path[:200].decode("latin-1")
            took = 1e3 * (time.perf_counter() - request.began)
            verb, id = request.method.decode("latin-1"), request.id.decode("ascii")
            self._add(Answered(time.time(), level, "request", id, verb, path, status, took, len(request.body), size))

    def event(self, event: str, *, level: str = "info", **values: Any) -> None:
        """Something else that happened."""
        self._add({"time": round(time.time(), 3), "level": level, "event": event, **values})

    def defect(self, error: BaseException, id: str = "") -> None:
        """An error that is ours or the network's, with its traceback; ``id`` is the request's, where it is of one."""
        trace = "".join(traceback.format_exception(error))[-4000:]
        self.event("defect", level="error", id=id, traceback=trace)

    def flush(self) -> None:
        """Writes what was gathered."""
        if not self._lines:
            return
        if self._dropped:
            self._lines.append(_encode({"level": "error", "event": "dropped", "lines": self._dropped}))
            self._dropped = 0
        text = b"\n".join(self._lines).decode() + "\n"
        self._lines.clear()
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            return  # nobody reads it any more; the answers go on

    def _add(self, line: dict[str, Any] | Answered) -> None:
        if len(self._lines) < _LARGEST:
            self._lines.append(_encode(line))
        else:
            self._dropped += 1
