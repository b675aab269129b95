"""The server's life: start, warm-up, requests, reloads, and an end that loses no request."""

import asyncio
import contextlib
import gc
import signal
import socket
import ssl
import sys
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from PIL import Image

from fdml.errors import InputError
from fdml.serve.config import Config
from fdml.serve.http import Connection, Hub, Request
from fdml.serve.log import Log
from fdml.serve.metrics import Metrics
from fdml.serve.model import Repository
from fdml.serve.routes import Routes
from fdml.serve.trust import Trust

if TYPE_CHECKING:
    from fdml.serve.tracing import Tracing

_SWITCH = 0.0005
"""Seconds after which a thread that computes yields to the one of the connections."""
_TICK = 0.05
_LAST_CALL = 0.25
"""Seconds for which idle connections stay open when the server ends: a request may be on its way."""


def serve(config: Config, *, started: Callable[[str], None] = lambda address: None) -> None:
    """Serves until SIGTERM or SIGINT; ``started`` is told the address once requests are answered.

    Raises ``InputError`` for a bundle that cannot be served, and for an address that cannot be bound.
    """
    # The process is the server's own: what is global is set for it.
    sys.setswitchinterval(_SWITCH)
    Image.MAX_IMAGE_PIXELS = config.limits.pixels
    warnings.simplefilter("error", Image.DecompressionBombWarning)  # becomes an answer, not a line of text in the log
    try:
        import uvloop
    except ModuleNotFoundError:  # where there is none, as on Windows
        asyncio.run(_Server(config, started).run())
    else:
        uvloop.run(_Server(config, started).run())


class _Server:
    def __init__(self, config: Config, started: Callable[[str], None]) -> None:
        self._config, self._started = config.checked(), started
        self._metrics = Metrics()
        self._log = Log(config.log == "requests")
        self._stop = asyncio.Event()
        self._look = asyncio.Event()
        self._tracing: Tracing | None = None

    async def run(self) -> None:
        config, log = self._config, self._log
        if config.tracing:
            from fdml.serve.tracing import Tracing

            self._tracing = Tracing()
        tls = _tls(config)
        listener = _listener(config)
        models = Repository(config, self._metrics.batch, self._log.defect)
        trust = Trust(config.certify)
        routes = Routes(config, models, trust, self._metrics, log)
        hub = Hub(routes.handle, config.bounds, self._done, self._metrics.refused)
        loop = asyncio.get_running_loop()
        tasks: list[asyncio.Task[None]] = []
        server = None
        try:
            for place in models.places:
                await models.load(place)
            gc.collect()
            gc.freeze()  # what was loaded stays; the collector need not walk it again
            kept = listener.dup()
            server = await loop.create_server(lambda: Connection(hub), sock=listener, ssl=tls, backlog=1024)
            for name in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(name, self._stop.set)
            if hasattr(signal, "SIGHUP"):
                loop.add_signal_handler(signal.SIGHUP, self._look.set)
            routes.ready = True
            host, port = listener.getsockname()[:2]
            address = f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
            log.event("ready", address=address, models=[served.name for served in models])
            if not config.local and not config.tokens:
                log.event("open", level="warning", reason=f"everybody who reaches {config.host} is answered: no tokens")
            log.flush()
            self._started(address)
            tasks = [
                asyncio.create_task(self._ticks(hub, models)),
                asyncio.create_task(self._reloads(models)),
            ]
            await self._stop.wait()
            routes.ready = False
            log.event("draining", connections=len(hub.connections))
            await self._drain(server, kept, hub, tls)
        finally:
            for task in [*tasks, *hub.tasks]:
                task.cancel()
            if server is None:
                listener.close()
            for served in models:
                for batcher in served.batchers:
                    batcher.close()
            trust.close()
            routes.close()
            if self._tracing is not None:
                self._tracing.close()
            if server is not None:
                log.event("ended")
            log.flush()

    def _done(self, request: Request, status: int, size: int) -> None:
        self._metrics.request(request.model, request.route, status, time.perf_counter() - request.began)
        self._log.request(request, status, size)
        if self._tracing is not None:
            self._tracing.request(request, status)

    async def _ticks(self, hub: Hub, models: Repository) -> None:
        """Deadlines, slow clients and the log."""
        second = 0.0
        while True:
            await asyncio.sleep(_TICK)
            for served in models:
                for batcher in served.batchers:
                    batcher.expire()
            self._log.flush()
            now = time.monotonic()
            if now >= second:
                second = now + 1
                hub.tick()

    async def _reloads(self, models: Repository) -> None:
        """Loads a bundle that was written anew, when it is seen or on SIGHUP."""
        pause = self._config.reload_seconds or None
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._look.wait(), pause)
            self._look.clear()
            for place in models.changed():
                name = place.of.called
                try:
                    await models.load(place)
                except (InputError, ImportError) as error:
                    self._metrics.reloads[name, "refused"] += 1
                    self._log.event("reload refused", level="error", model=name, reason=str(error))
                else:
                    self._metrics.reloads[name, "done"] += 1
                    served = place.served
                    self._log.event("reloaded", model=name, weights=served.weights if served else "")

    async def _drain(self, server: asyncio.Server, kept: socket.socket, hub: Hub, tls: ssl.SSLContext | None) -> None:
        """Answers what was accepted, also by the system on our behalf, and ends.

        Each connection is closed with its next answer; one that stays idle, a little later.
        """
        ends = time.monotonic() + self._config.drain_seconds
        hub.drain()
        server.close()
        loop = asyncio.get_running_loop()
        kept.setblocking(False)
        with contextlib.suppress(OSError):
            while True:
                accepted, _ = kept.accept()
                accepted.setblocking(False)
                await loop.connect_accepted_socket(lambda: Connection(hub), accepted, ssl=tls)
        kept.close()
        await asyncio.sleep(_LAST_CALL)
        hub.close_idle()
        while hub.connections and time.monotonic() < ends:
            await asyncio.sleep(0.01)
            hub.close_idle()


def _listener(config: Config) -> socket.socket:
    """The bound socket. Raises ``InputError`` for an address that is taken or not of this machine."""
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((config.host, config.port), family=family, backlog=1024)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"cannot listen on {config.host} port {config.port}: {reason}; give another --host or --port"
        ) from None


def _tls(config: Config) -> ssl.SSLContext | None:
    if config.tls is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(config.tls.cert, config.tls.key)
    except (OSError, ssl.SSLError) as error:
        raise InputError(
            f"TLS: {config.tls.cert} and {config.tls.key} are no certificate with its key: {error}"
        ) from None
    return context
