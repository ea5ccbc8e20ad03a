"""What a server tells its streams unasked: sequences evicted, to their tenant alone; a cache born anew, to all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import numpy as np
import pytest

from blockdex.v1 import indexer_pb2 as pb
from support.serving import SMALL, serve
from support.streaming import OpenStream, open_stream
from support.wire import TIMEOUT, Wire, append, keys_of, open_request, refused, wire

PAGES, PAGE_BYTES, BLOCK = 8, 3 * 128 * 128 * 2, 128
LEASE_SECONDS = 0.3
STREAMS = 4

FAILS_ONCE = """
import sys
from blockdex.cli.main import main
from blockdex_kernels.cpu import CpuBackend
append = CpuBackend.append
def fail(*arguments, **options):
    CpuBackend.append = append
    raise RuntimeError("made for this test")
CpuBackend.append = fail
sys.exit(main())
"""
"""The server. Its first batch fails."""


@asynccontextmanager
async def streams(tenant: Wire, count: int) -> AsyncIterator[list[OpenStream]]:
    """Streams of connections of their own, that the server has answered once."""
    async with AsyncExitStack() as stack:
        opened = [await stack.enter_async_context(open_stream(tenant)) for _ in range(count)]
        for stream in opened:
            await stream.send(1, pb.CloseSequencesRequest(sequence_ids=[10**6]))
            await stream.receive()
        yield opened


async def first_event(stream: OpenStream) -> pb.Event:
    """What the server tells first, unasked."""
    response = await asyncio.wait_for(stream.call.read(), TIMEOUT)
    assert response.WhichOneof("response") == "event" and response.request_id == 0
    event: pb.Event = response.event
    return event


def evicted(*sequence_ids: int) -> pb.Event:
    return pb.Event(sequences_evicted=pb.SequencesEvicted(sequence_ids=sequence_ids))


def fill(tenant: Wire, random: np.random.Generator, sequence: int, pages: int) -> None:
    """Opens a sequence of so many pages."""
    tenant.call(open_request(sequence))
    tenant.call(append(0, [(sequence, 0, pages * BLOCK)], keys_of(random, pages * BLOCK)))


@pytest.mark.parametrize("processes", [("single",), ("split", "--frontends", "2")], ids=" ".join)
async def test_an_eviction_is_told_to_every_stream_of_its_tenant_and_to_no_other(
    random: np.random.Generator, processes: tuple[str, ...]
) -> None:
    flags = ("--num-layers", "3", "--cache-bytes", str(PAGES * PAGE_BYTES), "--device", "cpu")
    with (
        serve(*flags, "--lease-seconds", str(LEASE_SECONDS), "--processes", *processes) as serving,
        wire(serving.grpc_address, "red") as red,
        wire(serving.grpc_address, "blue") as blue,
    ):
        async with streams(red, STREAMS) as reds, streams(blue, STREAMS) as blues:
            fill(red, random, 7, 4)
            fill(blue, random, 8, 4)
            await asyncio.sleep(1.5 * LEASE_SECONDS)
            fill(red, random, 9, 4)
            fill(blue, random, 10, 4)
            assert [await first_event(stream) for stream in reds] == [evicted(7)] * STREAMS
            assert [await first_event(stream) for stream in blues] == [evicted(8)] * STREAMS, "of 7 they never hear"


async def test_a_cache_born_anew_in_a_living_engine_is_told_to_every_stream(random: np.random.Generator) -> None:
    flags = (*SMALL, "--processes", "single")
    with serve(*flags, program=("-c", FAILS_ONCE)) as serving, wire(serving.grpc_address, "red") as red:
        before = int(serving.event("serving")["epoch"])
        async with streams(red, STREAMS) as opened:
            red.call(open_request(7))
            with refused() as refusals:
                red.stub.AppendKeys(append(0, [(7, 0, 1)], keys_of(random, 1)), metadata=red.metadata, timeout=TIMEOUT)
            assert [refusal.reason for refusal in refusals] == ["INTERNAL"]
            epoch = red.call(pb.GetInfoRequest()).epoch
            assert epoch != before
            new_epoch = pb.Event(new_epoch=pb.NewEpoch(epoch=epoch))
            assert [await first_event(stream) for stream in opened] == [new_epoch] * STREAMS
