"""`Stream`: many requests in flight, each answered as it finishes, and what happens to them on a bad day."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from blockdex.v1 import indexer_pb2 as pb
from blockdex_kernels import reference
from support.streaming import OpenStream, open_stream
from support.wire import (
    SPEC,
    TIMEOUT,
    Refusal,
    Wire,
    append,
    append_and_select,
    block_ids_of,
    keys_of,
    open_request,
    poll,
    queries_of,
    refusal_of,
    select,
)

A = 7


@pytest.fixture
async def stream(tenant: Wire) -> AsyncIterator[OpenStream]:
    """A stream to the small server, whose tenant has A open, empty."""
    tenant.call(open_request(A))
    async with open_stream(tenant) as opened:
        yield opened


async def test_requests_in_flight_take_effect_in_order(stream: OpenStream, random: np.random.Generator) -> None:
    """Far more than one request is under way, and every answer is that of one after another."""
    tokens, chunk = 600, 6
    keys, queries = keys_of(random, tokens), queries_of(random, tokens)
    starts = range(0, tokens, chunk)

    async def send() -> None:
        for number, start in enumerate(starts):
            rows, part = [(A, start, chunk, number + 1)], slice(start, start + chunk)
            if number % 3 == 0:
                await stream.send(3 * number, append(1, rows, keys[part]))
                await stream.send(3 * number + 1, select(1, rows, queries[part]))
            else:
                await stream.send(3 * number + 2, append_and_select(1, rows, keys[part], queries[part]))

    sending = asyncio.create_task(send())
    answers: dict[int, pb.StreamResponse] = {}
    while len(answers) < len(starts) + len(range(0, len(starts), 3)):
        response = await stream.receive()
        assert response.request_id not in answers
        answers[response.request_id] = response
    await sending
    expected = reference.select(torch.from_numpy(keys), torch.from_numpy(queries), 0, SPEC).block_ids.numpy()
    for number, start in enumerate(starts):
        alone = number % 3 == 0
        request_id, kind = (3 * number + 1, "select_blocks") if alone else (3 * number + 2, "append_and_select")
        assert answers[request_id].WhichOneof("response") == kind
        ids = block_ids_of(getattr(answers[request_id], kind)).reshape(chunk, 4, 16)
        np.testing.assert_array_equal(ids, expected[start : start + chunk])
    assert all(answers[3 * number].WhichOneof("response") == "append_keys" for number in range(0, len(starts), 3))


async def test_answers_come_as_they_finish(stream: OpenStream, random: np.random.Generator) -> None:
    await stream.send(1, select(0, [(A, 0, 1)], queries_of(random, 1), wait_for_keys=True))
    await stream.send(2, append(1, [(A, 0, 1)], keys_of(random, 1)))
    assert (await stream.receive()).request_id == 2
    await stream.send(3, append(0, [(A, 0, 1)], keys_of(random, 1)))
    assert {(await stream.receive()).request_id for _ in range(2)} == {1, 3}


async def test_cancel(stream: OpenStream, random: np.random.Generator) -> None:
    waiting = select(0, [(A, 0, 1)], queries_of(random, 1), wait_for_keys=True)
    await stream.send(1, waiting)
    await stream.send(2, waiting)
    await stream.cancel(3)  # not in flight: ignored
    await stream.cancel(1)
    expected = Refusal("CANCELLED", "CANCELLED", "blockdex", "request 1: cancelled by its caller")
    assert await stream.refusal(1) == expected
    await stream.cancel(1)  # answered already: ignored
    await stream.send(1, append(0, [(A, 0, 1)], keys_of(random, 1)))
    assert {(await stream.receive()).request_id for _ in range(2)} == {1, 2}


async def test_an_id_in_flight_twice(stream: OpenStream, random: np.random.Generator) -> None:
    await stream.send(5, select(0, [(A, 0, 1)], queries_of(random, 1), wait_for_keys=True))
    await stream.send(5, append(0, [(A, 0, 1)], keys_of(random, 1)))
    expected = Refusal("INVALID_ARGUMENT", "DUPLICATE_REQUEST_ID", "blockdex", "request_id: 5 is in flight already")
    assert await stream.refusal(5) == expected
    await stream.send(6, append(0, [(A, 0, 1)], keys_of(random, 1)))
    responses = [await stream.receive() for _ in range(2)]
    kinds = {response.request_id: response.WhichOneof("response") for response in responses}
    assert kinds == {5: "select_blocks", 6: "append_keys"}


async def test_timeouts_and_errors_leave_the_stream_alive(stream: OpenStream, random: np.random.Generator) -> None:
    await stream.send(1, select(0, [(A, 0, 1)], queries_of(random, 1), wait_for_keys=True), timeout_ms=30)
    assert (await stream.refusal(1)).reason == "DEADLINE_EXCEEDED"
    await stream.send(2, append(9, [(A, 0, 1)], keys_of(random, 1)))
    assert (await stream.refusal(2)).reason == "INVALID_LAYER"
    await stream.call.write(pb.StreamRequest(request_id=3))
    expected = Refusal("INVALID_ARGUMENT", "EMPTY_REQUEST", "blockdex", "request 3: is empty")
    assert await stream.refusal(3) == expected
    await stream.send(4, append(0, [(A, 0, 1)], keys_of(random, 1)))
    assert (await stream.receive()).WhichOneof("response") == "append_keys"
    await stream.call.done_writing()
    await stream.ends()


@pytest.mark.parametrize("waits", [False, True])
async def test_bytes_that_are_no_message_end_the_stream(tenant: Wire, random: np.random.Generator, waits: bool) -> None:
    """What came before is answered; who asked cannot be told otherwise, for nobody knows the number of its request."""
    tenant.call(open_request(A))
    async with grpc.aio.insecure_channel(tenant.address) as channel:
        call: Any = channel.stream_stream("/blockdex.v1.IndexerService/Stream")(
            metadata=tenant.metadata, timeout=TIMEOUT
        )
        if waits:
            waiting = select(0, [(A, 0, 1)], queries_of(random, 1), wait_for_keys=True)
            await call.write(pb.StreamRequest(request_id=1, select_blocks=waiting).SerializeToString())
        await call.write(b"\xff\xff\xff")
        if waits:
            tenant.call(append(0, [(A, 0, 1)], keys_of(random, 1)))
            assert pb.StreamResponse.FromString(await call.read()).request_id == 1
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()
    words = "message: its 3 bytes are no blockdex.v1.StreamRequest"
    assert refusal_of(refused.value) == Refusal("INVALID_ARGUMENT", "MALFORMED_MESSAGE", "blockdex", words)


@pytest.mark.parametrize("rpc", ["AppendKeys", "SelectBlocks", "AppendAndSelect"])
def test_bytes_that_are_no_message_are_refused(tenant: Wire, rpc: str) -> None:
    with grpc.insecure_channel(tenant.address) as channel, pytest.raises(grpc.RpcError) as refused:
        call: Any = channel.unary_unary(f"/blockdex.v1.IndexerService/{rpc}")
        call(b"\xff", metadata=tenant.metadata, timeout=TIMEOUT)
    words = f"message: its 1 bytes are no blockdex.v1.{rpc}Request"
    assert refusal_of(refused.value) == Refusal("INVALID_ARGUMENT", "MALFORMED_MESSAGE", "blockdex", words)


async def test_closing_the_writing_side_waits_for_the_answers(
    tenant: Wire, stream: OpenStream, random: np.random.Generator
) -> None:
    await stream.send(1, select(0, [(A, 0, 1)], queries_of(random, 1), wait_for_keys=True))
    await stream.send(2, select(1, [(A, 0, 1)], queries_of(random, 1), wait_for_keys=True))
    await stream.call.done_writing()
    for layer in (0, 1):
        tenant.call(append(layer, [(A, 0, 1)], keys_of(random, 1)))
        assert (await stream.receive()).request_id == layer + 1
    await stream.ends()


async def test_a_stream_without_requests_ends(stream: OpenStream) -> None:
    await stream.call.done_writing()
    await stream.ends()


async def test_more_requests_than_a_stream_may_have_in_flight(tight: Wire, random: np.random.Generator) -> None:
    """The fifth is not read before one of the first four is answered; in the end all are."""
    tight.call(open_request(A))
    keys, queries = keys_of(random, 1), queries_of(random, 1)
    async with open_stream(tight) as stream:
        for request_id in range(4):
            await stream.send(request_id, select(0, [(A, 0, 1)], queries, wait_for_keys=True))
        for request_id in range(4, 40):
            await stream.send(request_id, append(1, [(A, 0, 1)], keys, rollback=True))
        reading = asyncio.create_task(stream.receive())
        await asyncio.sleep(0.2)
        assert not reading.done()
        tight.call(append(0, [(A, 0, 1)], keys))
        answers = [await reading, *[await stream.receive() for _ in range(39)]]
        assert sorted(answer.request_id for answer in answers) == list(range(40))
        kinds = {answer.WhichOneof("response") for answer in answers}
        assert kinds == {"select_blocks", "append_keys"}


async def test_a_client_that_goes_leaves_nothing_behind(tight: Wire, random: np.random.Generator) -> None:
    tight.call(open_request(A))
    waiting = select(0, [(A, 0, 1)], queries_of(random, 1), wait_for_keys=True)

    def is_full() -> bool:
        try:
            tight.call(pb.GetSequenceRequest(sequence_id=A))
        except grpc.RpcError:
            return True
        return False

    async with open_stream(tight) as one, open_stream(tight) as two:
        for request_id in range(4):  # Two more than there are places: whoever asks may have one when they come.
            await one.send(request_id, waiting)
            await two.send(request_id, waiting)
        await asyncio.to_thread(poll, is_full)
    await asyncio.to_thread(poll, lambda: not is_full())
