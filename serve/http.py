"""HTTP/1.1 connections: requests within limits, answers, clients that are slow, hang up or send nonsense.

The parser is llhttp, Node's own, by httptools. What is here is what an inference server needs beside it and a general
web server does not give: the head, the body, the time and the memory of all connections together are bounded, and a
request knows that its client hung up while it still waits for a batch. docs/results.md has it beside general ones.
"""

import asyncio
import itertools
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, cast

import httptools
import msgspec

JSON = b"application/json"

_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_FRAME = 16
"""Bytes in which a byte of a body may come: a chunk of one byte takes six."""
_LINGER = 1.0
"""Seconds for which what a refused client still sends is read away: closing at once would take the answer from it."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a client may take: bytes, seconds, connections."""

    connections: int = 1024
    head: int = 16 << 10
    headers: int = 100
    body: int = 32 << 20
    bodies: int = 512 << 20
    """Bytes of all bodies that are held at once."""
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    idle_seconds: float = 75.0
    write_seconds: float = 30.0


class Problem(Exception):  # noqa: N818 — it is an answer
    """An error that a client is told: an HTTP status, one line, and more header lines."""

    def __init__(self, status: int, message: str, extra: bytes = b"") -> None:
        super().__init__(message)
        self.status, self.extra = status, extra


class Request:
    """A request whose body is whole. ``gone`` becomes true when its client hangs up. It is answered once, by ``reply``
    or ``fail``; what comes later is dropped."""

    __slots__ = (
        "_connection",
        "answered",
        "began",
        "body",
        "gone",
        "headers",
        "id",
        "method",
        "model",
        "path",
        "query",
        "route",
    )

    def __init__(self, connection: "Connection", method: bytes, path: bytes, query: bytes) -> None:
        self._connection = connection
        self.method, self.path, self.query = method, path, query
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.id = b""
        self.route, self.model = "other", ""
        self.began = time.perf_counter()
        self.gone = self.answered = False

    def reply(self, status: int, body: bytes, kind: bytes = JSON, extra: bytes = b"") -> None:
        """Answers. ``extra`` are more header lines, each with its line end."""
        if not self.answered:
            self.answered = True
            self._connection.answer(self, status, body, kind, extra)

    def fail(self, status: int, message: str, extra: bytes = b"") -> None:
        """Answers with an error as the Open Inference Protocol has them: ``{"error": message}``."""
        self.reply(status, msgspec.json.encode({"error": message}), JSON, extra)


Handle = Callable[[Request], Coroutine[Any, Any, None] | None]
"""Answers a request: at once, later, or by a coroutine."""


class Hub:
    """What all connections share: the limits, the handler, their number, the bytes that they hold. ``done`` is told of
    each answer, its status and size, ``refused`` the status of what never became a request."""

    def __init__(
        self,
        handle: Handle,
        limits: Limits,
        done: Callable[[Request, int, int], None],
        refused: Callable[[int], None] = lambda status: None,
    ) -> None:
        self.handle, self.limits, self.done, self.refused = handle, limits, done, refused
        self.connections: set[Connection] = set()
        self.bodies = 0
        self.draining = False
        self.tasks: set[asyncio.Task[None]] = set()
        self._ids = itertools.count()
        self._prefix = secrets.token_hex(6).encode()
        self.date = b""
        self.tick()

    def new_id(self) -> bytes:
        """An id that no other request of this process has."""
        return b"%s-%x" % (self._prefix, next(self._ids))

    def tick(self) -> None:
        """Once a second: the date, and the end of connections whose time is over."""
        self.date = b"date: " + formatdate(usegmt=True).encode() + b"\r\n"
        now = time.monotonic()
        for connection in [each for each in self.connections if each.deadline < now]:
            connection.expire()

    def drain(self) -> None:
        """From now on each connection closes after its answer."""
        self.draining = True

    def close_idle(self) -> None:
        """Closes the connections that have no request."""
        for connection in [each for each in self.connections if not each.busy]:
            connection.close()


class Connection(asyncio.Protocol):
    """One connection: it reads requests one after the other, each answered before the next is begun."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._active: Request | None = None
        self._waiting: deque[tuple[Request, bool]] = deque()
        self._keep = True
        self._active_keep = True
        self._refusing = False
        self._paused = False
        self._blocked = False
        self._begun = False
        self.deadline = float("inf")
        self._begin()

    @property
    def busy(self) -> bool:
        """Whether a request has begun to arrive, or is not answered yet."""
        return self._active is not None or self._began or bool(self._waiting)

    # What asyncio calls ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._hub.connections.add(self)
        self.deadline = time.monotonic() + self._hub.limits.head_seconds
        if len(self._hub.connections) > self._hub.limits.connections:
            self._refuse(503, "too many connections", b"retry-after: 1\r\n")

    def connection_lost(self, exc: Exception | None) -> None:
        hub = self._hub
        hub.connections.discard(self)
        hub.bodies -= self._held
        self._held = 0
        for request in [self._active, *(request for request, _ in self._waiting)]:
            if request is not None:
                request.gone = True
                hub.bodies -= len(request.body)
        self._active = None
        self._waiting.clear()

    def eof_received(self) -> bool:
        return False  # who stops sending has hung up

    def pause_writing(self) -> None:
        # Who does not read its answers is asked for no more requests.
        self._blocked = True
        self._pause()
        self.deadline = time.monotonic() + self._hub.limits.write_seconds

    def resume_writing(self) -> None:
        self._blocked = False
        self._wait() if self._active is not None else self._next()

    def data_received(self, data: bytes) -> None:
        if self._refusing:
            return
        if not self._whole_head:
            self._head += len(data)
            if not self._began:
                self._began = True
                self._hurry(self._hub.limits.head_seconds)
        held = self._held
        self._begun = False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refusing = True  # what follows would be in the other protocol; the request itself is answered
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            if not isinstance(cause, Problem):
                raise
            self._refuse(cause.status, str(cause))
        except httptools.HttpParserError:
            self._refuse(400, "this is no HTTP/1.1 request")
        else:
            # After the head too, what is no body and not the frame of its chunks: extensions, trailers.
            if self._whole_head:
                self._head += max(0, len(data) - _FRAME * (self._held - held))
            if self._head > self._hub.limits.head:
                self._refuse(431, f"the head of the request is larger than {self._hub.limits.head} bytes")

    # What the parser calls -------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._began = True

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        limits = self._hub.limits
        self._count += 1
        self._named += len(name) + len(value)
        if self._count > limits.headers or self._named > limits.head:
            raise Problem(431, f"the request has more than {limits.headers} headers, or {limits.head} bytes of them")
        if not self._whole_head:  # a trailer says nothing that is acted on
            self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        limits, headers = self._hub.limits, self._headers
        if len(self._url) > limits.head:
            raise Problem(431, f"the URL has more than {limits.head} bytes")
        self._whole_head = True
        self._head = 0
        self._hurry(limits.body_seconds)
        length = headers.get(b"content-length")
        if length is not None and int(length) > limits.body:
            raise Problem(413, f"the body has {int(length)} bytes; at most {limits.body} are taken")
        if headers.get(b"expect", b"").lower() == b"100-continue" and self._active is None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        # An offer to go on in another protocol is not taken up; the parser leaves out the body of such a request.
        other = self._parser.should_upgrade()
        if other and (length not in (None, b"0") or b"transfer-encoding" in headers):
            raise Problem(501, "no other protocol is spoken here than HTTP/1.1")
        self._keep = self._parser.should_keep_alive() and not other

    def on_body(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self._held += len(piece)
        self._hub.bodies += len(piece)
        if self._held > self._hub.limits.body:
            raise Problem(413, f"the body is larger than the {self._hub.limits.body} bytes that are taken")
        if self._hub.bodies > self._hub.limits.bodies:
            raise Problem(503, "the server holds as many requests as it can; try again")

    def on_message_complete(self) -> None:
        path, _, query = self._url.partition(b"?")
        request = Request(self, self._parser.get_method(), path, query)
        request.headers = self._headers
        pieces = self._pieces
        request.body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        given = self._headers.get(b"x-request-id")
        request.id = given if given is not None and _ID.fullmatch(given) else self._hub.new_id()
        keep = self._keep
        self._begin()
        # One of those that came in one piece; the others later, so that other connections have their turn.
        if self._active is None and not self._waiting and not self._blocked and not self._begun:
            self._begun = True
            self._start(request, keep)
            return
        self._waiting.append((request, keep))
        self._pause()
        if self._active is None and len(self._waiting) == 1:
            asyncio.get_running_loop().call_soon(self._next)

    # Answers ---------------------------------------------------------------------------------------------------------

    def answer(self, request: Request, status: int, body: bytes, kind: bytes, extra: bytes) -> None:
        """Writes the answer to the active request, and goes on with the next."""
        hub = self._hub
        hub.done(request, status, len(body))
        if request is not self._active:  # the client has hung up
            return
        hub.bodies -= len(request.body)
        keep = self._active_keep and not hub.draining
        self._active = None
        self._write(status, b"" if request.method == b"HEAD" else body, len(body), kind, extra, request.id, keep)
        if not keep:
            self._transport.close()
        elif self._waiting:  # not from here, where as many answers would call each other as requests wait
            asyncio.get_running_loop().call_soon(self._next)
        else:
            self._next()

    def expire(self) -> None:
        """Its time is over: an answer where a request has begun to arrive, and the end."""
        if self._began and self._active is None and not self._refusing and not self._blocked:
            self._refuse(408, "the request did not arrive in time")
        else:  # not in order: that would wait for the client to read
            self._transport.abort()

    def close(self) -> None:
        """Closes it after what is written."""
        self._transport.close()

    def _begin(self) -> None:
        """Ready for the next request."""
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._pieces: list[bytes] = []
        self._count = self._named = self._head = self._held = 0
        self._whole_head = self._began = False

    def _next(self) -> None:
        """Goes on with the request that waits, or waits for one."""
        if self._blocked or self._active is not None or self._transport.is_closing():
            return
        if self._waiting:
            self._start(*self._waiting.popleft())
            return
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        self._rest()

    def _pause(self) -> None:
        if not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def _rest(self) -> None:
        """Nothing is waited for but the next request, or the rest of it."""
        limits = self._hub.limits
        seconds = limits.idle_seconds if not self._began else limits.head_seconds
        self.deadline = time.monotonic() + (limits.body_seconds if self._whole_head else seconds)

    def _hurry(self, seconds: float) -> None:
        """The client has to go on within so many seconds, unless it waits for us."""
        if self._active is None:
            self.deadline = time.monotonic() + seconds

    def _wait(self) -> None:
        """The next step is ours: the client cannot be late."""
        self.deadline = float("inf")

    def _start(self, request: Request, keep: bool) -> None:
        self._active, self._active_keep = request, keep
        self._wait()
        work = self._hub.handle(request)
        if work is not None:
            task = asyncio.get_running_loop().create_task(work)
            self._hub.tasks.add(task)
            task.add_done_callback(self._hub.tasks.discard)

    def _refuse(self, status: int, message: str, extra: bytes = b"") -> None:
        """Answers what is no request that will be handled, and closes."""
        self._refusing = True
        self._hub.refused(status)
        self._hub.bodies -= self._held
        self._held = 0
        self._pieces.clear()
        if self._active is not None:  # the answer to an earlier request comes first, and nothing after it
            self._active_keep = False
            for request, _ in self._waiting:
                self._hub.bodies -= len(request.body)
            self._waiting.clear()
            return
        body = msgspec.json.encode({"error": message})
        self._write(status, body, len(body), JSON, extra, self._hub.new_id(), keep=False)
        self.deadline = time.monotonic() + _LINGER
        if self._transport.can_write_eof():
            self._transport.write_eof()
        else:  # TLS
            self._transport.close()

    def _write(self, status: int, body: bytes, size: int, kind: bytes, extra: bytes, id: bytes, keep: bool) -> None:
        self._transport.write(
            b"%s%scontent-type: %s\r\ncontent-length: %d\r\nx-request-id: %s\r\n%s%s\r\n%s"
            % (
                _LINES[status],
                self._hub.date,
                kind,
                size,
                id,
                extra,
                b"" if keep else b"connection: close\r\n",
                body,
            )
        )
