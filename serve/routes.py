"""What the server answers: which address is whose, who may ask, and each answer."""

import asyncio
import hashlib
import hmac
import time
import zlib
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import parse_qsl, unquote_to_bytes

import msgspec
import numpy as np

import fdml
from fdml.errors import InputError
from fdml.pixels import Intake
from fdml.serve import wire
from fdml.serve.batcher import Full, Job
from fdml.serve.config import Config, TokenConfig
from fdml.serve.http import Request
from fdml.serve.log import Log
from fdml.serve.metrics import KIND, Metrics
from fdml.serve.model import Place, Repository, Served
from fdml.serve.trust import Trust, norm_for
from fdml.suspicion import suspicion

EXTENSIONS = ["binary_tensor_data", "classification", "statistics"]
_HTML = b"text/html; charset=utf-8"
_PAGE_RULES = (
    b"content-security-policy: default-src 'none'; style-src 'unsafe-inline'\r\nx-content-type-options: nosniff\r\n"
)
_json = msgspec.json.Encoder().encode


class Problem(Exception):  # noqa: N818 — it is an answer
    """An error that a client is told: an HTTP status and one line."""

    def __init__(self, status: int, message: str, extra: bytes = b"") -> None:
        super().__init__(message)
        self.status, self.extra = status, extra


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
            case wire.WireError() | InputError():
                request.fail(400, str(error))
            case _:
                self._log.defect(request, error)
                request.fail(500, f"a defect of the server; its log has more under the id {request.id.decode()}")

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
        body = request.body if coding is None else _inflated(request.body, coding, served.reader.most)
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
                self._give(request, {"model_stats": [_stats(served) for served in self._models]})
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
                self._give(request, {"models": [_described(served) for served in self._models]})
            case ["v1", "models", name]:
                _must(method, b"GET")
                self._give(request, _described(self._find(name, None)))
            case ["v1", "models", name, "classify"]:
                _must(method, b"POST")
                return self._guarded(request, self._classify(request, self._find(name, None)))
            case ["v1", "models", name, "versions", version, "classify"]:
                _must(method, b"POST")
                return self._guarded(request, self._classify(request, self._find(name, version)))
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
                self._give(request, _metadata(served, sorted(self._models.ready[name])))
            case ["config"]:
                _must(method, b"GET")
                self._give(request, _model_config(served, self._config))
            case ["stats"]:
                _must(method, b"GET")
                self._give(request, {"model_stats": [_stats(served)]})
            case ["infer"]:
                _must(method, b"POST")
                self._infer(request, served)  # its address was written otherwise than usual
            case _:
                raise Problem(404, "nothing is at this address; /docs lists what is")

    async def _repository(self, request: Request, rest: list[str]) -> None:
        match rest:
            case ["index"]:
                only = _index_wish(request.body)
                states = [_state(place) for place in self._models.places if place.served or not only]
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

        content = _picture(request)
        if self._decoding >= 256:
            raise Full(1.0)
        self._decoding += 1
        try:
            decode = asyncio.get_running_loop().run_in_executor(self._pictures, _decoded, content, served.shape)
            images = await decode
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
            "queue_images": {served.name: float(served.batcher.waiting) for served in self._models},
            "model_ready": {
                place.of.called: float(place.served is not None) for place in self._models.places if place.wanted
            },
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
        self._served.answered += len(logits)
        body, extra = self._served.writer.write(self._plan.id, self._plan.wants, logits, probabilities)
        self._request.reply(200, body, b"application/octet-stream" if extra else b"application/json", extra)

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
    def of(cls, batcher: Any, images: np.ndarray, deadline: float, request: Request) -> "asyncio.Future[Any]":
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


def _inflated(body: bytes, coding: bytes, limit: int) -> bytes:
    """The body of a compressed request, which may not grow beyond ``limit`` bytes."""
    kinds = {b"gzip": 31, b"deflate": 15, b"identity": 0}
    name = coding.strip().lower()
    if name not in kinds:
        raise Problem(415, "the body can be compressed by gzip or deflate")
    if name == b"identity":
        return body
    reader = zlib.decompressobj(kinds[name])
    try:
        found = reader.decompress(body, limit + 1)
    except zlib.error:
        raise Problem(400, f"the body is not compressed by {name.decode()}") from None
    if len(found) > limit:
        raise Problem(413, f"the body is larger than the {limit} bytes that are taken")
    if not reader.eof:
        raise Problem(400, "the compressed body is cut off")
    return found


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


def _picture(request: Request) -> bytes:
    """The image file in the body, or in the part ``image`` of a form."""
    kind = request.headers.get(b"content-type", b"")
    if request.headers.get(b"content-encoding", b"identity") != b"identity":
        raise Problem(415, "an image is compressed already: send it without a content-encoding")
    form = kind.lower().startswith(b"multipart/form-data")
    content = _part(kind, request.body) if form else request.body
    if not content:
        raise Problem(400, "the body is empty: send a PNG, JPEG, WebP or BMP file, or a form with one called image")
    return content


def _part(kind: bytes, body: bytes) -> bytes:
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import MultipartParser, parse_options_header

    boundary = parse_options_header(kind)[1].get(b"boundary")
    if not boundary or len(boundary) > 256:
        raise Problem(400, "the form has no boundary, or one that is too long")
    parts: list[tuple[bytearray, bytearray, bytearray]] = []  # a header's name and value, and the content
    names: list[bytes] = []

    def begin() -> None:
        if len(parts) >= 16:
            raise Problem(400, "the form has more than 16 parts")
        parts.append((bytearray(), bytearray(), bytearray()))
        names.append(b"")

    def end_header() -> None:
        name, value, _ = parts[-1]
        if bytes(name).lower() == b"content-disposition":
            names[-1] = parse_options_header(bytes(value))[1].get(b"name", b"")
        name.clear()
        value.clear()

    def field(place: int) -> Any:
        def add(data: bytes, start: int, end: int) -> None:
            if place < 2 and len(parts[-1][place]) > 4096:
                raise Problem(400, "a part of the form has a head that is too large")
            parts[-1][place].extend(data[start:end])

        return add

    calls: Any = {
        "on_part_begin": begin,
        "on_header_field": field(0),
        "on_header_value": field(1),
        "on_header_end": end_header,
        "on_part_data": field(2),
    }
    try:
        parser = MultipartParser(boundary, calls)
        parser.write(body)
        parser.finalize()
    except FormParserError:
        raise Problem(400, "the form is not as multipart/form-data has it") from None
    found = [bytes(content) for name, (_, _, content) in zip(names, parts, strict=True) if name in (b"image", b"file")]
    if len(found) != 1:
        raise Problem(400, f"the form has {len(found)} parts called image; one is needed")
    return found[0]


def _decoded(content: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    return Intake([content], shape).pixels(0, 1)


def _index_wish(body: bytes) -> bool:
    """Whether only models that are ready are asked for."""
    if not body:
        return False
    try:
        return bool(msgspec.json.decode(body, type=dict[str, Any]).get("ready", False))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Problem(400, 'the body is no JSON object such as {"ready": true}') from None


def _state(place: Place) -> dict[str, Any]:
    reason = "" if place.served else ("unloaded" if not place.wanted else "it could not be loaded")
    return {"name": place.of.called, "version": place.of.version, "state": place.state, "reason": reason}


def _described(served: Served) -> dict[str, Any]:
    card = served.classifier.card
    evidence = served.classifier.evidence or {}
    return {
        "name": served.name,
        "version": served.version,
        "weights": served.weights,
        "classes": list(card.classes),
        "input": list(card.input),
        "threat": card.threat,
        "precision": evidence.get("precision"),
        "robust_accuracy": (evidence.get("robust_accuracy") or {}).get("artefact"),
        "provider": served.classifier.provider,
        "certificates": (["l2"] if served.sigma else []) + (["linf"] if served.classifier.has_bounds else []),
        "suspect": served.teacher is not None,
    }


def _tensors(served: Served) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    classes = len(served.classifier.classes)
    outputs: list[dict[str, Any]] = [
        {"name": name, "datatype": "FP32", "shape": [-1, classes]} for name in ("logits", "probabilities")
    ]
    outputs.append({"name": "label", "datatype": "BYTES", "shape": [-1]})
    return {"name": wire.IMAGES, "datatype": "FP32", "shape": [-1, *served.shape]}, outputs


def _metadata(served: Served, versions: list[str]) -> dict[str, Any]:
    images, outputs = _tensors(served)
    return {
        "name": served.name,
        "versions": versions,
        "platform": "onnxruntime_onnx",
        "inputs": [images],
        "outputs": outputs,
    }


def _model_config(served: Served, config: Config) -> dict[str, Any]:
    images, outputs = _tensors(served)

    def tensor(of: dict[str, Any]) -> dict[str, Any]:
        kind = "TYPE_STRING" if of["datatype"] == "BYTES" else "TYPE_" + of["datatype"]
        return {"name": of["name"], "data_type": kind, "dims": of["shape"][1:] or [1]}

    return {
        "name": served.name,
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "max_batch_size": config.batching.largest,
        "input": [tensor(images)],
        "output": [tensor(each) for each in outputs],
        "dynamic_batching": {
            "preferred_batch_size": config.batching.preferred,
            "max_queue_delay_microseconds": round(1000 * config.batching.delay_ms),
        },
    }


def _stats(served: Served) -> dict[str, Any]:
    return {"name": served.name, "version": served.version, "inference_count": served.answered}
