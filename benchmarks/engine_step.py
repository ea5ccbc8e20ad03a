"""A decode step inside the engine core, from message to answer, and its kernels alone, called from the host.

The engine is a real one on its own thread, without a server round it. Its inbox hands out a request as soon as the one
before is answered, on the engine's thread, so that no other thread comes in between.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from blockdex.engine.engine import Engine
from blockdex.engine.entry import Entry, Outcome
from blockdex.messages import Keys, Limits, OpenSequence, Queries, Request, Spans, TensorData, TokenRequest
from blockdex_kernels import IndexSpec
from blockdex_kernels.backend import Backend, choose_backend
from blockdex_kernels.backend import Spans as KernelSpans

Call = Callable[[], object]

_LIMITS = Limits(
    max_message_bytes=1 << 27, max_spans=64, max_queued_requests=64, max_stream_requests=64, max_wait_ms=60_000
)
_PATIENCE_SECONDS = 120.0
_WARM_UP = 0.2  # Of the time of a measurement, before it.
_FEWEST = 5


@dataclass(frozen=True)
class Shapes:
    """What is asked of engine and kernels.

    Attributes:
        layers: L, walked round.
        sequences: of a decode step, each of `tokens` tokens.
        tokens: a multiple of the block size.
        prefill_queries: of a prefill, the last positions of one sequence.
        prefill_tokens: tokens of that sequence, a multiple of the block size.
    """

    layers: int
    sequences: int
    tokens: int
    prefill_queries: int
    prefill_tokens: int


@dataclass(frozen=True)
class Steps:
    """Microseconds of every measured call.

    Attributes:
        engine: of a decode step in the engine, from the time stamp of its message to its answer.
        kernels: of its append and decode alone, on tensors that are on the device, until the host may read the answer.
        prefill: of a prefill alone, likewise.
        made_by: the kernels, by phase.
    """

    engine: list[float]
    kernels: list[float]
    prefill: list[float]
    made_by: dict[str, str]


class Turns:
    """An inbox with one request at a time, and the place where its answer goes.

    Args:
        requests: what is handed out, the next one when the last is answered.

    Attributes:
        seconds: of every request, from its time stamp to its answer.
        done: set when all are answered, or one failed.
        failure: with which.
    """

    def __init__(self, requests: Iterator[Request]) -> None:
        self.seconds: list[float] = []
        self.done = threading.Event()
        self.failure: Exception | None = None
        self._requests = requests
        self._in_flight = False
        self._woken: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()

    def put(self, item: Entry | None) -> None:
        """As `Inbox.put`."""
        self._woken.put(item)

    def get(self, block: bool = True, timeout: float | None = None) -> Entry | None:
        """As `Inbox.get`, on the engine's thread."""
        if self._in_flight:
            raise queue.Empty
        if not self.done.is_set():
            request = next(self._requests, None)
            if request is not None:
                self._in_flight = True
                return Entry(request, deadline=time.monotonic() + _PATIENCE_SECONDS, ticket=None)
            self.done.set()
        return self._woken.get(block, timeout)

    def qsize(self) -> int:
        """As `Inbox.qsize`."""
        return self._woken.qsize()

    def empty(self) -> bool:
        """As `Inbox.empty`."""
        return self._woken.empty()

    def deliver(self, outcomes: Sequence[Outcome]) -> None:
        """Takes the answer, on the engine's thread."""
        now = time.monotonic()
        ((entry, answer),) = outcomes
        self.seconds.append(now - entry.received)
        self._in_flight = False
        if isinstance(answer, Exception):
            self.failure = answer
            self.done.set()


def measure(device: str, shapes: Shapes, seconds: float) -> Steps:
    """Measures the engine's step, then its kernels alone, then a prefill alone, `seconds` each."""
    spec = IndexSpec(num_layers=shapes.layers)
    blocks = (shapes.sequences * shapes.tokens, shapes.prefill_tokens)
    backend = choose_backend(device, spec, max(blocks) // spec.block_size + 1)
    backend.use_device()
    engine = _engine_us(backend, shapes, seconds)
    backend.pages[:, 0].normal_()
    kernels = [_captured(call, backend) for call in _decode_calls(backend, shapes)]
    return Steps(
        engine,
        _from_host_us(kernels, backend, seconds),
        _from_host_us([_prefill_call(backend, shapes)], backend, seconds / 2),
        {phase: name for phase, (name, _) in backend.kernels.items()},
    )


def _engine_us(backend: Backend, shapes: Shapes, seconds: float) -> list[float]:
    """Microseconds of every step after the warm-up."""
    contexts = list(_contexts(backend.spec, shapes))
    skipped = len(contexts)

    def requests() -> Iterator[Request]:
        nonlocal skipped
        yield from contexts
        steps = itertools.cycle([_step(backend.spec, layer, shapes) for layer in range(shapes.layers)])
        warm = time.monotonic() + _WARM_UP * seconds
        while time.monotonic() < warm:
            skipped += 1
            yield next(steps)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            yield next(steps)

    turns = Turns(requests())
    engine = Engine(backend, limits=_LIMITS, inbox=turns)
    for _ in engine.warm_up():
        pass
    engine.start(turns.deliver)
    try:
        if not turns.done.wait(_PATIENCE_SECONDS + seconds):
            raise TimeoutError(f"engine: no answer in {_PATIENCE_SECONDS} s")
    finally:
        engine.stop()
    if turns.failure is not None:
        raise turns.failure
    return [1e6 * each for each in turns.seconds[skipped:]]


def _contexts(spec: IndexSpec, shapes: Shapes) -> Iterator[Request]:
    """Opens the sequences and fills them up to the last token but one, in every layer."""
    for sequence in range(shapes.sequences):
        yield OpenSequence("benchmark", 0, sequence, 0)
    before = shapes.tokens - 1
    keys = _numbers(shapes.sequences * before, spec.head_dim)
    for layer in range(shapes.layers):
        yield TokenRequest("benchmark", 0, layer, _spans(shapes.sequences, 0, before), Keys(keys), None)


def _step(spec: IndexSpec, layer: int, shapes: Shapes) -> TokenRequest:
    """Appends the last token of every sequence (again) and selects for it."""
    heads = spec.num_index_heads
    keys = Keys(_numbers(shapes.sequences, spec.head_dim))
    queries = Queries(_numbers(shapes.sequences, heads, spec.head_dim), 0, heads, "ascending", False, False)
    return TokenRequest("benchmark", 0, layer, _spans(shapes.sequences, shapes.tokens - 1, 1), keys, queries)


def _spans(sequences: int, start: int, length: int) -> Spans:
    ids = np.arange(sequences, dtype=np.uint64)
    return Spans(ids, np.full(sequences, start), np.full(sequences, length), np.zeros(sequences, np.uint64))


def _numbers(*shape: int) -> TensorData:
    return TensorData("bf16", torch.randn(shape).bfloat16().view(torch.uint8).numpy().tobytes())


def _decode_calls(backend: Backend, shapes: Shapes) -> list[Call]:
    """Append and decode of the same step, one call for each layer."""
    return [_decode_call(backend, shapes, layer) for layer in range(shapes.layers)]


def _decode_call(backend: Backend, shapes: Shapes, layer: int) -> Call:
    spec, runs = backend.spec, shapes.sequences
    keys = torch.randn(runs, spec.head_dim, device=backend.device).bfloat16()
    queries = torch.randn(runs, spec.num_index_heads, spec.head_dim, device=backend.device).bfloat16()
    spans = _kernel_spans(backend, [layer] * runs, shapes.tokens - 1, 1, shapes.tokens)

    def call() -> object:
        backend.append(keys, spans)
        return backend.decode(queries, spans, order="ascending", return_scores=False)

    return call


def _prefill_call(backend: Backend, shapes: Shapes) -> Call:
    spec, length = backend.spec, shapes.prefill_queries
    queries = torch.randn(length, spec.num_index_heads, spec.head_dim, device=backend.device).bfloat16()
    spans = _kernel_spans(backend, [0], shapes.prefill_tokens - length, length, shapes.prefill_tokens)
    return lambda: backend.prefill(queries, spans, order="ascending", return_scores=False)


def _kernel_spans(backend: Backend, layers: list[int], start: int, length: int, tokens: int) -> KernelSpans:
    """Runs at the ends of sequences of so many tokens, whose pages lie one behind the other."""
    blocks = tokens // backend.spec.block_size
    columns: NDArray[np.int32] = np.array([layers, [start] * len(layers), [length] * len(layers)], np.int32)
    there = torch.from_numpy(columns).to(backend.device)
    table = torch.arange(len(layers) * blocks, dtype=torch.int32, device=backend.device).view(len(layers), blocks)
    return KernelSpans(there[0], there[1], there[2], table, columns, length)


def _captured(call: Call, backend: Backend) -> Call:
    """The call as a replay of its CUDA graph; on a CPU as it is. What it reads must be kept by who calls it."""
    call()
    if backend.device.type == "cpu":
        return call
    backend.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay(_reads: Call = call) -> None:
        graph.replay()

    return replay


def _from_host_us(calls: Sequence[Call], backend: Backend, seconds: float) -> list[float]:
    """Microseconds of calls in turn, from the call to the moment at which the host may read the answer."""
    samples: list[float] = []
    end = time.perf_counter() + (1 + _WARM_UP) * seconds
    for call in itertools.cycle(calls):
        began = time.perf_counter()
        if began > end and len(samples) >= _FEWEST:
            break
        call()
        backend.synchronize()
        samples.append(1e6 * (time.perf_counter() - began))
    return samples[int(_WARM_UP * len(samples)) :]
