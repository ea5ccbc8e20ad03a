"""What the Python client costs over bare gRPC and a bare ring, where the server costs next to nothing.

A server that computes nothing (`blockdex.loadtest.null_server`; behind the ring an engine without kernels) runs in a
process of its own. The client, and bare gRPC or a bare link with bytes made beforehand, call it in turn, a few calls
each a turn, so that whatever else the machine does strikes all alike. Of every way: microseconds of a call on the
clock, CPU time of the calling thread and of all threads, and how often a thread went to sleep, which is how often one
had to be woken.

python -m benchmarks.client_cost --calls 4000
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Literal

import grpc
import ml_dtypes
import numpy as np

from benchmarks.callers import ByteStream
from benchmarks.engine_step import NullBackend
from blockdex import Client, Info
from blockdex.client.core import Core
from blockdex.client.endpoint import Endpoint
from blockdex.client.kinds import APPEND_AND_SELECT
from blockdex.client.ring import open_link
from blockdex.contract.messages import Limits
from blockdex.loadtest.null_server import NullServer
from blockdex.ring.handshake import listen
from blockdex.ring.listener import RingHost
from blockdex.ring.server import RingInbox
from blockdex.scheduler.loop import Engine
from blockdex.v1 import indexer_pb2 as pb
from blockdex_kernels import IndexSpec

LAYERS, HEADS, HEAD_DIM, TOPK, TOKENS = 57, 4, 128, 16, 8192
UNARY = "/blockdex.v1.IndexerService/AppendAndSelect"
_GRPC: tuple[Literal["stream", "unary"], ...] = ("stream", "unary")
_IN_A_ROW = 20
_PAGES = 1024
_SPIN_SECONDS = 0.001
_SPAWN = multiprocessing.get_context("spawn")

LIMITS = Limits(
    max_message_bytes=64 << 20, max_spans=4096, max_queued_requests=1024, max_stream_requests=64, max_wait_ms=60_000
)
INFO = pb.GetInfoResponse(
    spec=pb.IndexSpec(
        num_layers=LAYERS,
        num_index_heads=HEADS,
        head_dim=HEAD_DIM,
        block_size=128,
        topk=TOPK,
        local_blocks=1,
        scoring=pb.SCORING_BLOCK_MAX,
        scale=HEAD_DIM**-0.5,
        key_dtype=pb.DTYPE_BF16,
        max_sequence_tokens=1 << 20,
    ),
    limits=pb.Limits(**asdict(LIMITS)),
)


class Step:
    """One new token of every sequence, again and again, from layer to layer."""

    def __init__(self, sequences: int) -> None:
        random = np.random.default_rng(0)
        self.ids = list(range(1, sequences + 1))
        self.lengths = [1] * sequences
        self.starts = [TOKENS - 1] * sequences
        self.keys = random.standard_normal((sequences, HEAD_DIM)).astype(ml_dtypes.bfloat16)
        self.queries = random.standard_normal((sequences, HEADS, HEAD_DIM)).astype(ml_dtypes.bfloat16)
        self._layer = 0

    def by(self, client: Client, *, named: bool) -> Callable[[], object]:
        """A call of the client; with its starts named, or left to the client to count."""
        for sequence in self.ids:
            client.open_sequence(sequence)

        def call() -> None:
            self._layer = (self._layer + 1) % LAYERS
            client.append_and_select(
                self._layer,
                sequences=self.ids,
                lengths=self.lengths,
                starts=self.starts if named else None,
                keys=self.keys,
                queries=self.queries,
                rollback=named,
            )

        return call

    def message(self, epoch: int, start: int = TOKENS - 1, ids: Sequence[int] = ()) -> pb.AppendAndSelectRequest:
        """The request of such a call."""
        spans = pb.Spans(sequence_ids=ids or self.ids, starts=[start] * len(self.ids), lengths=self.lengths)
        keys = pb.Tensor(dtype=pb.DTYPE_BF16, data=self.keys.tobytes())
        queries = pb.Tensor(dtype=pb.DTYPE_BF16, data=self.queries.tobytes())
        header = pb.RequestHeader(epoch=epoch)
        return pb.AppendAndSelectRequest(header=header, layer=3, spans=spans, keys=keys, queries=queries, rollback=True)


class Way:
    """A way to call, and what its calls took."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self.calls: list[float] = []
        self.thread: list[float] = []
        self.process: list[float] = []
        self.sleeps: list[float] = []

    def run(self, count: int) -> None:
        """Calls so many times in a row."""
        thread, process, sleeps = time.thread_time(), time.process_time(), _sleeps()
        for _ in range(count):
            began = time.perf_counter()
            self._call()
            self.calls.append(1e6 * (time.perf_counter() - began))
        self.thread.append(1e6 * (time.thread_time() - thread) / count)
        self.process.append(1e6 * (time.process_time() - process) / count)
        self.sleeps.append((_sleeps() - sleeps) / count)

    def forget(self) -> None:
        """Begins anew."""
        for figures in (self.calls, self.thread, self.process, self.sleeps):
            figures.clear()

    def row(self) -> str:
        """Its figures, the medians."""
        columns = (self.calls, self.thread, self.process, self.sleeps)
        return "".join(f"{statistics.median(figures):12.1f}" for figures in columns)


def _sleeps() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw


@contextmanager
def null_server() -> Iterator[str]:
    """The address of a server that computes nothing."""
    pipe, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    try:
        yield f"127.0.0.1:{pipe.recv()}"
    finally:
        process.kill()
        process.join()


def _serve(pipe: Connection) -> None:
    asyncio.run(_serve_until_killed(pipe))


async def _serve_until_killed(pipe: Connection) -> None:
    backend = NullBackend(IndexSpec(num_layers=LAYERS), _PAGES, reason="none is to be measured")
    inbox = RingInbox(_SPIN_SECONDS if len(os.sched_getaffinity(0)) > 2 else 0.0)
    engine = Engine(backend, limits=LIMITS, inbox=inbox)
    engine.start()
    with listen() as listening:
        path = str(listening.getsockname(), "latin-1").replace("\0", "@", 1)
        info = pb.GetInfoResponse()
        info.CopyFrom(INFO)
        info.MergeFrom(pb.GetInfoResponse(epoch=engine.info().epoch, transports=["grpc", f"ring:{path}"]))
        server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        server.add_generic_rpc_handlers((NullServer(info).handler(),))
        pipe.send(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        await RingHost(engine, inbox, listening).run()


def measure(address: str, sequences: int, calls: int) -> dict[str, Way]:
    """Every way in turn."""
    step = Step(sequences)
    with ExitStack() as stack:
        channel = stack.enter_context(grpc.insecure_channel(address))
        stream = ByteStream(channel)
        stack.callback(stream.close)
        info = stack.enter_context(Client(address)).info()
        request = step.message(info.epoch)
        unary: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(UNARY)
        unary_bytes = request.SerializeToString()
        stream_bytes = pb.StreamRequest(request_id=1, append_and_select=request).SerializeToString()
        ways = {
            "stream, bytes": Way(lambda: stream.ask(stream_bytes)),
            "unary, bytes": Way(lambda: unary(unary_bytes, timeout=30.0)),
        }
        client = stack.enter_context(Client(address, transport="ring"))
        counts = step.by(client, named=False)
        others = [1000 + sequence for sequence in step.ids]
        client.open_sequences(others)
        message = step.message(info.epoch, 0, others).SerializeToString()
        ways["ring, bytes"] = Way(bare_ring(address, info, message))
        ways["ring, client counts"] = Way(counts)
        for transport in _GRPC:
            client = stack.enter_context(Client(address, transport=transport))
            ways[f"{transport}, client"] = Way(step.by(client, named=True))
            ways[f"{transport}, client counts"] = Way(step.by(client, named=False))
        for way in ways.values():
            way.run(_IN_A_ROW)
            way.forget()
        for _ in range(calls // _IN_A_ROW):
            for way in ways.values():
                way.run(_IN_A_ROW)
    return ways


def bare_ring(address: str, info: Info, message: bytes) -> Callable[[], object]:
    """A call of a link alone, with a message made beforehand."""
    link = open_link(Core(Endpoint(address), None, 30.0), info, 30.0)

    def call() -> None:
        ticket = link.submit(APPEND_AND_SELECT.number, message, 30.0)
        assert isinstance(ticket, int), ticket
        answer = link.wait(ticket, 30.0)
        assert answer is not None and not answer[0], answer

    return call


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000, help="of each way")
    parser.add_argument("--sequences", type=int, default=8)
    arguments = parser.parse_args()
    print(f"{len(os.sched_getaffinity(0))} cores; us a call, medians")
    print(f"{'':24}{'clock':>12}{'thread CPU':>12}{'process CPU':>12}{'sleeps':>12}")
    with null_server() as address:
        for name, way in measure(address, arguments.sequences, arguments.calls).items():
            print(f"{name:24}{way.row()}")


if __name__ == "__main__":
    main()
