"""Spans of requests for OpenTelemetry, made of their time stamps once they are answered; loaded only if configured."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable

import grpc
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from blockdex.contract.errors import Code
from blockdex.contract.messages import STAGES
from blockdex.contract.version import VERSION
from blockdex.ring.caller import CameTo
from blockdex.v1 import indexer_pb2 as pb

_SERVICE = pb.DESCRIPTOR.services_by_name["IndexerService"].full_name
_PROPAGATED = ("traceparent", "tracestate")
_QUEUED_SPANS = 16384
"""Spans that wait for the collector; more are dropped, and the log says so."""

_SERVER_FAULTS = frozenset(("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"))
"""Codes that make a server's span an error, by OpenTelemetry's conventions for gRPC; others are the caller's."""


class Tracing:
    """Makes spans and sends them to a collector, from a thread of its own.

    Args:
        endpoint: of a collector that speaks OTLP over gRPC, `http://host:port` or, with TLS, `https://host:port`.
        ratio: share of traces to record, 0 to 1, of those that begin here; what a caller began is its decision.
    """

    def __init__(self, endpoint: str, ratio: float) -> None:
        name = os.environ.get("OTEL_SERVICE_NAME", "blockdex")
        resource = Resource.create({SERVICE_NAME: name, SERVICE_VERSION: VERSION, "process.pid": os.getpid()})
        self._provider = TracerProvider(
            sampler=ParentBasedTraceIdRatio(ratio), resource=resource, shutdown_on_exit=False
        )
        exporter = OTLPSpanExporter(endpoint=endpoint)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=_QUEUED_SPANS))
        self._tracer = self._provider.get_tracer("blockdex", VERSION)
        self._propagator = TraceContextTextMapPropagator()

    def parent_of(self, metadata: Iterable[tuple[str, str | bytes]]) -> Context:
        """The caller's own span, as `traceparent` of the W3C names it; none where it is missing or malformed."""
        carrier = {key: str(value) for key, value in metadata if key in _PROPAGATED}
        return self._propagator.extract(carrier, Context())

    def answered(
        self,
        rpc: str,
        code: str,
        times: tuple[float, float],
        parent: Context,
        request_id: str,
        came_to: CameTo | None,
    ) -> None:
        """Makes the span of one answered request, and below it those of the engine's stages.

        Args:
            rpc: the method's name; one on a stream as `Stream/AppendKeys`.
            code: name of the canonical code it was answered with.
            times: `time.monotonic` seconds of its arrival and its answer.
            parent: what it is part of.
            request_id: under which the log tells of it.
            came_to: what it came to in the engine, where it got that far.
        """
        # Anew each time: the clock of the day is set now and then.
        epoch = time.time_ns() - time.monotonic_ns()
        began, ended = (epoch + round(seconds * 1e9) for seconds in times)
        attributes: dict[str, AttributeValue] = {
            "rpc.system": "grpc",
            "rpc.service": _SERVICE,
            "rpc.method": rpc,
            "blockdex.request_id": request_id,
        }
        span = self._tracer.start_span(f"{_SERVICE}/{rpc}", parent, SpanKind.SERVER, attributes, start_time=began)
        if span.is_recording():
            span.set_attribute("rpc.grpc.status_code", _code_number(code))
            if code in _SERVER_FAULTS:
                span.set_status(StatusCode.ERROR, code)
            if came_to is not None:
                self._tell_of_engine(span, epoch, came_to)
        span.end(ended)

    def _tell_of_engine(self, span: Span, epoch: int, came_to: CameTo) -> None:
        if came_to.spans:
            span.set_attribute("blockdex.layer", came_to.layer)
            span.set_attribute("blockdex.spans", came_to.spans)
            span.set_attribute("blockdex.tokens", came_to.tokens)
        if not came_to.stage_seconds:
            return
        span.set_attribute("blockdex.phase", came_to.phase)
        inside, at = set_span_in_context(span, Context()), came_to.received
        for stage in STAGES:
            if stage in came_to.stage_seconds:
                child = self._tracer.start_span(stage, inside, start_time=epoch + round(at * 1e9))
                at += came_to.stage_seconds[stage]
                child.end(epoch + round(at * 1e9))

    def close(self, grace: float) -> None:
        """Sends what is left, for `grace` seconds at most; the rest is lost."""
        # The SDK waits for a collector that does not answer as long as one export may take.
        flushing = threading.Thread(target=self._provider.shutdown, name="blockdex-tracing-end", daemon=True)
        flushing.start()
        flushing.join(grace)


def _code_number(name: str) -> int:
    return int(grpc.StatusCode.OK.value[0]) if name == "OK" else int(Code[name])
