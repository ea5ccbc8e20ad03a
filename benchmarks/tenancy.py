"""What one tenant's flood costs another, against a real server of several processes.

    python -m benchmarks.tenancy [--seconds 30] [--streams 64]

The victim is one client that decodes four sequences, a call after the other, and looks at every answer. It is timed
alone and beside a flood of another tenant: streams that keep 256 requests in flight each, half of them prefills of
2,048 tokens, whatever they are answered; sequences opened without end; connections that are dropped in the midst of a
call. Two tenants of one weight have half of the server each: the figure is what the victim has beside the flood, of
half of what it takes alone. The flood runs at the lowest priority: its processors are not the server's to share out,
nor the victim's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import grpc
import numpy as np

import blockdex
from benchmarks.environment import environment
from benchmarks.served import served
from blockdex.v1 import indexer_pb2 as pb
from blockdex.v1 import indexer_pb2_grpc as pb_grpc

LAYERS = 3
HEADS, HEAD_DIM, TOPK, BLOCK = 4, 128, 16, 128
PREFILL_TOKENS = 2048
IN_FLIGHT = 256
OPENERS, DROPPERS = 8, 4
_CHANNELS = 8
_METADATA = (("blockdex-tenant", "flood"),)
_BFLOAT16 = 2
_WARM_UP_SECONDS = 2.0
_CALL_SECONDS = 5.0


@dataclass(frozen=True)
class Rate:
    """What the victim got.

    Attributes:
        calls_per_second: decode calls that were answered right.
        p99_ms: of these.
        errors: calls that were refused.
        slowest_open_ms: of sequences opened on the side, one a second.
    """

    calls_per_second: float
    p99_ms: float
    errors: int
    slowest_open_ms: float


class Victim:
    """Four sequences of one client, whose right answers are known."""

    def __init__(self, address: str) -> None:
        self._client = blockdex.Client(address, tenant="victim", transport="stream")
        self._ids = itertools.count(1)
        self._sequences = [next(self._ids) for _ in range(4)]
        keys = np.ones((4, HEAD_DIM), np.float32)
        for sequence in self._sequences:
            self._client.open_sequence(sequence)
        for layer in range(LAYERS):
            self._client.append_keys(layer, sequences=self._sequences, lengths=[1] * 4, keys=keys)
        self._layer, self._length = 0, 1

    def decode_for(self, seconds: float) -> Rate:
        """Decodes as fast as it is answered; a call that is refused counts as none, and is made again."""
        took, opens, errors = list[float](), list[float](), 0
        began = next_open = time.monotonic()
        while time.monotonic() < began + seconds:
            asked = time.monotonic()
            try:
                self._call()
                took.append(time.monotonic() - asked)
            except blockdex.BlockdexError:
                errors += 1
            if time.monotonic() > next_open:
                next_open = time.monotonic() + 1.0
                opens.append(self._open())
        elapsed = time.monotonic() - began
        p99 = float(np.quantile(took, 0.99)) if took else float("inf")
        return Rate(len(took) / elapsed, 1e3 * p99, errors, 1e3 * max(opens))

    def close(self) -> None:
        """Ends the client."""
        self._client.close()

    def _call(self) -> None:
        """A token of every sequence, in one layer. All keys are alike: the first blocks are selected, and the last."""
        blocks = self._length // BLOCK + 1
        expected = np.where(np.arange(TOPK) < blocks, np.arange(TOPK), -1)
        if blocks > TOPK:
            expected[-1] = blocks - 1
        ids = self._client.append_and_select(
            self._layer,
            sequences=self._sequences,
            starts=[self._length] * 4,
            lengths=[1] * 4,
            keys=np.ones((4, HEAD_DIM), np.float32),
            queries=np.ones((4, HEADS, HEAD_DIM), np.float32),
            revisions=[self._length] * 4,
            timeout=_CALL_SECONDS,
        )
        np.testing.assert_array_equal(ids, np.broadcast_to(expected, ids.shape))
        self._layer += 1
        if self._layer == LAYERS:
            self._layer, self._length = 0, self._length + 1

    def _open(self) -> float:
        began = time.monotonic()
        sequence = next(self._ids)
        with contextlib.suppress(blockdex.BlockdexError):
            self._client.open_sequence(sequence, timeout=_CALL_SECONDS)
        return time.monotonic() - began


class Flood:
    """A tenant that asks for all that it can ask for, on one asyncio loop."""

    def __init__(self, address: str, streams: int) -> None:
        self._address = address
        self._streams = streams
        self._ids = itertools.count(1)

    async def run(self) -> None:
        """Until it is killed."""
        async with asyncio.TaskGroup() as tasks:
            for number in range(self._streams):
                tasks.create_task(self._again(self._stream, number % _CHANNELS))
            for _ in range(OPENERS):
                tasks.create_task(self._again(self._open, 0))
            for _ in range(DROPPERS):
                tasks.create_task(self._again(self._drop, 0))

    async def _again(self, attack: Callable[[Any], Awaitable[None]], connection: int) -> None:
        """Whatever becomes of one attack, another follows."""
        while True:
            with contextlib.suppress(grpc.RpcError, asyncio.CancelledError):
                async with self._connect(connection) as channel:
                    await attack(pb_grpc.IndexerServiceStub(channel))
            await asyncio.sleep(0.01)

    def _connect(self, number: int) -> grpc.aio.Channel:
        options = (("grpc.use_local_subchannel_pool", 1), ("flood.connection", number))
        return grpc.aio.insecure_channel(self._address, options=options)

    async def _stream(self, stub: Any) -> None:
        sequence = next(self._ids)
        opening = pb.OpenSequencesRequest(sequences=[pb.NewSequence(sequence_id=sequence)])
        await stub.OpenSequences(opening, metadata=_METADATA)
        keys = bytes(_BFLOAT16 * PREFILL_TOKENS * HEAD_DIM)
        spans = pb.Spans(sequence_ids=[sequence], starts=[0], lengths=[PREFILL_TOKENS])
        tensor = pb.Tensor(dtype=pb.DTYPE_BF16, data=keys)
        await stub.AppendKeys(pb.AppendKeysRequest(spans=spans, keys=tensor), metadata=_METADATA)
        kinds = [_selection(sequence, 0, PREFILL_TOKENS), _selection(sequence, PREFILL_TOKENS - 1, 1)]
        call = stub.Stream(metadata=_METADATA)
        places = asyncio.Semaphore(IN_FLIGHT)

        async def read() -> None:
            async for response in call:
                if response.request_id:
                    places.release()

        reading = asyncio.create_task(read())
        try:
            for number in itertools.count(1):
                await places.acquire()
                request = pb.StreamRequest(request_id=number, select_blocks=kinds[number % 2])
                await call.write(request)
        finally:
            reading.cancel()

    async def _open(self, stub: Any) -> None:
        while True:
            opening = pb.OpenSequencesRequest(sequences=[pb.NewSequence(sequence_id=next(self._ids))])
            with contextlib.suppress(grpc.RpcError):
                await stub.OpenSequences(opening, metadata=_METADATA)

    async def _drop(self, stub: Any) -> None:
        call = stub.Stream(metadata=_METADATA)
        await call.write(pb.StreamRequest(request_id=1, select_blocks=_selection(1, 0, PREFILL_TOKENS)))
        # The connection goes with its channel, and with it what is on its way.


def _selection(sequence: int, start: int, length: int) -> pb.SelectBlocksRequest:
    queries = bytes(_BFLOAT16 * length * HEADS * HEAD_DIM)
    spans = pb.Spans(sequence_ids=[sequence], starts=[start], lengths=[length])
    return pb.SelectBlocksRequest(spans=spans, queries=pb.Tensor(dtype=pb.DTYPE_BF16, data=queries))


@contextlib.contextmanager
def flooded(address: str, streams: int) -> Iterator[None]:
    """A flood from a process of its own."""
    command = (sys.executable, "-m", "benchmarks.tenancy", "--flood", address, "--streams", str(streams))
    process = subprocess.Popen(command)
    try:
        yield
        assert process.poll() is None, "the flood ended by itself"
    finally:
        process.kill()
        process.wait()


def drill(address: str, seconds: float, streams: int) -> dict[str, Rate]:
    """The victim alone, and beside the flood."""
    victim = Victim(address)
    try:
        alone = victim.decode_for(min(seconds, 5.0))
        with flooded(address, streams):
            time.sleep(_WARM_UP_SECONDS)
            beside = victim.decode_for(seconds)
    finally:
        victim.close()
    return {"alone": alone, "beside": beside}


def share_kept(rates: dict[str, Rate]) -> float:
    """What the victim has beside the flood, of its fair share."""
    return rates["beside"].calls_per_second / (rates["alone"].calls_per_second / 2)


def main() -> None:
    """Runs the drill and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--flood", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.flood:
        os.nice(19)
        asyncio.run(Flood(arguments.flood, arguments.streams).run())
        return
    with served("cpu", LAYERS, "256MiB", 1) as server:
        rates = drill(server.grpc, arguments.seconds, arguments.streams)
        flood = server.answered("Stream/SelectBlocks") / (arguments.seconds + _WARM_UP_SECONDS)
    figures: dict[str, Any] = {name: asdict(rate) for name, rate in rates.items()}
    figures |= {"share_kept": share_kept(rates), "flood_calls_per_second": flood}
    print(json.dumps(environment("grpcio") | figures, indent=1))


if __name__ == "__main__":
    main()
