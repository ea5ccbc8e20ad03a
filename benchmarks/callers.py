"""Processes that call a server without pause: as load, and to count what it answers.

Each makes its contexts with the Python client. What it then sends again and again are bytes made beforehand, over one
stream by gRPC alone, so that a caller costs as little as it can, and exactly as much where an echo answers instead.
"""

from __future__ import annotations

import multiprocessing
import queue
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType

import grpc
import ml_dtypes
import numpy as np

from benchmarks.client import HEAD_DIM, HEADS, Fleet, percentile
from benchmarks.doors import connect
from blockdex import Client
from blockdex.v1 import indexer_pb2 as pb

INDEXER, ECHO = "/blockdex.v1.IndexerService/Stream", "/blockdex.benchmarks.Echo/Stream"
MOST_IN_FLIGHT = 4

_START_SECONDS = 120.0
_LONGEST_STREAM_SECONDS = 3600.0
_WARM_UP_SECONDS = 0.5
_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Place:
    """A process that serves: `address` is where, and `pid` which of those that share it."""

    address: str
    pid: int


@dataclass(frozen=True)
class Work:
    """What a caller asks for.

    Attributes:
        first_id: of its sequences.
        sequences: how many of them.
        tokens: of each.
        queries: of each: 1 is AppendAndSelect of its last token (again), more are SelectBlocks of its last positions.
    """

    first_id: int
    sequences: int
    tokens: int
    queries: int = 1


@dataclass(frozen=True)
class Load:
    """What came of calling for a while: answers, in how many seconds, and milliseconds that one took."""

    answers: int
    seconds: float
    p50_ms: float
    p99_ms: float

    @property
    def per_second(self) -> float:
        """Answers a second."""
        return self.answers / self.seconds


@dataclass(frozen=True)
class _Order:
    """What a caller is told: whom to call (`served` or `echo`), how long, and with how many calls in flight."""

    whom: str
    seconds: float
    in_flight: int


class ByteStream:
    """A bidirectional stream of messages as bytes."""

    def __init__(self, channel: grpc.Channel, method: str = INDEXER) -> None:
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        stream: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(method)
        self._answers = stream(iter(self._outbox.get, None), timeout=_LONGEST_STREAM_SECONDS)

    def send(self, message: bytes) -> None:
        """Sends a message; returns at once."""
        self._outbox.put(message)

    def receive(self) -> bytes:
        """Waits for the next answer."""
        return bytes(next(self._answers))

    def ask(self, message: bytes) -> bytes:
        """Sends a message and waits for its answer."""
        self.send(message)
        return self.receive()

    def close(self) -> None:
        """Ends the stream."""
        self._outbox.put(None)


def messages(work: Work, count: int) -> list[bytes]:
    """The same request of a stream `count` times, numbered from 1."""
    random = np.random.default_rng(work.first_id)
    rows = work.sequences * work.queries
    ids = range(work.first_id, work.first_id + work.sequences)
    starts, lengths = [work.tokens - work.queries] * len(ids), [work.queries] * len(ids)
    spans = pb.Spans(sequence_ids=ids, starts=starts, lengths=lengths)
    queries = _tensor(random, rows, HEADS, HEAD_DIM)
    if work.queries > 1:
        select = pb.SelectBlocksRequest(spans=spans, queries=queries)
        frames = (pb.StreamRequest(request_id=number, select_blocks=select) for number in range(1, count + 1))
    else:
        keys = _tensor(random, rows, HEAD_DIM)
        both = pb.AppendAndSelectRequest(spans=spans, keys=keys, queries=queries, rollback=True)
        frames = (pb.StreamRequest(request_id=number, append_and_select=both) for number in range(1, count + 1))
    return [frame.SerializeToString() for frame in frames]


def _tensor(random: np.random.Generator, *shape: int) -> pb.Tensor:
    values = random.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
    return pb.Tensor(dtype=pb.DTYPE_BF16, data=values.tobytes())


def echo_message(request: bytes, answer: bytes) -> bytes:
    """What an echo answers with as many bytes as `answer` has; as long as `request`."""
    return len(answer).to_bytes(4, "little") + bytes(len(request) - 4)


def checked(answer: bytes) -> bytes:
    """The answer.

    Raises:
        RuntimeError: it refuses the request.
    """
    response = pb.StreamResponse.FromString(answer)
    if response.WhichOneof("response") == "error":
        raise RuntimeError(f"refused: {response.error.message}")
    return answer


def call_for(stream: ByteStream, requests: Sequence[bytes], answer_bytes: int, seconds: float) -> Load:
    """Has every request in flight, each again as soon as it is answered, for a warm-up and then `seconds`.

    Raises:
        RuntimeError: an answer has another size: it is an error.
    """
    sent = [time.perf_counter()] * len(requests)
    for request in requests:
        stream.send(request)
    begin = time.perf_counter() + min(_WARM_UP_SECONDS, seconds)
    in_flight, samples = len(requests), []
    while in_flight:
        answer = stream.receive()
        if len(answer) != answer_bytes:
            checked(answer)
            raise RuntimeError(f"an answer of {len(answer)} bytes, where {answer_bytes} were expected")
        now = time.perf_counter()
        number = 0 if len(requests) == 1 else pb.StreamResponse.FromString(answer).request_id - 1
        if begin <= now < begin + seconds:
            samples.append(1e3 * (now - sent[number]))
        if now < begin + seconds:
            sent[number] = now
            stream.send(requests[number])
        else:
            in_flight -= 1
    if not samples:
        raise RuntimeError(f"no answer came inside {seconds} s: a longer time is needed")
    return Load(len(samples), seconds, percentile(samples, 50), percentile(samples, 99))


class Caller:
    """One such process; as a context, ended at its end.

    Args:
        work: what it asks for.
        served: whom: a frontend.
        echo: the process that echoes to it instead, when it is told so.
    """

    def __init__(self, work: Work, served: Place, echo: Place | None = None) -> None:
        self._pipe, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_run, args=(theirs, work, served, echo), daemon=True)
        self._process.start()
        theirs.close()
        self._seconds = 0.0

    def __enter__(self) -> Caller:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.join(timeout=_START_SECONDS)
        if self._process.exitcode is None:
            self._process.kill()

    def ready(self) -> None:
        """Waits until it has made its contexts and its connections."""
        self._receive(_START_SECONDS)

    def start(self, whom: str, seconds: float, in_flight: int = 1) -> None:
        """Has it call `served` or `echo`, with so many calls in flight (`MOST_IN_FLIGHT` at most)."""
        self._seconds = seconds
        self._pipe.send(_Order(whom, seconds, in_flight))

    def result(self) -> Load:
        """Waits for what came of it."""
        load = self._receive(_START_SECONDS + self._seconds)
        assert isinstance(load, Load)
        return load

    def _receive(self, seconds: float) -> object:
        if not self._pipe.poll(seconds):
            raise TimeoutError(f"a caller said nothing in {seconds} s")
        said = self._pipe.recv()
        if isinstance(said, Exception):
            raise said
        return said


def _run(pipe: Connection, work: Work, served: Place, echo: Place | None) -> None:
    """The process: until nobody tells it any more."""
    try:
        _prepare(work, served)
        requests = messages(work, MOST_IN_FLIGHT if work.queries > 1 else 1)
        streams = {"served": ByteStream(connect(served.address, served.pid))}
        answer = checked(streams["served"].ask(requests[0]))
        if echo is not None:
            streams["echo"] = ByteStream(connect(echo.address, echo.pid), ECHO)
        sent = {"served": requests, "echo": [echo_message(requests[0], answer)]}
        pipe.send(None)
        while True:
            order = pipe.recv()
            calls = sent[order.whom][: order.in_flight]
            pipe.send(call_for(streams[order.whom], calls, len(answer), order.seconds))
    except EOFError:
        return
    except Exception as error:
        pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


def _prepare(work: Work, served: Place) -> None:
    with Client(served.address, transport="unary", timeout=_START_SECONDS) as client:
        Fleet(client, work.sequences, work.tokens, work.first_id).step(client)
