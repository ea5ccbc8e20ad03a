"""SIGTERM with requests in flight: new ones are refused, the rest are answered, then every stream ends."""

from __future__ import annotations

import asyncio
import itertools

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from blockdex.v1 import indexer_pb2 as pb
from support.serving import SMALL, serve
from support.streaming import open_stream
from support.wire import (
    TIMEOUT,
    Refusal,
    append,
    keys_of,
    open_request,
    queries_of,
    refusal_of,
    refusal_of_status,
    select,
    wire,
)

A = 7
LONG = 4096
LONG_ONES = (1, 11, 12, 13)


@pytest.mark.parametrize("processes", ["single", "split"])
async def test_streams_end_well(random: np.random.Generator, processes: str) -> None:
    keys, queries = keys_of(random, LONG), queries_of(random, LONG)
    flags = (*SMALL, "--shutdown-grace-seconds", "60", "--processes", processes)
    with serve(*flags) as serving, wire(serving.grpc_address, "t") as tenant:
        tenant.call(open_request(A))
        tenant.call(append(0, [(A, 0, LONG)], keys))
        hopeless = select(1, [(A, 0, 1)], queries[:1], wait_for_keys=True)
        async with open_stream(tenant) as stream, grpc.aio.insecure_channel(tenant.address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await asyncio.wait_for(watch.read(), TIMEOUT)).status == health_pb2.HealthCheckResponse.SERVING
            unary = tenant.stub.SelectBlocks.future(hopeless, timeout=TIMEOUT, metadata=tenant.metadata)
            for number in LONG_ONES:
                await stream.send(number, select(0, [(A, 0, LONG)], queries))
            await stream.send(2, hopeless)
            # Answered at once, and so those before it have arrived.
            await stream.send(3, append(2, [(A, 0, 1)], keys[:1]))
            answers = [await stream.receive()]
            while answers[-1].request_id != 3:
                answers.append(await stream.receive())
            assert len(answers) <= len(LONG_ONES), "nothing is left to be answered at the end"

            serving.process.terminate()
            assert (await asyncio.wait_for(watch.read(), TIMEOUT)).status == health_pb2.HealthCheckResponse.NOT_SERVING
            # Probes hear of it first; requests are taken a little longer.
            for number in itertools.count(100):
                await stream.send(number, append(2, [(A, number - 99, 1)], keys[:1]))
                while answers[-1].request_id != number:
                    answers.append(await stream.receive())
                if answers[-1].HasField("error"):
                    break
            while not {2, *LONG_ONES} <= {answer.request_id for answer in answers}:
                answers.append(await stream.receive())
            by_id = {answer.request_id: answer for answer in answers}
            for long in LONG_ONES:
                assert len(by_id[long].select_blocks.block_ids.data) == LONG * 4 * 16 * 4
            words = "server: shutting down, the keys it waits for cannot come"
            left = Refusal("UNAVAILABLE", "SHUTTING_DOWN", "blockdex", words)
            assert refusal_of_status(by_id[2].error) == left
            words = "server: shutting down, takes no new requests"
            assert refusal_of_status(by_id[number].error) == left._replace(message=words)
            await stream.ends()
            assert stream.events == [pb.Event(draining=pb.Draining())]
        error = await asyncio.to_thread(unary.exception, TIMEOUT)
        assert refusal_of(error) == left
        tenant.forget_all()
        assert await asyncio.to_thread(serving.wait) == 0
