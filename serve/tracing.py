"""OpenTelemetry, where the extra ``otel`` is installed: a span for each answered request.

Where it goes is said by the standard variables of the environment, such as OTEL_EXPORTER_OTLP_ENDPOINT.
"""

import time

from fdml.errors import InputError
from fdml.serve.http import Request


class Tracing:
    """Writes spans; they are sent in the background. Raises ``InputError`` where the packages are missing."""

    def __init__(self) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace import SpanKind
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ModuleNotFoundError:
            raise InputError("tracing needs OpenTelemetry: pip install 'fdml[otel]'") from None
        self._provider = TracerProvider(resource=Resource.create({"service.name": "fdml"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("fdml.serve")
        self._kind = SpanKind.SERVER
        self._context = TraceContextTextMapPropagator()

    def request(self, request: Request, status: int) -> None:
        """The span of a request that was answered just now; it goes on where the client's ``traceparent`` began."""
        end = time.time_ns()
        began = end - int(1e9 * (time.perf_counter() - request.began))
        given = {
            name: request.headers[name.encode()].decode("latin-1")
            for name in ("traceparent", "tracestate")
            if name.encode() in request.headers
        }
        span = self._tracer.start_span(
            f"{request.method.decode('latin-1')} {request.route}",
            context=self._context.extract(given),
            kind=self._kind,
            start_time=began,
            attributes={
                "http.request.method": request.method.decode("latin-1"),
                "http.response.status_code": status,
                "http.route": request.route,
                "fdml.model": request.model,
                "fdml.request_id": request.id.decode("ascii"),
            },
        )
        span.end(end)

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()
