"""A collector of spans on a real port, as the servers under test see one: OTLP over gRPC."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service_pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service_grpc
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span


@dataclass
class Collector(service_grpc.TraceServiceServicer):
    """Keeps what it is sent.

    Attributes:
        address: `host:port` where it listens.
        spans: every span so far, in order of arrival.
        resources: what sent them, with its attributes, one each export.
    """

    address: str = ""
    spans: list[Span] = field(default_factory=list)
    resources: list[dict[str, str | int | float]] = field(default_factory=list)

    def Export(  # noqa: N802 - the contract's name
        self, request: service_pb.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> service_pb.ExportTraceServiceResponse:
        """Takes spans."""
        for resource in request.resource_spans:
            self.resources.append(attributes_of(resource.resource.attributes))
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        return service_pb.ExportTraceServiceResponse()

    def named(self, name: str) -> list[Span]:
        """Spans whose name ends so."""
        return [span for span in self.spans if span.name.endswith(name)]

    def below(self, parent: Span) -> list[Span]:
        """Spans of the same trace right below one, in order of time."""
        inside = [
            span for span in self.spans if (span.trace_id, span.parent_span_id) == (parent.trace_id, parent.span_id)
        ]
        return sorted(inside, key=lambda span: span.start_time_unix_nano)


def attributes_of(pairs: Iterable[KeyValue]) -> dict[str, str | int | float]:
    """Attributes as plain values."""
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value") or "string_value") for pair in pairs}


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    """Runs a collector on a free port of the loopback."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    service_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(0).wait(5)
