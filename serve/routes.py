"""What the server answers: which address is whose, who may ask, and each answer."""

import asyncio
import hashlib
import hmac
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import parse_qsl, unquote_to_bytes

import msgspec
import numpy as np

import fdml
from fdml.bundle import BundleError
from fdml.errors import InputError
from fdml.serve import about, wire
from fdml.serve.batcher import Batcher, Full, Job
from fdml.serve.body import decoded, inflated, picture
from fdml.serve.config import Config, TokenConfig
from fdml.serve.http import JSON, Problem, Request
from fdml.serve.log import Log
from fdml.serve.metrics import KIND, Metrics
from fdml.serve.model import Repository, Served
from fdml.serve.trust import Trust, norm_for
from fdml.suspicion import suspicion

EXTENSIONS = ["binary_tensor_data", "classification", "statistics"]
_PICTURES = 256
"""Pictures that may wait to be decoded."""
_HTML = b"text/html; charset=utf-8"
_PAGE_RULES = (
    b"content-security-policy: default-src 'none'; style-src 'unsafe-inline'\r\nx-content-type-options: nosniff\r\n"
)
_json = msgspec.json.Encoder().encode


class Routes:
    """Handles requests. ``handle`` is given to the connections."""

    def __init__(self, config: Config, models: Repository, trust: Trust, metrics: Metrics, log: Log) -> None:
        self._config, self._models, self._trust, self._metrics, self._log = config, models, trust, metrics, log
        self._tokens = [(bytes.fromhex(token.sha256), token) for token in config.tokens]
        self._pictures = ThreadPoolExecutor(2, "fdml-pictures")
        self._decoding = 0
        self.ready = False
        """Whether the server wants requests: after the start, and until it is told to end."""

    def handle(self, request: Request) -> Coroutine[Any, Any, None] | None:
        """Answers a request, now or later."""
        try:
            if request.method == b"POST":
                served = self._models.infer.get(request.path)
                if served is not None:
                    self._allowed(request)
                    self._infer(request, served)
                    return None
            return self._other(request)
        except Exception as error:
            self._answer_error(request, error)
            return None

    def close(self) -> None:
        """Ends the threads."""
        self._pictures.shutdown(wait=False, cancel_futures=True)

    # Errors and tokens -----------------------------------------------------------------------------------------------

    def _answer_error(self, request: Request, error: Exception) -> None:
        match error:
            case Problem():
                request.fail(error.status, str(error), error.extra)
            case Full():
                request.fail(503, str(error), b"retry-after: %d\r\n" % max(1, round(error.seconds)))
            case wire.WireError() | InputError() if not isinstance(error, BundleError):  # that one names a path
                request.fail(400, str(error))
            case _:
                id = request.id.decode("ascii")
                self._log.defect(error, id)
                request.fail(500, f"a defect of the server; its log has more under the id {id}")

    def _allowed(self, request: Request, *, admin: bool = False) -> None:
        """Raises ``Problem`` where the request has no token that allows it."""
        if not self._tokens:
            return
        scheme, _, given = request.headers.get(b"authorization", b"").partition(b" ")
        digest = hashlib.sha256(given.strip()).digest() if scheme.lower() == b"bearer" else b""
        found: TokenConfig | None = None
        for known, token in self._tokens:  # all of them, so that the time says nothing
            if hmac.compare_digest(known, digest):
                found = token
        if found is None:
            raise Problem(401, "a bearer token is needed", b"www-authenticate: Bearer\r\n")
        if admin and not found.admin:
            raise Problem(403, "this token may not load or unload models")

    # The Open Inference Protocol -------------------------------------------------------------------------------------

    def _infer(self, request: Request, served: Served) -> None:
        request.route, request.model = "infer", served.name
        headers = request.headers
        coding = headers.get(b"content-encoding")
        body = request.body if coding is None else inflated(request.body, coding, served.reader.most)
        plan, images = served.reader.read(body, headers.get(wire.LENGTH))
        limit = self._config.deadline_seconds
        if plan.timeout is not None:
            limit = min(limit, plan.timeout)
        served.batcher.submit(_Infer(images, time.monotonic() + limit, request, served, plan))

    def _other(self, request: Request) -> Coroutine[Any, Any, None] | None:
        method = b"GET" if request.method == b"HEAD" else request.method
        parts = unquote_to_bytes(request.path[:2048]).decode("utf-8", "replace").strip("/").split("/")
        match parts:
            case ["v2", "health", "live"]:
                request.route = "health"
                _must(method, b"GET")
                request.reply(200, b"")
                return None
            case ["v2", "health", "ready"]:
                request.route = "health"
                _must(method, b"GET")
                complete = all(place.served is not None or not place.wanted for place in self._models.places)
                request.reply(200 if self.ready and complete else 503, b"")
                return None
        self._allowed(request, admin=parts[:2] == ["v2", "repository"] and parts[2:] != ["index"])
        match parts:
            case ["v2"]:
                _must(method, b"GET")
                self._give(request, {"name": "fdml", "version": fdml.__version__, "extensions": self._extensions})
            case ["v2", "models", "stats"]:
                _must(method, b"GET")
                self._give(request, {"model_stats": [about.stats(served) for served in self._models]})
            case ["v2", "models", name, *rest]:
                self._model(request, method, name, rest)
            case ["v2", "repository", *rest] if self._config.allow_admin:
                request.route = "repository"
                _must(method, b"POST")
                return self._guarded(request, self._repository(request, rest))
            case ["v2", "repository", *_]:
                raise Problem(403, "the model repository can be changed only where the server runs with --allow-admin")
            case ["v1", "models"]:
                _must(method, b"GET")
                self._give(request, {"models": [about.described(served) for served in self._models]})
            case ["v1", "models", name]:
                _must(method, b"GET")
                self._give(request, about.described(self._find(name, None)))
            case ["v1", "models", name, "classify"]:
                _must(method, b"POST")
                return self._guarded(request, self._held(request, self._find(name, None)))
            case ["v1", "models", name, "versions", version, "classify"]:
                _must(method, b"POST")
                return self._guarded(request, self._held(request, self._find(name, version)))
            case ["metrics"]:
                request.route = "metrics"
                _must(method, b"GET")
                self._measure()
                request.reply(200, self._metrics.text(), KIND)
            case ["openapi.json"] | ["docs"] | [""]:
                _must(method, b"GET")
                from fdml.serve import openapi

                if parts == ["openapi.json"]:
                    self._give(request, openapi.document(self._config.allow_admin))
                else:
                    request.reply(200, openapi.page(self._models, self._config.allow_admin), _HTML, _PAGE_RULES)
            case _:
                raise Problem(404, "nothing is at this address; /docs lists what is")
        return None

    @property
    def _extensions(self) -> list[str]:
        return [*EXTENSIONS, *(["model_repository"] if self._config.allow_admin else [])]

    def _model(self, request: Request, method: bytes, name: str, rest: list[str]) -> None:
        version = None
        if rest[:1] == ["versions"] and len(rest) > 1:
            version, rest = rest[1], rest[2:]
        if rest == ["ready"]:
            _must(method, b"GET")
            try:
                self._models.find(name, version)
            except InputError:
                request.reply(404 if name not in {place.of.called for place in self._models.places} else 503, b"")
            else:
                request.reply(200, b"")
            return
        served = self._find(name, version)
        match rest:
            case []:
                _must(method, b"GET")
                self._give(request, about.metadata(served, sorted(self._models.ready[name])))
            case ["config"]:
                _must(method, b"GET")
                self._give(request, about.model_config(served, self._config))
            case ["stats"]:
                _must(method, b"GET")
                self._give(request, {"model_stats": [about.stats(served)]})
            case ["infer"]:
                _must(method, b"POST")
                self._infer(request, served)  # its address was written otherwise than usual
            case _:
                raise Problem(404, "nothing is at this address; /docs lists what is")

    async def _repository(self, request: Request, rest: list[str]) -> None:
        match rest:
            case ["index"]:
                only = _index_wish(request.body)
                states = [about.state(place) for place in self._models.places if place.served or not only]
                self._give(request, states)
            case ["models", name, ("load" | "unload") as verb]:
                try:
                    places = self._models.named(name)
                except InputError as error:
                    raise Problem(404, str(error)) from None
                for place in places:
                    if verb == "unload":
                        await self._models.unload(place)
                        continue
                    try:
                        await self._models.load(place)
                    except (InputError, ImportError) as error:
                        self._log.event("load failed", level="error", model=name, reason=str(error))
                        raise Problem(400, f"{name} could not be loaded; the server's log says why") from None
                self._log.event(verb, model=name)
                request.reply(200, b"")
            case _:
                raise Problem(404, "nothing is at this address; /docs lists what is")

    def _find(self, name: str, version: str | None) -> Served:
        try:
            return self._models.find(name, version)
        except InputError as error:
            raise Problem(404, str(error)) from None

    # Images for people and applications ------------------------------------------------------------------------------

    async def _held(self, request: Request, served: Served) -> None:
        """``_classify`` by a model that stays until the end, whatever takes its place meanwhile."""
        served.holders += 1
        try:
            await self._classify(request, served)
        finally:
            served.holders -= 1

    async def _classify(self, request: Request, served: Served) -> None:
        request.route, request.model = "classify", served.name
        options = _options(request.query)
        top_k = _number(options, "top_k", 1, len(served.classifier.classes), whole=True) or 3
        top_k = min(int(top_k), len(served.classifier.classes))
        limit = self._config.deadline_seconds
        timeout = _number(options, "timeout_ms", 1, 86_400_000)
        deadline = time.monotonic() + (limit if timeout is None else min(limit, timeout / 1000))
        radius = _number(options, "certify", 0, 1e6)
        samples = _number(options, "samples", 100, self._config.certify.max_samples, whole=True)
        norm = norm_for(served, options.pop("norm", None)) if radius is not None else None
        hint = options.pop("suspect", "true")
        if hint not in ("true", "false"):
            raise Problem(400, f"suspect={hint[:20]!r}: it is true or false")
        if options:
            raise Problem(
                400, f"unknown option {min(options)[:40]!r}: top_k, certify, norm, samples, suspect, timeout_ms"
            )

        content = picture(request)
        if self._decoding >= _PICTURES:
            raise Full(1.0)
        self._decoding += 1
        try:
            loop = asyncio.get_running_loop()
            images = await loop.run_in_executor(self._pictures, decoded, content, served.shape)
        finally:
            self._decoding -= 1
        if request.gone:
            return
        waits = [_Answer.of(served.batcher, images, deadline, request)]
        if served.teacher is not None and hint == "true":
            waits.append(_Answer.of(served.teacher, images, deadline, request))
        certificate = None
        if radius is not None and norm is not None:
            certificate = asyncio.ensure_future(
                self._trust.certify(
                    served, images[0], radius, norm, int(samples or self._config.certify.max_samples), deadline, request
                )
            )
        try:
            rows = [await wait for wait in waits]
        except BaseException:
            if certificate is not None:
                certificate.cancel()
            raise
        logits, probabilities = rows[0]
        order = np.argsort(-logits[0], kind="stable").tolist()
        classes = served.classifier.classes
        answer: dict[str, Any] = {
            "model": served.name,
            "version": served.version,
            "weights": served.weights,
            "label": classes[order[0]],
            "index": order[0],
            "probability": float(probabilities[0, order[0]]),
            "top": [
                {"label": classes[i], "index": i, "probability": float(probabilities[0, i])} for i in order[:top_k]
            ],
            "probabilities": probabilities[0].tolist(),
        }
        if len(rows) > 1:
            answer["suspect"] = float(suspicion(logits, rows[1][0])[0])
        if certificate is not None:
            found = await certificate
            answer["certified"] = found
            outcome = "certified" if found["holds"] else "smaller" if found["radius"] > 0 else "abstained"
            self._metrics.certificates[served.name, found["norm"], outcome] += 1
        self._give(request, answer)

    async def _guarded(self, request: Request, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:
            self._answer_error(request, error)

    def _give(self, request: Request, value: Any) -> None:
        request.reply(200, _json(value))

    def _measure(self) -> None:
        self._metrics.gauges = {
            "queue_images": {
                name: float(sum(served.batcher.waiting for served in versions.values()))
                for name, versions in self._models.ready.items()
            },
            "versions_ready": {name: float(len(versions)) for name, versions in self._models.ready.items()},
        }


class _Infer(Job):
    """A request of the protocol in the queue."""

    __slots__ = ("_plan", "_request", "_served")

    def __init__(self, images: np.ndarray, deadline: float, request: Request, served: Served, plan: wire.Plan) -> None:
        super().__init__(images, deadline)
        self._request, self._served, self._plan = request, served, plan

    @property
    def gone(self) -> bool:
        return self._request.gone

    def finish(self, logits: np.ndarray, probabilities: np.ndarray) -> None:
        body, extra = self._served.writer.write(self._plan.id, self._plan.wants, logits, probabilities)
        self._request.reply(200, body, b"application/octet-stream" if extra else JSON, extra)

    def fail(self, status: int, message: str) -> None:
        self._request.fail(status, message)


class _Answer(Job):
    """An image in the queue that a coroutine waits for."""

    __slots__ = ("_request", "future")

    def __init__(self, images: np.ndarray, deadline: float, request: Request) -> None:
        super().__init__(images, deadline)
        self._request = request
        self.future: asyncio.Future[tuple[np.ndarray, np.ndarray]] = asyncio.get_running_loop().create_future()

    @classmethod
    def of(cls, batcher: Batcher, images: np.ndarray, deadline: float, request: Request) -> "asyncio.Future[Any]":
        job = cls(images, deadline, request)
        batcher.submit(job)
        return job.future

    @property
    def gone(self) -> bool:
        if self._request.gone and not self.future.done():
            self.future.cancel()
        return self._request.gone

    def finish(self, logits: np.ndarray, probabilities: np.ndarray) -> None:
        if not self.future.done():
            self.future.set_result((logits, probabilities))

    def fail(self, status: int, message: str) -> None:
        if not self.future.done():
            self.future.set_exception(Problem(status, message))


# Small things ---------------------------------------------------------------------------------------------------------


def _must(method: bytes, allowed: bytes) -> None:
    if method != allowed:
        raise Problem(405, f"this address takes {allowed.decode()}", b"allow: " + allowed + b"\r\n")


def _options(query: bytes) -> dict[str, str]:
    if not query:
        return {}
    try:
        pairs = parse_qsl(
            query.decode("ascii"), keep_blank_values=True, strict_parsing=True, errors="strict", max_num_fields=20
        )
    except (ValueError, UnicodeDecodeError):
        raise Problem(400, "the options after ? are not as in ?top_k=3&certify=0.25") from None
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Problem(400, "an option is given twice")
    return found


def _number(options: dict[str, str], name: str, least: float, largest: float, *, whole: bool = False) -> float | None:
    text = options.pop(name, None)
    if text is None:
        return None
    try:
        value = float(int(text)) if whole else float(text)
    except (ValueError, OverflowError):
        value = float("nan")
    if not least <= value <= largest:
        kind = "a whole number" if whole else "a number"
        raise Problem(400, f"{name}={text[:20]!r}: it is {kind} from {least:g} to {largest:g}")
    return value


def _index_wish(body: bytes) -> bool:
    """Whether only models that are ready are asked for."""
    if not body:
        return False
    try:
        return bool(msgspec.json.decode(body, type=dict[str, Any]).get("ready", False))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Problem(400, 'the body is no JSON object such as {"ready": true}') from None
