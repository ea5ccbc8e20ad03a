"""From the wire to the ring and back, through a real gRPC server before an engine in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from blockdex.frontend.grpc.server import start_rpc_server
from blockdex.frontend.http.metrics import RequestMetrics
from blockdex.ring.caller import RPCS, TOKEN_RPCS
from blockdex.v1 import indexer_pb2 as pb
from blockdex.v1 import indexer_pb2_grpc as pb_grpc
from support.ring_engine import Hosted, hosted
from support.running_engine import SPEC, TENANT, open_sequence
from support.streaming import OpenStream
from support.wire import TIMEOUT, spans

METADATA = (("blockdex-tenant", TENANT),)


def append(start: int = 0, **fields: Any) -> pb.AppendKeysRequest:
    keys = pb.Tensor(dtype=pb.DTYPE_BF16, data=bytes(2 * SPEC.head_dim))
    return pb.AppendKeysRequest(spans=spans((1, start, 1)), keys=keys, rollback=True, **fields)


def select(layer: int = 0, **fields: Any) -> pb.SelectBlocksRequest:
    queries = pb.Tensor(dtype=pb.DTYPE_BF16, data=bytes(4 * 2 * SPEC.head_dim))
    return pb.SelectBlocksRequest(layer=layer, spans=spans((1, 0, 1)), queries=queries, **fields)


def both() -> pb.AppendAndSelectRequest:
    return pb.AppendAndSelectRequest(
        spans=spans((1, 0, 1)), keys=append().keys, queries=select().queries, rollback=True
    )


class Served:
    """A server before a hosted engine whose tenant has the sequence 1 open."""

    def __init__(self, run: Hosted, metrics: RequestMetrics) -> None:
        self.run = run
        self.metrics = metrics

    def counts(self) -> dict[str, int]:
        """Requests answered well, by RPC."""
        self.run.channel.tell_times()
        counts = self.metrics.counts
        return {rpc: counts[rpc, "OK", ""] for rpc in RPCS if counts[rpc, "OK", ""]}

    @property
    def waiting(self) -> int:
        """Requests that somebody waits for."""
        link = self.run.channel._link
        assert link is not None
        return link.waiting


@pytest.fixture
async def served() -> AsyncIterator[tuple[Served, grpc.aio.Channel]]:
    metrics = RequestMetrics()
    async with hosted() as run:
        run.channel._timed = metrics.observe_many
        await run.ask(open_sequence(1))
        server = await start_rpc_server(run.channel, "127.0.0.1:0", observer=metrics)
        try:
            async with grpc.aio.insecure_channel(server.address) as channel:
                yield Served(run, metrics), channel
        finally:
            await server.stop(0.0)


async def test_all_calls_are_counted(served: tuple[Served, grpc.aio.Channel]) -> None:
    serving, channel = served
    stub = pb_grpc.IndexerServiceStub(channel)
    for call, request in ((stub.AppendKeys, append()), (stub.SelectBlocks, select()), (stub.AppendAndSelect, both())):
        response = await call(request, metadata=METADATA, timeout=TIMEOUT)
        assert response.epoch == serving.run.engine.info().epoch
    stream = OpenStream(stub.Stream(metadata=METADATA))
    requests: list[Any] = [append(), select(), select(return_scores=pb.SCORE_FORMAT_SCALED), both()]
    for number, request in enumerate(requests):
        await stream.send(number, request)
        response = await stream.receive()
        assert response.request_id == number
        assert response.WhichOneof("response") in ("append_keys", "select_blocks", "append_and_select")
    await stream.call.done_writing()
    await stream.ends()
    await stub.GetSequence(pb.GetSequenceRequest(sequence_id=1), metadata=METADATA, timeout=TIMEOUT)
    rpcs = (*TOKEN_RPCS, *(f"Stream/{rpc}" for rpc in TOKEN_RPCS), "OpenSequences", "GetSequence")
    expected = dict.fromkeys(rpcs, 1) | {"Stream/SelectBlocks": 2}
    assert serving.counts() == expected
    assert {rpc: seconds.count for rpc, seconds in serving.metrics.seconds.items() if seconds.count} == expected


def in_pieces(request: Any) -> bytes:
    """The same request as protobuf reads it, and no encoder writes it: spans in two pieces, a group that is unknown."""
    whole, spans = request.SerializeToString(), pb.Spans()
    spans.MergeFrom(request.spans)
    rest = type(request)()
    rest.MergeFrom(request)
    rest.ClearField("spans")
    pieces = type(request)(spans=pb.Spans(sequence_ids=spans.sequence_ids)), type(request)(spans=spans)
    pieces[1].spans.ClearField("sequence_ids")
    group = b"\xa3\x06\x08\x01\xa4\x06"  # number 100
    message = b"".join([pieces[0].SerializeToString(), group, rest.SerializeToString(), pieces[1].SerializeToString()])
    read = type(request).FromString(message)
    read.DiscardUnknownFields()
    assert read.SerializeToString() == whole and message != whole
    return message


async def test_what_no_encoder_writes_is_answered_all_the_same(served: tuple[Served, grpc.aio.Channel]) -> None:
    serving, channel = served
    call: Any = channel.unary_unary("/blockdex.v1.IndexerService/AppendKeys")
    response = await call(in_pieces(append()), metadata=METADATA, timeout=TIMEOUT)
    assert pb.AppendKeysResponse.FromString(response).epoch == serving.run.engine.info().epoch
    body = in_pieces(append(start=1))
    streamed: Any = channel.stream_stream("/blockdex.v1.IndexerService/Stream")(metadata=METADATA)
    number = pb.StreamRequest(request_id=7).SerializeToString()
    await streamed.write(number + b"\x1a" + bytes([len(body)]) + body)
    read = pb.StreamResponse.FromString(await streamed.read())
    assert (read.request_id, read.WhichOneof("response")) == (7, "append_keys")
    streamed.cancel()
    assert serving.counts() == {"OpenSequences": 1, "AppendKeys": 1, "Stream/AppendKeys": 1}
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call(b"\x0a\xff", metadata=METADATA, timeout=TIMEOUT)
    assert refused.value.details() == "message: its 2 bytes are no blockdex.v1.AppendKeysRequest"


async def test_errors_are_those_of_the_engine(served: tuple[Served, grpc.aio.Channel]) -> None:
    serving, channel = served
    stub = pb_grpc.IndexerServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.AppendKeys(append(start=5), metadata=METADATA, timeout=TIMEOUT)
    assert refused.value.code() == grpc.StatusCode.OUT_OF_RANGE
    stream = OpenStream(stub.Stream(metadata=METADATA))
    await stream.send(3, append(start=5))
    assert (await stream.refusal(3)).message == refused.value.details()
    stream.call.cancel()
    assert serving.metrics.counts["AppendKeys", "OUT_OF_RANGE", "APPEND_BEYOND_LENGTH"] == 1
    assert serving.metrics.counts["Stream/AppendKeys", "OUT_OF_RANGE", "APPEND_BEYOND_LENGTH"] == 1
    assert serving.counts() == {"OpenSequences": 1}


async def test_a_unary_caller_that_goes_gives_it_up(served: tuple[Served, grpc.aio.Channel]) -> None:
    serving, channel = served
    stub = pb_grpc.IndexerServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as late:
        await stub.SelectBlocks(select(wait_for_keys=True), metadata=METADATA, timeout=0.1)
    assert late.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await stub.AppendKeys(append(), metadata=METADATA, timeout=TIMEOUT)
    assert serving.waiting == 0


async def test_a_stream_that_closes_gives_up_what_it_asked(served: tuple[Served, grpc.aio.Channel]) -> None:
    serving, channel = served
    stub = pb_grpc.IndexerServiceStub(channel)
    stream = OpenStream(stub.Stream(metadata=METADATA))
    for number in range(3):
        await stream.send(number, select(wait_for_keys=True))
    await stream.send(3, append(layer=1))
    assert (await stream.receive()).request_id == 3
    assert serving.waiting == 3
    stream.call.cancel()
    await stub.AppendKeys(append(layer=2), metadata=METADATA, timeout=TIMEOUT)
    assert serving.waiting == 0
    assert serving.metrics.counts["Stream/SelectBlocks", "CANCELLED", "CANCELLED"] == 3
