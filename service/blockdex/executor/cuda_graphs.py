"""Steps captured in CUDA graphs: what they read is brought in, block ids and scores go straight where they belong."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from blockdex._native import now
from blockdex.executor.interface import (
    COLUMNS,
    MAX_RUNS,
    MAX_TOKENS,
    SIGNALS,
    Answer,
    Pending,
    Replay,
    Step,
    StepBuffer,
    check_patience,
    keys_offset,
    on_host,
    step_buffer_bytes,
    step_buffer_ids,
)
from blockdex_kernels.interface import Selection, Spans
from blockdex_kernels.spec import IndexSpec
from blockdex_kernels.triton.backend import TritonBackend
from blockdex_kernels.triton.rank import Signals
from blockdex_kernels.triton.stage import stage

LENGTHS = (1, 2, 4, 8, 16)
WIDTHS = (256, 1024, 8192)
"""Blocks of the longest sequence: 32,768, 131,072 and 1,048,576 tokens."""
MAX_PLACES = 1 << 20
"""Tokens times blocks: their scores take 4 MiB a head, of which graphs keep one buffer."""

_RUNS = [1 << power for power in range(MAX_RUNS.bit_length())]
_ITEM_BYTES = 2


class Shape(NamedTuple):
    """What steps are padded to, to share a graph.

    Attributes:
        runs: runs.
        length: tokens of each.
        width: blocks that no run exceeds.
    """

    runs: int
    length: int
    width: int

    def is_small(self) -> bool:
        """Whether a graph may keep room for it."""
        return self.tokens <= MAX_TOKENS and self.tokens * self.width <= MAX_PLACES

    @property
    def tokens(self) -> int:
        """Rows of keys and queries, padded ones included."""
        return self.runs * self.length


def widths(spec: IndexSpec) -> list[int]:
    """Those that sequences of an indexer may need."""
    return [width for width, less in zip(WIDTHS, (0, *WIDTHS), strict=False) if less < spec.max_blocks]


def shapes(spec: IndexSpec) -> list[Shape]:
    """What is captured at the start; smallest first. What is done for each run is its own affair, not the graph's."""
    every = (Shape(runs, length, width) for runs, width, length in itertools.product(_RUNS, widths(spec), LENGTHS))
    return sorted(filter(Shape.is_small, every), key=lambda shape: (shape.tokens * shape.width, shape.runs))


class _Slot:
    """Memory of one step on its way, shared by all graphs that use it; they run one after the other."""

    def __init__(self, spec: IndexSpec, device: torch.device) -> None:
        num_bytes, num_ids = step_buffer_bytes(spec), step_buffer_ids(spec)
        self.host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)
        self.there = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self.block_ids = torch.zeros(num_ids, dtype=torch.int32, pin_memory=True)
        self.scores = torch.zeros(num_ids, dtype=torch.float32, pin_memory=True)


class Graphs:
    """Graphs of the steps of a core, one for each shape and slot.

    Args:
        backend: whose kernels they hold.
        stream: where they run.
        tables: int32 `[rows, W]`, the page tables on the device, which stay where they are.
        slots: steps that may be on their way at once.
    """

    def __init__(self, backend: TritonBackend, stream: torch.cuda.Stream, tables: torch.Tensor, slots: int) -> None:
        self._backend, self._stream, self._tables = backend, stream, tables
        self._graphs: dict[tuple[Shape, int], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._arrived = torch.zeros(1, dtype=torch.int32, device=backend.device)
        self._slots = [_Slot(backend.spec, backend.device) for _ in range(slots)]

    def step_buffers(self) -> list[StepBuffer]:
        """The memory of the slots."""
        return [StepBuffer(slot.host.numpy(), slot.block_ids.numpy(), slot.scores.numpy()) for slot in self._slots]

    def replays(self) -> list[Replay]:
        """What is captured, in the order in which it was."""
        captured = dict.fromkeys(shape for shape, _ in self._graphs)
        return [Replay(*shape, self._programs(shape)) for shape in captured]

    def _programs(self, shape: Shape) -> tuple[int, ...]:
        return tuple(self._graphs[shape, number].raw_cuda_graph_exec() for number in range(len(self._slots)))

    def capture(self, shape: Shape) -> None:
        """Captures a shape for every slot, none of which is in use; compiles what kernels have left to compile."""
        for number in range(len(self._slots)):
            self._capture(shape, number)

    def _capture(self, shape: Shape, number: int) -> None:
        slot = self._slots[number]
        slot.host.zero_()
        self._run(shape, slot)  # What is compiled now, or allocated for good, must not be so while it is captured.
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            self._run(shape, slot)
        self._graphs[shape, number] = graph

    def _run(self, shape: Shape, slot: _Slot) -> None:
        backend, spec = self._backend, self._backend.spec
        keys_at = keys_offset(shape.runs)
        queries_at = keys_at + _ITEM_BYTES * spec.head_dim * shape.tokens
        end = queries_at + _ITEM_BYTES * spec.head_dim * shape.tokens * spec.num_index_heads
        num_targets = shape.tokens * spec.num_index_heads
        brought = stage(
            slot.host,
            slot.there,
            num_columns=COLUMNS * shape.runs,
            rows_at=keys_at,
            num_keys=shape.tokens,
            num_queries=num_targets,
            num_brought=num_targets + 2 * SIGNALS,
            dim=spec.head_dim,
            odd_keys=spec.key_dtype == "fp8_e4m3",
            odd_queries=backend.rounds_queries,
            pdl=backend.chip.pdl,
        )
        columns = slot.there[: 4 * COLUMNS * shape.runs].view(torch.int32).view(COLUMNS, shape.runs)
        layers, starts, lengths, rows, flags = columns
        spans = Spans(layers, starts, lengths, self._tables, None, shape.length, rows, shape.width, flags)
        backend.append(slot.there[keys_at:queries_at].view(torch.bfloat16).view(-1, spec.head_dim), spans)
        queries = slot.there[queries_at:end].view(torch.bfloat16).view(-1, spec.num_index_heads, spec.head_dim)
        answer = (shape.tokens, spec.num_index_heads, spec.topk)
        ids = answer[0] * answer[1] * answer[2]
        selection = Selection(slot.block_ids[:ids].view(answer), slot.scores[:ids].view(answer))
        backend.decode_into(
            selection,
            queries,
            spans,
            order="ascending",
            targets=brought[:num_targets],
            signals=Signals(brought[num_targets:], self._arrived),
        )


class Launched(Pending):
    """A step that is done once its stream has come so far; with its selection on the host then."""

    def __init__(self, selection: Selection | None, stream: torch.cuda.Stream, step: Step) -> None:
        self._selection = selection
        self._step = step  # it holds regions that the device reads
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(stream)
        self._began = now()

    def done(self) -> bool:
        """See `Pending.done`."""
        if not self._event.query():  # type: ignore[no-untyped-call]
            check_patience(self._began)
            return False
        self.device_seconds = now() - self._began
        return True

    def answer(self) -> Answer | None:
        """See `Pending.answer`."""
        return None if self._selection is None else on_host(self._selection)
