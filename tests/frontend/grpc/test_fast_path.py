"""The short way from the wire to the ring and back, through a real gRPC server; what it leaves goes the long way."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from blockdex.contract.messages import Request
from blockdex.frontend.grpc.server import start_rpc_server
from blockdex.frontend.http.metrics import RequestMetrics
from blockdex.ring.channel import SHORT_RPCS, PendingAnswer
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
    """A server before a hosted engine whose tenant has the sequence 1 open, and how many requests took the long way."""

    def __init__(self, run: Hosted, metrics: RequestMetrics) -> None:
        self.run = run
        self.metrics = metrics
        self.long_way: list[Request] = []
        submit = run.channel.submit

        def note(request: Request, timeout: float) -> PendingAnswer:
            self.long_way.append(request)
            return submit(request, timeout)

        run.channel.submit = note  # type: ignore[method-assign]

    def counts(self) -> dict[str, int]:
        """Requests answered well, by RPC, of those that may take the short way."""
        self.run.channel.tell_times()
        return {rpc: self.metrics.counts[rpc, "OK"] for rpc in SHORT_RPCS if self.metrics.counts[rpc, "OK"]}


@pytest.fixture
async def served() -> AsyncIterator[tuple[Served, grpc.aio.Channel]]:
    metrics = RequestMetrics()
    async with hosted() as run:
        run.channel._timed = metrics.observe_many
        await run.ask(open_sequence(1))
        server = await start_rpc_server(run.channel, "127.0.0.1:0", observe=metrics.observe)
        try:
            async with grpc.aio.insecure_channel(server.address) as channel:
                yield Served(run, metrics), channel
        finally:
            await server.stop(0.0)


async def test_all_token_calls_take_it_and_are_counted(served: tuple[Served, grpc.aio.Channel]) -> None:
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
    assert not serving.long_way
    expected = dict.fromkeys(SHORT_RPCS, 1) | {"Stream/SelectBlocks": 2}
    assert serving.counts() == expected
    assert {rpc: serving.metrics.seconds[rpc].count for rpc in SHORT_RPCS} == expected


async def test_errors_of_it_are_those_of_the_engine(served: tuple[Served, grpc.aio.Channel]) -> None:
    serving, channel = served
    stub = pb_grpc.IndexerServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.AppendKeys(append(start=5), metadata=METADATA, timeout=TIMEOUT)
    assert refused.value.code() == grpc.StatusCode.OUT_OF_RANGE
    stream = OpenStream(stub.Stream(metadata=METADATA))
    await stream.send(3, append(start=5))
    assert (await stream.refusal(3)).message == refused.value.details()
    stream.call.cancel()
    assert not serving.long_way
    assert serving.metrics.counts["AppendKeys", "OUT_OF_RANGE"] == 1
    assert serving.metrics.counts["Stream/AppendKeys", "OUT_OF_RANGE"] == 1
    assert not serving.counts()


async def test_a_stream_may_mix_both_ways(
    served: tuple[Served, grpc.aio.Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number in flight on one way is in flight on the other."""
    serving, channel = served
    send, short_way = serving.run.channel.send, True
    monkeypatch.setattr(serving.run.channel, "send", lambda *request: short_way and send(*request))
    stream = OpenStream(pb_grpc.IndexerServiceStub(channel).Stream(metadata=METADATA))
    await stream.send(1, select(layer=1, wait_for_keys=True))
    await stream.call.write(pb.StreamRequest(request_id=1))
    assert (await stream.refusal(1)).reason == "DUPLICATE_REQUEST_ID"
    assert not serving.long_way
    short_way = False
    await stream.send(2, select(layer=1, wait_for_keys=True))
    await stream.send(2, append())
    assert (await stream.refusal(2)).reason == "DUPLICATE_REQUEST_ID"
    assert len(serving.long_way) == 1
    short_way = True
    for number in (1, 2):
        await stream.send(number, append())
        assert (await stream.refusal(number)).reason == "DUPLICATE_REQUEST_ID"
        await stream.cancel(number)
        assert (await stream.refusal(number)).reason == "CANCELLED"
    await stream.send(2, append())
    assert (await stream.receive()).WhichOneof("response") == "append_keys"
    assert len(serving.long_way) == 1, "the rest took the short way again"
    stream.call.cancel()


async def test_a_unary_caller_that_goes_gives_it_up(served: tuple[Served, grpc.aio.Channel]) -> None:
    serving, channel = served
    stub = pb_grpc.IndexerServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as late:
        await stub.SelectBlocks(select(wait_for_keys=True), metadata=METADATA, timeout=0.1)
    assert late.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    link = serving.run.channel._link
    assert link is not None and not serving.long_way
    await stub.AppendKeys(append(), metadata=METADATA, timeout=TIMEOUT)
    assert link._ring.waiting == 0


async def test_a_stream_that_closes_gives_up_what_it_asked(served: tuple[Served, grpc.aio.Channel]) -> None:
    serving, channel = served
    stub = pb_grpc.IndexerServiceStub(channel)
    stream = OpenStream(stub.Stream(metadata=METADATA))
    for number in range(3):
        await stream.send(number, select(wait_for_keys=True))
    await stream.send(3, append(layer=1))
    assert (await stream.receive()).request_id == 3
    link = serving.run.channel._link
    assert link is not None and link.on_short_way == 3
    stream.call.cancel()
    await stub.AppendKeys(append(layer=2), metadata=METADATA, timeout=TIMEOUT)
    assert link._ring.waiting == 0
    assert serving.metrics.counts["Stream/SelectBlocks", "CANCELLED"] == 3
