"""Request ids, and what the log says of streams and slow requests."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from blockdex.contract.errors import InternalError
from blockdex.frontend.grpc.status import as_blockdex_error
from blockdex.logs import JsonFormatter
from blockdex.v1 import indexer_pb2 as pb
from blockdex.v1 import indexer_pb2_grpc as pb_grpc
from support.serving import SMALL, Serving, serve
from support.wire import close_request, open_request

TENANT = ("blockdex-tenant", "log")
DRAWN = re.compile("[0-9a-f]{16}")
Lines = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module", params=["single", "split"])
def logging_server(request: pytest.FixtureRequest) -> Iterator[Serving]:
    with serve(*SMALL, "--slow-request-seconds", "0.15", "--processes", request.param) as serving:
        yield serving


@pytest.fixture
def calls(logging_server: Serving) -> Iterator[pb_grpc.IndexerServiceStub]:
    with grpc.insecure_channel(logging_server.grpc_address) as channel:
        yield pb_grpc.IndexerServiceStub(channel)


@pytest.fixture
def lines(logging_server: Serving) -> Lines:
    """Waits for so many lines with an event and the fields given."""

    def find(count: int, event: str, **fields: Any) -> list[dict[str, Any]]:
        deadline = time.monotonic() + 10
        while True:
            said = [json.loads(line) for line in logging_server.output]
            found = [line for line in said if {"event": event, **fields}.items() <= line.items()]
            if len(found) >= count:
                return found
            assert time.monotonic() < deadline, "the log has no such line:\n" + "\n".join(logging_server.output)
            time.sleep(0.02)

    return find


def tensor(*shape: int) -> pb.Tensor:
    return pb.Tensor(dtype=pb.DTYPE_FP32, data=np.full(shape, 0.4375, "<f4").tobytes())


def waiting(sequence: int, tokens: int = 1) -> pb.SelectBlocksRequest:
    """A selection of which the keys never come."""
    spans = pb.Spans(sequence_ids=[sequence], starts=[8000], lengths=[tokens])
    return pb.SelectBlocksRequest(layer=1, spans=spans, queries=tensor(tokens, 4, 128), wait_for_keys=True)


def request_id(call: grpc.Call | grpc.RpcError) -> str:
    assert isinstance(call, grpc.Call)
    (found,) = [value for key, value in call.trailing_metadata() if key == "x-request-id"]
    return str(found)


def test_the_id_that_a_caller_sends_comes_back(calls: pb_grpc.IndexerServiceStub) -> None:
    metadata = (TENANT, ("x-request-id", "trace-7/step:12"))
    for answered in (
        calls.GetInfo.with_call(pb.GetInfoRequest(), metadata=metadata)[1],
        calls.OpenSequences.with_call(open_request(1), metadata=metadata)[1],
    ):
        assert request_id(answered) == "trace-7/step:12"
    with pytest.raises(grpc.RpcError) as refused:
        calls.GetSequence(pb.GetSequenceRequest(sequence_id=99), metadata=metadata)
    assert request_id(refused.value) == "trace-7/step:12"
    assert "grpc-status-details-bin" in {entry.key for entry in refused.value.trailing_metadata()}


@pytest.mark.parametrize("sent", (None, "", "two words", "x" * 129))
def test_another_id_is_drawn(calls: pb_grpc.IndexerServiceStub, sent: str | None) -> None:
    metadata = (TENANT,) if sent is None else (TENANT, ("x-request-id", sent))
    ids = {request_id(calls.GetInfo.with_call(pb.GetInfoRequest(), metadata=metadata)[1]) for _ in range(3)}
    assert len(ids) == 3
    assert all(DRAWN.fullmatch(drawn) for drawn in ids)


def test_a_stream_is_told_when_it_opens_and_closes(calls: pb_grpc.IndexerServiceStub, lines: Lines) -> None:
    requests = [pb.StreamRequest(request_id=number) for number in (1, 2)]
    stream = calls.Stream(iter(requests), metadata=(TENANT, ("x-request-id", "stream-1")))
    assert len(list(stream)) == 2
    assert request_id(stream) == "stream-1"
    (opened,) = lines(1, "stream opened", request_id="stream-1")
    (closed,) = lines(1, "stream closed", request_id="stream-1")
    for line in (opened, closed):
        assert (line["level"], line["tenant"]) == ("info", "log")
        assert re.fullmatch(r"ipv4:127\.0\.0\.1:\d+", line["peer"])
    assert (closed["requests"], closed["errors"]) == (2, 2)
    assert 0 <= closed["seconds"] < 10


def test_a_stream_of_a_bad_tenant_is_not_opened(calls: pb_grpc.IndexerServiceStub, lines: Lines) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        list(calls.Stream(iter(()), metadata=(("blockdex-tenant", ""), ("x-request-id", "stream-2"))))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert request_id(refused.value) == "stream-2"
    assert lines(0, "stream opened", request_id="stream-2") == []


def test_a_slow_request_is_told_with_its_time_in_each_stage(calls: pb_grpc.IndexerServiceStub, lines: Lines) -> None:
    calls.OpenSequences(open_request(2), metadata=(TENANT,))
    spans = pb.Spans(sequence_ids=[2], starts=[0], lengths=[40])
    request = pb.SelectBlocksRequest(layer=0, spans=spans, queries=tensor(40, 4, 128), wait_for_keys=True)
    selected = calls.SelectBlocks.future(request, metadata=(TENANT, ("x-request-id", "slow-1")), timeout=60)
    time.sleep(0.5)
    calls.AppendKeys(pb.AppendKeysRequest(layer=0, spans=spans, keys=tensor(40, 128)), metadata=(TENANT,))
    assert selected.result(60).block_ids.data
    (line,) = lines(1, "slow request", request_id="slow-1")
    assert (line["level"], line["rpc"], line["code"], line["tenant"]) == ("warning", "SelectBlocks", "OK", "log")
    assert re.fullmatch(r"ipv4:127\.0\.0\.1:\d+", line["peer"])
    assert line["ms"] > 150
    assert line["phase"] == "prefill"
    stages = ("queue_ms", "plan_ms", "device_ms", "reply_ms")
    assert {name for name in line if name.endswith("_ms")} == set(stages)
    assert line["queue_ms"] > 150  # it waited for keys
    assert 0 < sum(line[stage] for stage in stages) <= line["ms"]
    assert "0.4375" not in json.dumps(line)
    assert len(json.dumps(line)) < 600
    calls.CloseSequences(close_request(2), metadata=(TENANT,))


def test_a_request_on_a_stream_is_told_under_both_ids(calls: pb_grpc.IndexerServiceStub, lines: Lines) -> None:
    calls.OpenSequences(open_request(3), metadata=(TENANT,))
    requests = [pb.StreamRequest(request_id=number, select_blocks=waiting(3), timeout_ms=300) for number in (8, 9)]
    assert len(list(calls.Stream(iter(requests), metadata=(TENANT, ("x-request-id", "slow-2"))))) == 2
    for number in (8, 9):
        (line,) = lines(1, "slow request", request_id=f"slow-2/{number}")
        assert (line["rpc"], line["code"]) == ("Stream/SelectBlocks", "DEADLINE_EXCEEDED")
        assert 300 <= line["ms"] < 5000
        assert line["queue_ms"] < line["ms"]
    calls.CloseSequences(close_request(3), metadata=(TENANT,))


@pytest.mark.slow
def test_a_flood_of_slow_requests_is_ten_lines_a_second(calls: pb_grpc.IndexerServiceStub, lines: Lines) -> None:
    calls.OpenSequences(open_request(4), metadata=(TENANT,))
    time.sleep(1.1)  # the lines of other tests are of another second
    before = len(lines(0, "slow request"))
    requests = [pb.StreamRequest(request_id=number, select_blocks=waiting(4), timeout_ms=300) for number in range(100)]
    assert len(list(calls.Stream(iter(requests), metadata=(TENANT, ("x-request-id", "flood"))))) == 100
    time.sleep(1.1)
    after = pb.StreamRequest(request_id=1, select_blocks=waiting(4), timeout_ms=300)
    assert len(list(calls.Stream(iter([after]), metadata=(TENANT, ("x-request-id", "after-flood"))))) == 1
    (last,) = lines(1, "slow request", request_id="after-flood/1")
    told = lines(0, "slow request")[before:]
    assert 10 <= len(told) - 1 <= 30  # they may have ended in two or three different seconds
    assert len(told) + sum(line["withheld"] for line in told) == 101
    assert last["withheld"] > 0
    calls.CloseSequences(close_request(4), metadata=(TENANT,))


def test_a_fault_of_the_server_is_told_with_the_request_id(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        error = as_blockdex_error(ZeroDivisionError("a fault"), "SelectBlocks", "fault-1")
    assert isinstance(error, InternalError)
    line = json.loads(JsonFormatter().format(caplog.records[-1]))
    assert (line["event"], line["rpc"], line["request_id"]) == ("request failed", "SelectBlocks", "fault-1")
    assert "ZeroDivisionError: a fault" in line["exception"]
