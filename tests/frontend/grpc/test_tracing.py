"""Spans of requests, as a collector gets them from a real server."""

from __future__ import annotations

import itertools
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

import grpc
import numpy as np
import pytest
from opentelemetry.context import Context
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from blockdex.frontend.grpc.tracing import Tracing
from blockdex.v1 import indexer_pb2 as pb
from blockdex.v1 import indexer_pb2_grpc as pb_grpc
from support.collector import Collector, attributes_of, collecting
from support.serving import SMALL, serve
from support.wire import open_request

WAIT_SECONDS = 0.5
PARENT = bytes(range(1, 9))
SERVICE = "blockdex.v1.IndexerService"
STAGES = ["queue", "plan", "device", "reply"]


def trace(number: int) -> bytes:
    return number.to_bytes(16, "big")


def metadata(number: int, flags: str = "01") -> tuple[tuple[str, str], ...]:
    """Of a call that is part of a trace, sampled or (00) not."""
    return ("traceparent", f"00-{trace(number).hex()}-{PARENT.hex()}-{flags}"), ("x-request-id", f"call-{number}")


def tensor(*shape: int) -> pb.Tensor:
    return pb.Tensor(dtype=pb.DTYPE_FP32, data=np.ones(shape, "<f4").tobytes())


def spans(length: int) -> pb.Spans:
    return pb.Spans(sequence_ids=[1], starts=[0], lengths=[length])


def call_all(address: str) -> tuple[int, int]:
    """Calls of five traces, the fourth not sampled, and one of none; when they began and ended, in Unix nanoseconds."""
    began = time.time_ns()
    with grpc.insecure_channel(address) as channel:
        calls = pb_grpc.IndexerServiceStub(channel)
        calls.OpenSequences(open_request(1), metadata=metadata(1))
        wait = pb.SelectBlocksRequest(layer=2, spans=spans(2), queries=tensor(2, 4, 128), wait_for_keys=True)
        selected = calls.SelectBlocks.future(wait, metadata=metadata(2), timeout=30)
        time.sleep(WAIT_SECONDS)
        append = pb.AppendKeysRequest(layer=2, spans=spans(2), keys=tensor(2, 128))
        stream = calls.Stream(iter([pb.StreamRequest(request_id=7, append_keys=append)]), metadata=metadata(3))
        assert [answer.request_id for answer in stream] == [7]
        assert selected.result(30).block_ids.data
        calls.GetSequence(pb.GetSequenceRequest(sequence_id=1), metadata=metadata(4, "00"))
        with pytest.raises(grpc.RpcError):
            calls.GetSequence(pb.GetSequenceRequest(sequence_id=2), metadata=metadata(5))
        calls.GetInfo(pb.GetInfoRequest())
    return began, time.time_ns()


def check_request(span: Span, number: int, attributes: dict[str, object]) -> None:
    """Whether a request's span is part of its caller's trace and says what it was."""
    assert (span.trace_id, span.parent_span_id, span.kind) == (trace(number), PARENT, Span.SPAN_KIND_SERVER)
    expected = {"rpc.system": "grpc", "rpc.service": SERVICE, "rpc.method": span.name.removeprefix(f"{SERVICE}/")}
    assert attributes_of(span.attributes) == expected | attributes


def check_stages(collector: Collector, span: Span, stages: Sequence[str]) -> list[float]:
    """Seconds of a request's stages, which follow on each other inside of it."""
    below = collector.below(span)
    assert [child.name for child in below] == stages
    times = [span.start_time_unix_nano]
    for child in below:
        assert times[-1] <= child.start_time_unix_nano <= child.end_time_unix_nano
        times.append(child.end_time_unix_nano)
    assert times[-1] <= span.end_time_unix_nano
    for earlier, later in itertools.pairwise(below):
        assert earlier.end_time_unix_nano == later.start_time_unix_nano
    return [(child.end_time_unix_nano - child.start_time_unix_nano) / 1e9 for child in below]


def check_calls(collector: Collector, began: int, ended: int) -> None:
    """Whether the spans of what `call_all` has sampled are there."""
    (opened,), (selected,) = collector.named("/OpenSequences"), collector.named("/SelectBlocks")
    (appended,), (refused,) = collector.named("/Stream/AppendKeys"), collector.named("/GetSequence")
    tokens = {"blockdex.layer": 2, "blockdex.spans": 1, "blockdex.tokens": 2}
    told: dict[str, object] = {"blockdex.phase": "sequence", "blockdex.request_id": "call-1", "rpc.grpc.status_code": 0}
    check_request(opened, 1, told)
    check_request(selected, 2, told | tokens | {"blockdex.phase": "decode", "blockdex.request_id": "call-2"})
    check_request(appended, 3, told | tokens | {"blockdex.phase": "append", "blockdex.request_id": "call-3/7"})
    check_request(refused, 5, told | {"blockdex.request_id": "call-5", "rpc.grpc.status_code": 5})
    assert refused.status.code == Status.STATUS_CODE_UNSET  # the caller's own mistake
    check_stages(collector, opened, ["queue", "plan", "reply"])
    check_stages(collector, appended, STAGES)
    queue, *others = check_stages(collector, selected, STAGES)
    assert WAIT_SECONDS / 5 < queue < WAIT_SECONDS + 10  # on a busy machine it sets out late
    assert 0 < sum(others) < 10
    slack = 100_000_000  # two clocks are read, one after the other
    for span in collector.spans:
        assert began - slack < span.start_time_unix_nano <= span.end_time_unix_nano < ended + slack


@pytest.mark.parametrize("processes", ["single", "split"])
def test_requests_are_part_of_their_callers_traces(processes: str) -> None:
    """Each mode with another way to say where spans go; of traces that begin here, one records all, the other none."""
    with collecting() as collector:
        endpoint = f"http://{collector.address}"
        if processes == "split":
            flags, variables, untraced = ("--otlp-endpoint", endpoint), {}, 1
        else:
            flags, variables, untraced = ("--trace-ratio", "0"), {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}, 0
        with serve(*SMALL, "--processes", processes, *flags, **variables) as server:
            began, ended = call_all(server.grpc_address)
            assert server.stop() == 0
        # What was not sent before is sent at the end.
        check_calls(collector, began, ended)
    assert len(collector.named("/GetInfo")) == untraced
    assert all(span.parent_span_id == b"" for span in collector.named("/GetInfo"))
    assert trace(4) not in {span.trace_id for span in collector.spans}
    assert {resource["service.name"] for resource in collector.resources} == {"blockdex"}


def test_a_collector_that_does_not_answer_holds_up_nobody() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        tracing = Tracing(f"http://127.0.0.1:{deaf.getsockname()[1]}", ratio=1.0)
        now = time.monotonic()
        tracing.answered("GetInfo", "INTERNAL", (now, now), Context(), "call-1", None)
        tracing.close(grace=0.3)
        assert 0.3 <= time.monotonic() - now < 2


def test_a_fault_of_the_server_is_an_error() -> None:
    with collecting() as collector:
        tracing = Tracing(f"http://{collector.address}", ratio=1.0)
        now = time.monotonic()
        for code in ("INTERNAL", "NOT_FOUND"):
            tracing.answered(code, code, (now - 1.0, now), tracing.parent_of([("traceparent", "rubbish")]), "", None)
        tracing.close(grace=10)
    statuses = {span.name: (span.status.code, span.parent_span_id) for span in collector.spans}
    assert statuses == {
        f"{SERVICE}/INTERNAL": (Status.STATUS_CODE_ERROR, b""),
        f"{SERVICE}/NOT_FOUND": (Status.STATUS_CODE_UNSET, b""),
    }
    assert all(span.end_time_unix_nano - span.start_time_unix_nano == pytest.approx(1e9) for span in collector.spans)


def test_nothing_of_it_is_loaded_unless_it_is_wanted() -> None:
    code = (
        "import sys, blockdex.server.frontend_process; print([name for name in sys.modules if 'opentelemetry' in name])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n"


def test_a_missing_package_is_told_before_anything_starts() -> None:
    code = (
        "import sys; sys.modules['opentelemetry.sdk'] = None\n"
        "from blockdex.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "serve", "--otlp-endpoint", "http://127.0.0.1:4317"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "'opentelemetry.sdk' is missing: pip install 'blockdex[server,tracing]'" in done.stderr
