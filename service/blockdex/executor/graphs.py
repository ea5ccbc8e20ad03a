"""Decode steps captured in CUDA graphs: one copy in, the kernels, block ids straight into the host's memory."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from blockdex.executor.interface import (
    MAX_RUNS,
    MAX_TOKENS,
    Answer,
    Pending,
    Replay,
    Step,
    StepBuffer,
    check_patience,
    on_host,
    step_buffer_bytes,
    step_buffer_ids,
)
from blockdex_kernels.interface import Selection, Spans
from blockdex_kernels.spec import IndexSpec
from blockdex_kernels.triton.backend import TritonBackend

LENGTHS = (1, 2, 4, 8, 16)
WIDTHS = (256, 1024, 8192)
"""Blocks of the longest sequence: 32,768, 131,072 and 1,048,576 tokens."""
MAX_PLACES = 1 << 20
"""Tokens times blocks: their scores take 4 MiB a head, of which graphs keep one buffer."""

_RUNS = [1 << power for power in range(MAX_RUNS.bit_length())]
_COLUMNS = 4
_ITEM_BYTES = 2
_UNWRITTEN = -2
"""Less than any block id, and than the -1 of a place without one."""
_LOOK_SECONDS = 0.001


class Shape(NamedTuple):
    """What steps are padded to, to share a graph.

    Attributes:
        runs: runs.
        length: tokens of each.
        heads: of the queries; 0 where there are none.
        width: blocks that no run exceeds.
        appends: whether there are keys.
    """

    runs: int
    length: int
    heads: int
    width: int
    appends: bool

    @classmethod
    def of(cls, step: Step, spec: IndexSpec) -> Shape | None:
        """The shape that holds a step; None for one that graphs are not made for."""
        keys, queries = step.keys, step.queries
        if step.return_scores or step.order != "ascending":
            return None
        if any(packed is not None and packed.dtype != torch.bfloat16 for packed in (keys, queries)):
            return None
        num_runs, blocks = step.columns.shape[1], -(-step.end // spec.block_size)
        if num_runs > MAX_RUNS or step.longest > LENGTHS[-1] or blocks > WIDTHS[-1]:
            return None
        runs = 1 << (num_runs - 1).bit_length()
        length = 1 << (step.longest - 1).bit_length()
        heads = 0 if queries is None else queries.heads
        width = next(width for width in WIDTHS if width >= blocks) if heads else WIDTHS[0]
        shape = cls(runs, length, heads, width, keys is not None)
        return shape if shape.is_small() else None

    def is_small(self) -> bool:
        """Whether a graph may keep room for it."""
        return self.tokens <= MAX_TOKENS and self.tokens * self.width <= MAX_PLACES

    @property
    def tokens(self) -> int:
        """Rows of keys and queries, padded ones included."""
        return self.runs * self.length

    def parts(self, head_dim: int) -> tuple[int, int, int]:
        """Where in a step's bytes, which begin with the columns, keys and queries begin, and where all of it ends."""
        keys = 4 * _COLUMNS * max(self.runs, 4)  # so that what follows lies at a multiple of 16 bytes
        queries = keys + (_ITEM_BYTES * head_dim * self.tokens if self.appends else 0)
        return keys, queries, queries + _ITEM_BYTES * head_dim * self.tokens * self.heads


def widths(spec: IndexSpec) -> list[int]:
    """Those that sequences of an indexer may need."""
    return [width for width, less in zip(WIDTHS, (0, *WIDTHS), strict=False) if less < spec.max_blocks]


def shapes(spec: IndexSpec) -> Iterator[Shape]:
    """What is captured at the start for steps of the engine's batches: keys alone, and queries of ranks alike."""
    for runs in _RUNS:
        yield Shape(runs, 1, 0, WIDTHS[0], appends=True)
    ranks = [heads for heads in range(1, spec.num_index_heads + 1) if spec.num_index_heads % heads == 0]
    every = (
        Shape(runs, 1, heads, width, appends=False)
        for runs, width, heads in itertools.product(_RUNS, widths(spec), ranks)
    )
    yield from filter(Shape.is_small, every)


def step_buffer_shapes(spec: IndexSpec) -> list[Shape]:
    """What is captured at the start for steps in rooms, which append and select for all heads; smallest first."""
    every = [
        Shape(runs, length, spec.num_index_heads, width, appends=True)
        for runs, width, length in itertools.product(_RUNS, widths(spec), LENGTHS)
    ]
    return sorted(filter(Shape.is_small, every), key=lambda shape: (shape.tokens * shape.width, shape.runs))


class _Slot:
    """StepBuffer for one step on its way, shared by all graphs that use it; they run one after the other."""

    def __init__(self, spec: IndexSpec, device: torch.device) -> None:
        num_bytes = step_buffer_bytes(spec)
        self.host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)
        self.memory = memoryview(self.host.numpy().data)
        self.there = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self.block_ids = torch.zeros(step_buffer_ids(spec), dtype=torch.int32, pin_memory=True)
        self.written = self.block_ids.numpy()


class Graphs:
    """Graphs of the steps that engines make all the time, one for each shape and slot; more are captured as asked for.

    Args:
        backend: whose kernels they hold.
        stream: where they run.
        tables: int32 `[rows, W]`, the page tables on the device.
        slots: steps that may be on their way at once.
    """

    def __init__(self, backend: TritonBackend, stream: torch.cuda.Stream, tables: torch.Tensor, slots: int) -> None:
        self._backend, self._stream, self._tables = backend, stream, tables
        self._graphs: dict[tuple[Shape, int], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        spec = backend.spec
        self._slots = [_Slot(spec, backend.device) for _ in range(slots)]
        self._next = 0
        self._head_dim, self._topk = spec.head_dim, spec.topk

    def step_buffers(self) -> list[StepBuffer]:
        """The memory of the slots."""
        return [StepBuffer(slot.host.numpy(), slot.written) for slot in self._slots]

    def replays(self) -> list[Replay]:
        """What is captured, in the order in which it was."""
        captured = dict.fromkeys(shape for shape, _ in self._graphs)
        return [Replay(shape.runs, shape.length, shape.width, self._programs(shape)) for shape in captured]

    def _programs(self, shape: Shape) -> tuple[int, ...]:
        return tuple(self._graphs[shape, number].raw_cuda_graph_exec() for number in range(len(self._slots)))

    def move(self, tables: torch.Tensor) -> None:
        """Forgets what is captured, which reads other page tables; none of it is on its way."""
        self._tables = tables
        self._graphs.clear()

    def begin(self, shape: Shape, step: Step) -> Pending:
        """Begins a step of a shape, in the slot whose turn it is: the step before it there must be answered."""
        number = self._next
        if (shape, number) not in self._graphs:
            self._capture(shape, number)
        slot = self._slots[number]
        self._fill(slot.memory, shape, step)
        written = slot.written[: shape.tokens * shape.heads * self._topk]
        written.fill(_UNWRITTEN)
        self._graphs[shape, number].replay()
        self._next = (number + 1) % len(self._slots)
        if not shape.heads:
            return Launched(None, self._stream)
        return _Replay(written, (step.num_tokens, shape.heads, self._topk), self._stream)

    def _fill(self, memory: memoryview, shape: Shape, step: Step) -> None:
        keys_at, queries_at, _ = shape.parts(self._head_dim)
        columns = np.frombuffer(memory, np.int32, _COLUMNS * shape.runs).reshape(_COLUMNS, shape.runs)
        num_runs = step.columns.shape[1]
        columns[:, :num_runs] = step.columns
        columns[2, num_runs:] = 0  # Runs of length 0 are padding.
        for packed, begin in ((step.keys, keys_at), (step.queries, queries_at)):
            at = begin
            for part in packed.parts if packed is not None else ():
                memory[at : at + len(part)] = part
                at += len(part)

    def capture(self, shape: Shape) -> None:
        """Captures a shape for every slot, none of which is in use; compiles what kernels have left to compile."""
        for number in range(len(self._slots)):
            self._capture(shape, number)

    def _capture(self, shape: Shape, number: int) -> None:
        slot = self._slots[number]
        columns = np.frombuffer(slot.memory, np.int32, _COLUMNS * shape.runs)
        columns[:] = 0
        self._run(shape, slot)  # What is compiled now, or allocated for good, must not be so while it is captured.
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            self._run(shape, slot)
        self._graphs[shape, number] = graph

    def _run(self, shape: Shape, slot: _Slot) -> None:
        backend, head_dim = self._backend, self._head_dim
        keys_at, queries_at, end = shape.parts(head_dim)
        slot.there[:end].copy_(slot.host[:end], non_blocking=True)
        columns = slot.there[: 4 * _COLUMNS * shape.runs].view(torch.int32).view(_COLUMNS, shape.runs)
        layers, starts, lengths, rows = columns
        spans = Spans(layers, starts, lengths, self._tables, None, shape.length, rows, shape.width)
        if shape.appends:
            backend.append(slot.there[keys_at:queries_at].view(torch.bfloat16).view(-1, head_dim), spans)
        if not shape.heads:
            return
        queries = slot.there[queries_at:end].view(torch.bfloat16).view(-1, shape.heads, head_dim)
        block_ids = slot.block_ids[: shape.tokens * shape.heads * self._topk].view(-1, shape.heads, self._topk)
        backend.decode_into(Selection(block_ids, None), queries, spans, order="ascending")


class Launched(Pending):
    """A step that is done once its stream has come so far; with its selection on the host then."""

    def __init__(self, selection: Selection | None, stream: torch.cuda.Stream) -> None:
        self._selection = selection
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(stream)
        self._began = time.monotonic()

    def done(self) -> bool:
        """See `Pending.done`."""
        if not self._event.query():  # type: ignore[no-untyped-call]
            check_patience(self._began)
            return False
        self.device_seconds = time.monotonic() - self._began
        return True

    def answer(self) -> Answer | None:
        """See `Pending.answer`."""
        return None if self._selection is None else on_host(self._selection)


class _Replay(Pending):
    """A graph that was launched: done once the device has written every block id."""

    def __init__(self, written: np.ndarray, shape: tuple[int, int, int], stream: torch.cuda.Stream) -> None:
        self._written, self._shape, self._stream = written, shape, stream
        self._began = self._looked = time.monotonic()

    def done(self) -> bool:
        """See `Pending.done`."""
        if self._written.min() == _UNWRITTEN:
            now = time.monotonic()
            if now - self._looked > _LOOK_SECONDS:
                self._looked = now
                self._stream.query()  # raises where the device has failed
                check_patience(self._began)
            return False
        self.device_seconds = time.monotonic() - self._began
        return True

    def answer(self) -> Answer | None:
        """See `Pending.answer`."""
        tokens, heads, topk = self._shape
        return Answer(self._written[: tokens * heads * topk].reshape(self._shape).copy(), None)
