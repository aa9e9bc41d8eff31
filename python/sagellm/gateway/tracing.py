"""OpenTelemetry spans: one per HTTP request, and below it one per request of the engine.

Optional: without an endpoint nothing here runs, and the packages are imported only with one. The
names of attributes follow the semantic conventions for HTTP servers and generative AI. Prompts and
answers are never part of a span. Spans are sent by a thread of the library, and dropped when the
collector does not keep up.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from sagellm import __version__
from sagellm.errors import InvalidArgumentError, UnsupportedError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

    from sagellm.engine.output import Finished, SequenceOutput
    from sagellm.gateway.context import RequestContext
    from sagellm.gateway.observer import RequestObserver, RequestRecord

TRACES_PATH = "/v1/traces"
_PROBES = frozenset({"/health", "/ready", "/ping", "/metrics"})
_SERVICE = "sagellm"
_PATIENCE_S = 3.0


def open_tracing(endpoint: str) -> RequestObserver:
    """An observer that sends spans to a collector.

    Args:
        endpoint: Base URL of the collector, or the whole URL for traces. Further settings are the
            usual ``OTEL_`` variables of the environment.

    Raises:
        InvalidArgumentError: The endpoint is no URL.
        UnsupportedError: The packages are missing.
    """
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise InvalidArgumentError(
            f"the OTLP endpoint is {endpoint!r}; give a URL such as http://127.0.0.1:4318"
        )
    url = endpoint.rstrip("/")
    if not url.endswith(TRACES_PATH):
        url += TRACES_PATH
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise _missing(error) from error
    return SpanObserver(OTLPSpanExporter(endpoint=url))


def _missing(error: ImportError) -> UnsupportedError:
    return UnsupportedError(
        f"tracing needs OpenTelemetry, which is not installed ({error.name}); install it with "
        "pip install 'sagellm[otel]', or leave out --otlp-endpoint"
    )


class SpanObserver:
    """Makes spans as a ``RequestObserver``."""

    def __init__(self, exporter: SpanExporter, *, in_background: bool = True) -> None:
        """Prepares for spans.

        Args:
            exporter: Where they go.
            in_background: Send them from a thread; otherwise each one as it ends.

        Raises:
            UnsupportedError: The packages are missing.
        """
        try:
            from opentelemetry import trace
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise _missing(error) from error
        # What OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say goes before this name.
        resource = Resource.create({"service.name": _SERVICE})
        resource = resource.merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        processor = BatchSpanProcessor if in_background else SimpleSpanProcessor
        self._provider.add_span_processor(processor(exporter))
        self._tracer = self._provider.get_tracer(_SERVICE, __version__)
        self._trace = trace
        self._propagator = TraceContextTextMapPropagator()
        self._servers: dict[str, Span] = {}  # by HTTP request
        self._engine: dict[int, tuple[Span, list[Finished], list[int]]] = {}

    def request_started(self, record: RequestRecord) -> None:
        """The engine took a request."""
        context, request = record.context, record.request
        server = self._servers.get(context.request_id)
        if server is None:
            server = self._servers[context.request_id] = self._open_server(context)
        is_chat = request.messages is not None
        operation = "chat" if is_chat else "text_completion"
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": _SERVICE,
            "gen_ai.request.model": request.model,
            "gen_ai.request.max_tokens": request.max_tokens,
            "gen_ai.request.temperature": request.temperature or 0.0,
            "gen_ai.request.choice.count": request.sampling.n,
            "gen_ai.response.id": request.request_id,
            "gen_ai.usage.input_tokens": record.num_prompt_tokens,
        }
        if request.top_p is not None:
            attributes["gen_ai.request.top_p"] = request.top_p
        span = self._tracer.start_span(
            f"{operation} {request.model}",
            context=self._trace.set_span_in_context(server),
            attributes=attributes,
        )
        self._engine[record.key] = (span, [], [])

    def output(self, record: RequestRecord, output: SequenceOutput) -> None:
        """New output of one sequence."""
        if output.finished is not None and record.key in self._engine:
            _, ends, cached = self._engine[record.key]
            ends.append(output.finished)
            cached.append(output.num_cached_tokens)

    def request_finished(self, record: RequestRecord, *, cancelled: bool) -> None:
        """A request is over."""
        entry = self._engine.pop(record.key, None)
        if entry is None:
            return
        span, ends, cached = entry
        reasons = [end.reason for end in ends] + (["abort"] if cancelled else [])
        span.set_attribute("gen_ai.response.finish_reasons", reasons)
        span.set_attribute("gen_ai.usage.output_tokens", sum(len(end.token_ids) for end in ends))
        if cached:
            span.set_attribute("gen_ai.usage.cache_read.input_tokens", max(cached))
        stages = next((end.timestamps for end in ends if end.timestamps is not None), None)
        if stages is not None:
            span.set_attribute("sagellm.queue_ms", stages.queue_ms)
            span.set_attribute("sagellm.ttft_ms", stages.ttft_ms)
            span.add_event("first token", timestamp=int(stages.executed_at * 1e9))
        failure = next((end.failure for end in ends if end.failure is not None), None)
        if failure is not None:
            self._fail(span, str(failure.code.value))
        span.end()

    def request_rejected(self, context: RequestContext, status: int) -> None:
        """The engine did not take a request; the HTTP request's span tells."""

    def http_finished(self, context: RequestContext) -> None:
        """An HTTP request is over."""
        span = self._servers.pop(context.request_id, None)
        if span is None:
            if context.route in _PROBES:
                return
            span = self._open_server(context)
        if context.pattern is not None:
            span.set_attribute("http.route", context.pattern)
        span.set_attribute("http.response.status_code", context.status)
        if context.error is not None:
            span.set_attribute("sagellm.error", context.error)
        if context.status >= 500:
            self._fail(span, context.error or str(context.status))
        span.end()

    def close(self) -> None:
        """Sends what is left, unless the collector does not take it in time."""
        last = threading.Thread(target=self._provider.shutdown, daemon=True)
        last.start()
        last.join(_PATIENCE_S)

    def _open_server(self, context: RequestContext) -> Span:
        carrier = {} if context.traceparent is None else {"traceparent": context.traceparent}
        attributes: dict[str, Any] = {
            "http.request.method": context.method,
            "url.path": context.route,
            "sagellm.request_id": context.request_id,
            "sagellm.trace_id": context.trace_id,
        }
        if context.client:
            attributes["client.address"] = context.client
        if context.client_request_id is not None:
            attributes["sagellm.client_request_id"] = context.client_request_id
        return self._tracer.start_span(
            f"{context.method} {context.pattern or context.route}",
            context=self._propagator.extract(carrier),
            kind=self._trace.SpanKind.SERVER,
            attributes=attributes,
            start_time=int(context.arrived_at * 1e9),
        )

    def _fail(self, span: Span, kind: str) -> None:
        span.set_attribute("error.type", kind)
        span.set_status(self._trace.Status(self._trace.StatusCode.ERROR))
