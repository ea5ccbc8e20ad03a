"""A decode step inside the engine core, from message to answer, and its kernels alone, called from the host.

The engine is a real one on its own thread, behind a real ring, without a server round it: a request is written as soon
as the one before is answered.

python -m benchmarks.engine_step [cpu|cuda]     calls of every kind beside the plain one; on a CPU without kernels
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.environment import RESULTS, environment, slug
from benchmarks.ring_messages import Keys, Queries, Request, Spans, TensorData, TokenRequest, read_answer, write_request
from blockdex.cache import TABLE_ROW
from blockdex.contract.errors import BlockdexError
from blockdex.contract.messages import CreatePool, Limits, OpenSequences, SetPageTables
from blockdex.executor.factory import make_executor
from blockdex.ring.codec import stage_seconds_of
from blockdex.ring.handshake import new_link
from blockdex.ring.layout import AT, REQUEST, SLOT_BYTES
from blockdex.ring.listener import sizes_of
from blockdex.ring.segment import Sizes
from blockdex.ring.server import RingInbox, ServerLink
from blockdex.scheduler.loop import Engine
from blockdex_kernels import IndexSpec
from blockdex_kernels.cpu import CpuBackend
from blockdex_kernels.dispatch import choose_backend
from blockdex_kernels.interface import Backend, Order, Selection
from blockdex_kernels.interface import Spans as KernelSpans

Call = Callable[[], object]

_LIMITS = Limits(
    max_message_bytes=1 << 27, max_spans=64, max_queued_requests=64, max_stream_requests=64, max_wait_ms=60_000
)
_PATIENCE_SECONDS = 120.0
_WARM_UP = 0.2  # Of the time of a measurement, before it.
_FEWEST = 5
_GROWTHS = 9
_SPIN_SECONDS = 0.002
_POOL = 1
_OFFSETS = {field.name: field.offset for field in REQUEST}
_RECEIVED_AT, _LAYER_AT = _OFFSETS["received"], _OFFSETS["layer"]


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


class Asker:
    """A frontend's end of a ring to an engine, one request at a time.

    What is timed is the engine's own: from the time stamp of a request, taken right before it is shown, to the answer's
    being written.

    Args:
        inbox: of the engine, which is started.
        epoch: of its cache.
        sizes: of the shared memory.
    """

    def __init__(self, inbox: RingInbox, epoch: int, sizes: Sizes) -> None:
        engine, self._handles = new_link(sizes, epoch)
        self._segment = self._handles.segment
        self._line = ServerLink(engine, hang_up=lambda _: None, tell=lambda _: None)
        inbox.add(self._line)
        self._asked = 0

    def write(self, request: Request) -> bytes:
        """A request's slot, as `ask` takes it, again and again; its payload lies at the arena's beginning."""
        far = time.monotonic() + 1e6
        write_request(self._segment, self._segment.request_slots_offset, 0, 1, request, 0.0, far)
        begin = self._segment.request_slots_offset
        return bytes(self._segment.memory[begin : begin + SLOT_BYTES])

    def ask(self, slot: bytes) -> float:
        """Asks for what is written in the arena, and waits for the answer: seconds in the engine.

        Raises:
            TimeoutError: it does not come.
            BlockdexError: it is one.
        """
        return self.wait(self.show(slot))

    def show(self, slot: bytes) -> int:
        """Asks; answers the number that `wait` takes."""
        segment, number = self._segment, self._asked
        at = segment.request_slots_offset + number % segment.request_slots * SLOT_BYTES
        segment.memory[at : at + SLOT_BYTES] = slot
        self._asked += 1
        segment.counters[(at + _RECEIVED_AT) // 8] = time.monotonic_ns()
        segment.counters[AT["requests_written"] // 8] = self._asked
        self._ring()
        return number

    def wait(self, number: int) -> float:
        """Waits for an answer: seconds in the engine."""
        segment = self._segment
        end = time.monotonic() + _PATIENCE_SECONDS
        while segment.counters[AT["answers_written"] // 8] == number:
            if time.monotonic() > end:
                raise TimeoutError(f"engine: no answer in {_PATIENCE_SECONDS} s")
            time.sleep(0)  # Where the engine's thread needs Python, it is not to wait for this one.
        return self._take(number)

    def _ring(self) -> None:
        """Wakes the engine where it sleeps: before the first requests, that is."""
        flags, at = self._segment.memory.cast("I"), AT["engine_sleeps"] // 4
        if flags[at]:
            flags[at] = 0
            os.write(self._handles.engine_bell, b"0")

    def _take(self, number: int) -> float:
        segment = self._segment
        slot = segment.answer_slots_offset + number % segment.answer_slots * SLOT_BYTES
        numbers, answer = read_answer(segment, slot)
        if isinstance(answer, BlockdexError):
            raise answer
        if numbers.payload_bytes:
            segment.counters[AT["answer_bytes_freed"] // 8] = numbers.payload_end
        segment.counters[AT["answers_read"] // 8] = number + 1
        return sum(stage_seconds_of(numbers).values())

    def close(self, inbox: RingInbox) -> None:
        """Goes, as a frontend does."""
        inbox.drop(self._line)


_BEHIND_CELLS = "rows of a pool, as they are set"
"""64 rows x 8 cells."""


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
    with _asked(backend, shapes) as (asker, *_):
        return [1e6 * each for each in _steps(asker, backend.spec, shapes, seconds)]


@contextmanager
def _asked(backend: Backend, shapes: Shapes) -> Iterator[list[Asker]]:
    """An engine whose sequences are filled, and four links to it."""
    inbox = RingInbox(spin_seconds=_SPIN_SECONDS)
    engine = Engine(backend, limits=_LIMITS, inbox=inbox)
    for _ in engine.warm_up():
        pass
    engine.start()
    askers = [Asker(inbox, engine.info().epoch, sizes_of(backend.spec, _LIMITS)) for _ in range(4)]
    try:
        for request in _contexts(backend.spec, shapes):
            askers[0].ask(askers[0].write(request))
        yield askers
    finally:
        for asker in askers:
            asker.close(inbox)
        engine.stop()


class NullBackend(CpuBackend):
    """No kernels: what is left of a step is the core and the way to the kernels."""

    def append(self, keys: torch.Tensor, spans: KernelSpans) -> None:
        """Writes nothing."""

    def decode(
        self,
        queries: torch.Tensor,
        spans: KernelSpans,  # noqa: ARG002
        *,
        order: Order,  # noqa: ARG002
        return_scores: bool,
        raw_scores: bool = False,  # noqa: ARG002
    ) -> Selection:
        """Block 0, again and again."""
        ids = torch.zeros((*queries.shape[:2], self.spec.topk), dtype=torch.int32)
        return Selection(ids, ids.float() if return_scores else None)


def measure_kinds(device: str, seconds: float) -> dict[str, float]:
    """Median microseconds of calls of every kind, in turn, 8 sequences at 8,192; on a CPU without its kernels."""
    shapes = Shapes(layers=4, sequences=8, tokens=8192, prefill_queries=1, prefill_tokens=128)
    spec = IndexSpec(num_layers=shapes.layers)
    num_pages = 2 * shapes.sequences * shapes.tokens // spec.block_size  # as many again for the pool
    backend = (
        NullBackend(spec, num_pages, reason="no kernels")
        if device == "cpu"
        else choose_backend(device, spec, num_pages)
    )
    with _asked(backend, shapes) as askers:
        kinds = _kinds(askers, spec, shapes)
        samples: dict[str, list[float]] = {kind: [] for kind in kinds}
        end = time.monotonic() + len(kinds) * seconds
        while time.monotonic() < end:
            for kind, call in kinds.items():
                samples[kind] += [1e6 * call() for _ in range(20)]
    return {kind: median(taken[len(taken) // 5 :]) for kind, taken in samples.items()}


def _kinds(askers: Sequence[Asker], spec: IndexSpec, shapes: Shapes) -> dict[str, Callable[[], float]]:
    plain = _step(spec, 0, shapes)
    assert plain.keys is not None and plain.queries is not None
    heads = spec.num_index_heads
    tensor = _numbers(shapes.sequences, heads, spec.head_dim)
    wide = TensorData("fp32", torch.randn(shapes.sequences, heads, spec.head_dim).numpy().tobytes())
    wide_keys = TensorData("fp32", torch.randn(shapes.sequences, spec.head_dim).numpy().tobytes())
    half = replace(plain.queries, tensor=_numbers(shapes.sequences, heads // 2, spec.head_dim), num_heads=heads // 2)
    asked: dict[str, Request] = {
        "plain": plain,
        "half of the heads": replace(plain, queries=half),
        "select alone": replace(plain, keys=None),
        "append alone": replace(plain, queries=None),
        "float32": replace(plain, keys=Keys(wide_keys, True), queries=replace(plain.queries, tensor=wide)),
        "by score, with scores": replace(
            plain, queries=replace(plain.queries, tensor=tensor, order="score", return_scores=True)
        ),
        "rows of a pool": replace(plain, pool_id=_POOL),
        "pages of a pool": replace(plain, pool_id=_POOL, queries=replace(plain.queries, pages=True)),
    }
    cells = _cells(shapes, spec, range(64), 8)
    for request in _pool(spec, shapes):
        askers[0].ask(askers[0].write(request))

    def ask(request: Request) -> float:
        slot = askers[0].write(request)
        return askers[0].ask(slot)

    revision = itertools.count(1)

    def ranks() -> float:
        number = next(revision)
        own = [_rank(plain, spec, head, number) for head in range(heads)]
        slots = [asker.write(request) for asker, request in zip(askers, own, strict=True)]
        shown = [asker.show(slot) for asker, slot in zip(askers[::-1], slots[::-1], strict=True)]
        return max(asker.wait(number) for asker, number in zip(askers[::-1], shown, strict=True))

    def rows_behind_cells() -> float:
        # Both are there at once: who writes the cells is not seen by their own answer, but by who reads them.
        pair = [
            (asker, asker.write(each)) for asker, each in zip(askers, (cells, asked["rows of a pool"]), strict=False)
        ]
        shown = [(asker, asker.show(slot)) for asker, slot in pair]
        return [asker.wait(number) for asker, number in shown][-1]

    calls = {kind: partial(ask, request) for kind, request in asked.items()}
    return calls | {_BEHIND_CELLS: rows_behind_cells, "4 links of a head": ranks}


def _pool(spec: IndexSpec, shapes: Shapes) -> Iterator[Request]:
    """Creates a pool whose first rows are as long as the sequences, all with pages of their own."""
    blocks = shapes.tokens // spec.block_size
    yield CreatePool("benchmark", 0, _POOL, shapes.sequences * blocks, 64, blocks)
    yield _cells(shapes, spec, range(shapes.sequences), blocks)


def _cells(shapes: Shapes, spec: IndexSpec, rows: range, count: int) -> SetPageTables:
    """Sets the first cells of rows, those of as many as there are sequences to pages of their own."""
    blocks = shapes.tokens // spec.block_size
    firsts = [blocks * (row % shapes.sequences) for row in rows]
    pages = [page for first in firsts for page in range(first, first + count)]
    return SetPageTables("benchmark", 0, _POOL, rows, [0] * len(rows), [count] * len(rows), pages)


def _rank(plain: TokenRequest, spec: IndexSpec, head: int, revision: int) -> TokenRequest:
    """What one of the ranks asks: the first appends, the others wait for its revision."""
    assert plain.queries is not None
    count = len(plain.spans.lengths)
    tensor = TensorData("bf16", bytes(2 * count * spec.head_dim))
    queries = replace(plain.queries, tensor=tensor, first_head=head, num_heads=1, wait_for_keys=head > 0)
    spans = replace(plain.spans, revisions=np.full(count, revision, np.uint64))
    return replace(plain, layer=1, spans=spans, keys=None if head else plain.keys, queries=queries)


def _steps(asker: Asker, spec: IndexSpec, shapes: Shapes, seconds: float) -> list[float]:
    """Seconds of every step after the warm-up: the layers in turn, with the same numbers."""
    slot = asker.write(_step(spec, 0, shapes))
    slots = [slot[:_LAYER_AT] + layer.to_bytes(4, "little") + slot[_LAYER_AT + 4 :] for layer in range(spec.num_layers)]
    samples: list[float] = []
    warm = time.monotonic() + _WARM_UP * seconds
    skipped = 0
    for each in itertools.cycle(slots):
        now = time.monotonic()
        if now > warm + seconds and len(samples) - skipped >= _FEWEST:
            return samples[skipped:]
        samples.append(asker.ask(each))
        if now < warm:
            skipped = len(samples)
    raise AssertionError("layers: there is none")


def _contexts(spec: IndexSpec, shapes: Shapes) -> Iterator[Request]:
    """Opens the sequences and fills them up to the last token but one, in every layer."""
    for sequence in range(shapes.sequences):
        yield OpenSequences("benchmark", 0, (sequence,), (0,))
    before = shapes.tokens - 1
    keys = _numbers(shapes.sequences * before, spec.head_dim)
    for layer in range(shapes.layers):
        yield TokenRequest("benchmark", 0, layer, _spans(shapes.sequences, 0, before), Keys(keys), None)
    for layer in range(shapes.layers):
        yield _step(spec, layer, shapes)


def _step(spec: IndexSpec, layer: int, shapes: Shapes) -> TokenRequest:
    """Appends the last token of every sequence (again) and selects for it."""
    heads = spec.num_index_heads
    keys = Keys(_numbers(shapes.sequences, spec.head_dim), rollback=True)
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


def measure_growth(device: str) -> dict[str, dict[str, float]]:
    """Microseconds for which the engine's thread stands still while the tables grow, by their cells afterwards."""
    backend = choose_backend(device, IndexSpec(num_layers=1), 64)
    held: dict[str, list[float]] = {}
    for _ in range(_GROWTHS):
        executor = make_executor(backend, TABLE_ROW)
        executor.use_device()
        for power in range(16, 26):
            cells = np.zeros(1 << power, np.int32)
            changes = np.arange(len(cells) - TABLE_ROW, len(cells))
            backend.synchronize()
            began = time.perf_counter()
            executor.write_tables(cells, changes)
            held.setdefault(str(len(cells)), []).append(1e6 * (time.perf_counter() - began))
    return {cells: {"median": median(times), "longest": max(times)} for cells, times in held.items()}


def main() -> None:
    """Prints and writes the medians, and what they are of the plain call's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", nargs="?", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=2.0, help="for which each kind of call is measured")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON")
    arguments = parser.parse_args()
    medians = measure_kinds(arguments.device, arguments.seconds)
    for kind, microseconds in medians.items():
        print(f"{kind:24} {microseconds:8.1f} us  {microseconds / medians['plain']:.2f}x")
    print(f"{'64 rows x 8 cells':24} {medians[_BEHIND_CELLS] - medians['rows of a pool']:8.1f} us")
    growth = measure_growth(arguments.device)
    for name in ("median", "longest"):
        print(f"{f'tables grow, {name}':24} {max(times[name] for times in growth.values()):8.1f} us")
    facts = environment("blockdex", "numpy", "torch", device=torch.device(arguments.device))
    device = facts["machine"]["gpu"]["name"] if "gpu" in facts["machine"] else "cpu"
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"engine-step-{slug(device)}.json"
    path.write_text(
        json.dumps(facts | {"microseconds": medians, "growth_microseconds": growth}, indent=2) + "\n", "utf-8"
    )
    print(f"written: {path}")


if __name__ == "__main__":
    main()
