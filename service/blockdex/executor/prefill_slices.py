"""Slices of prefill on their way: launched as graphs where their kind is common, their copies beside the kernels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from blockdex.executor.interface import Bytes, Packed, Step, write_targets
from blockdex_kernels import cuda_driver
from blockdex_kernels.interface import Selection, Spans
from blockdex_kernels.spec import IndexSpec
from blockdex_kernels.triton.backend import TritonBackend
from blockdex_kernels.triton.prefill import RUN_NUMBERS

MAX_ROWS = 32_768
"""Rows (token, head) of the largest slice that graphs are made for."""

_ROWS = tuple(1024 << power for power in range(6))
_LEAST_WIDTH = 256
_MAX_PLACES = 1 << 25
"""Rows times blocks: their scores take 128 MiB, of which graphs keep one buffer."""
_ITEM_BYTES = 2
_LOW = 0


class SliceShape(NamedTuple):
    """What slices are padded to, to share a graph.

    Attributes:
        rows: tokens times heads.
        width: blocks of the sequence.
    """

    rows: int
    width: int

    @classmethod
    def of(cls, step: Step, spec: IndexSpec) -> SliceShape | None:
        """The shape that holds a slice; None for one that graphs are not made for."""
        queries = step.queries
        if queries is None or queries.dtype != torch.bfloat16 or step.return_scores or step.order != "ascending":
            return None
        blocks, wanted = -(-step.end // spec.block_size), step.num_tokens * queries.heads
        rows = next((rows for rows in _ROWS if rows >= wanted), None)
        if rows is None:
            return None
        shape = cls(rows, max(1 << (blocks - 1).bit_length(), _LEAST_WIDTH))
        return shape if shape.is_small() else None

    @property
    def places(self) -> int:
        """Scores that it keeps."""
        return self.rows * self.width

    def is_small(self) -> bool:
        """Whether a graph may keep room for it."""
        return self.places <= _MAX_PLACES


@dataclass(slots=True)
class Marks:
    """Where the device is with a slice.

    Attributes:
        keys_there: recorded by who begins it: the keys that it reads are in the pages.
        begun: the kernels begin, and all that they read is there.
        ended: they have.
        answered: the selection is on the host.
        waited: whether the device had begun before all was launched, and so may have waited for the host.
    """

    keys_there: torch.cuda.Event
    begun: torch.cuda.Event
    ended: torch.cuda.Event
    answered: torch.cuda.Event
    waited: bool = False

    @classmethod
    def new(cls, after: torch.cuda.Stream) -> Marks:
        """Those of a slice that reads what is queued on a stream."""
        keys_there, begun, ended, answered = (event(timed=timed) for timed in (False, True, True, False))
        keys_there.record(after)
        return cls(keys_there, begun, ended, answered)


class _Slot:
    """Memory of one slice on its way: the numbers of its run, its page table and its queries; and its block ids."""

    def __init__(self, num_bytes: int, num_ids: int, device: torch.device) -> None:
        self.host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)
        self.numbers = self.host[: num_bytes // 4 * 4].view(torch.int32).numpy()
        self.there = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self.block_ids_there = torch.zeros(num_ids, dtype=torch.int32, device=device)
        self.block_ids = torch.zeros(num_ids, dtype=torch.int32, pin_memory=True)
        self.uploaded, self.ended = event(), event()


class Slices:
    """Launches slices of prefill, one at a time, on threads that use the device.

    What they read crosses in a stream of its own and what they answer in another, so that the copies of one go on
    beside the kernels of the next.

    Args:
        backend: whose kernels run.
        slots: slices that may be on their way at once; the answer of one is in its slot until the slot is used again.
    """

    def __init__(self, backend: TritonBackend, slots: int) -> None:
        self._backend, self._spec = backend, backend.spec
        self._kernels, self._uploads, self._downloads = (
            torch.cuda.Stream(backend.device, priority=_LOW)  # type: ignore[no-untyped-call]
            for _ in range(3)
        )
        self._graphs: dict[tuple[SliceShape, int], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._num_slots = slots
        self._slots: list[_Slot] = []
        self._turns = itertools.cycle(range(slots))
        self._ended = event()
        self._queries_at = 4 * (RUN_NUMBERS + -(-backend.spec.max_blocks // 4) * 4)

    def is_waited_for(self, step: Step) -> bool:
        """Whether the device has nothing else to do, and the launch is short: a graph's, of queries in regions."""
        shape, queries = SliceShape.of(step, self._spec), step.queries
        if queries is None or (shape, 0) not in self._graphs or not self._ended.query():  # type: ignore[no-untyped-call]
            return False
        return all(isinstance(part, torch.Tensor) for part in queries.parts)

    def shapes(self) -> Iterator[SliceShape]:
        """Shapes that are captured at the start; others are launched kernel by kernel."""
        if not self._backend.plans_on_device:
            return
        widths = [_LEAST_WIDTH]
        while widths[-1] < self._spec.max_blocks:
            widths.append(2 * widths[-1])
        every = itertools.starmap(SliceShape, itertools.product(_ROWS, widths))
        # The largest first: what the others need then lies in the memory that these have taken.
        yield from sorted(filter(SliceShape.is_small, every), key=lambda shape: shape.places, reverse=True)

    def capture(self, shape: SliceShape) -> None:
        """Captures a shape for every slot, none of which is in use; compiles what kernels have left to compile."""
        if not self._slots:
            num_bytes = self._queries_at + _ITEM_BYTES * self._spec.head_dim * MAX_ROWS
            num_ids = MAX_ROWS * self._spec.topk
            self._slots = [_Slot(num_bytes, num_ids, self._backend.device) for _ in range(self._num_slots)]
        with torch.cuda.stream(self._kernels):
            first = self._slots[0]
            first.there[: self._queries_at].zero_()  # A run of no tokens: its last one may be longer than the shape.
            self._run(shape, first)
        self._kernels.synchronize()
        for number, slot in enumerate(self._slots):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._kernels, capture_error_mode="thread_local"):
                self._run(shape, slot)
            self._graphs[shape, number] = graph

    def launch(self, step: Step, cells: NDArray[np.int32], marks: Marks) -> Selection | None:
        """Queues a slice.

        Args:
            step: one run of queries.
            cells: its page table.
            marks: recorded.

        Returns:
            Where the selection is on the host once `marks.answered` has come; None where it is in its targets then.
        """
        number = next(self._turns)
        shape = SliceShape.of(step, self._spec)
        graph = None if shape is None else self._graphs.get((shape, number))
        if shape is None or graph is None:
            return self._launch_kernels(step, cells, marks)
        assert step.queries is not None
        slot = self._slots[number]
        # Whoever gave a slice up did not wait for it.
        slot.uploaded.synchronize()
        self._uploads.wait_event(slot.ended)
        if any(_is_on_device(part) for part in step.queries.parts):
            # What is made of several callers' queries is made where their keys are appended.
            self._uploads.wait_event(marks.keys_there)
        end = self._fill(slot, step, cells)
        stream = self._uploads.cuda_stream
        cuda_driver.copy(slot.there.data_ptr(), slot.host.data_ptr(), end, stream)
        copy_shared(step.queries.parts, slot.there.data_ptr() + end, stream)
        slot.uploaded.record(self._uploads)
        self._begin(slot.uploaded, marks)
        cuda_driver.call("cuGraphLaunch", graph.raw_cuda_graph_exec(), self._kernels.cuda_stream)
        self._end(marks)
        slot.ended = marks.ended
        answer = (step.num_tokens, step.queries.heads, self._spec.topk)
        ids = math.prod(answer)
        selection = Selection(slot.block_ids_there[:ids].view(answer), None)
        with torch.cuda.stream(self._downloads):
            if step.targets:
                write_targets(selection, step.targets)
            else:
                slot.block_ids[:ids].copy_(slot.block_ids_there[:ids], non_blocking=True)
            marks.answered.record(self._downloads)
        return None if step.targets else Selection(slot.block_ids[:ids].view(answer), None)

    def _fill(self, slot: _Slot, step: Step, cells: NDArray[np.int32]) -> int:
        """Writes what the device is to read, but for what it reads in regions; returns where it ends."""
        assert step.queries is not None
        layer, start, length, *_ = step.columns[:, 0].tolist()
        heads = step.queries.heads
        tiles, ranges = self._backend.split(length * heads, len(cells))
        slot.numbers[:RUN_NUMBERS] = (layer, start, length, tiles, ranges, heads, 0, 0)
        slot.numbers[RUN_NUMBERS : RUN_NUMBERS + len(cells)] = cells
        return copy_parts(step.queries.parts, slot.host, self._queries_at)

    def _run(self, shape: SliceShape, slot: _Slot) -> None:
        numbers = slot.there[: self._queries_at].view(torch.int32)
        end = self._queries_at + _ITEM_BYTES * self._spec.head_dim * shape.rows
        queries = slot.there[self._queries_at : end].view(torch.bfloat16)
        self._backend.prefill_into(
            slot.block_ids_there[: shape.rows * self._spec.topk].view(shape.rows, -1),
            queries.view(shape.rows, -1),
            numbers[:RUN_NUMBERS],
            numbers[None, RUN_NUMBERS : RUN_NUMBERS + self._spec.max_blocks],
            shape.width,
        )

    def _launch_kernels(self, step: Step, cells: NDArray[np.int32], marks: Marks) -> Selection | None:
        queries, device = step.queries, self._backend.device
        assert queries is not None
        numbers = np.concatenate((step.columns[:3, 0], cells))
        with torch.cuda.stream(self._uploads):
            if any(_is_on_device(part) for part in queries.parts):
                self._uploads.wait_event(marks.keys_there)
            sent = upload(queries, self._spec.head_dim, device)
            numbers_there = torch.from_numpy(numbers).pin_memory().to(device, non_blocking=True)
            uploaded = event()
            uploaded.record(self._uploads)
        for tensor in (sent, numbers_there):
            tensor.record_stream(self._kernels)
        layers, starts, lengths = numbers_there[:3].view(3, 1)
        spans = Spans(layers, starts, lengths, numbers_there[None, 3:], step.columns[:3])
        self._begin(uploaded, marks)
        with torch.cuda.stream(self._kernels):
            selection = self._backend.prefill(
                sent, spans, order=step.order, return_scores=step.return_scores, raw_scores=step.raw_scores
            )
        self._end(marks)
        with torch.cuda.stream(self._downloads):
            there = None if step.targets else to_host(selection)
            write_targets(selection, step.targets)
            marks.answered.record(self._downloads)
        for made in (selection.block_ids, selection.scores):
            if made is not None:
                made.record_stream(self._downloads)
        return there

    def _begin(self, uploaded: torch.cuda.Event, marks: Marks) -> None:
        self._kernels.wait_event(marks.keys_there)
        self._kernels.wait_event(uploaded)
        marks.begun.record(self._kernels)

    def _end(self, marks: Marks) -> None:
        marks.ended.record(self._kernels)
        self._ended = marks.ended
        marks.waited = marks.begun.query()  # type: ignore[no-untyped-call]
        self._downloads.wait_event(marks.ended)


def event(*, timed: bool = False) -> torch.cuda.Event:
    """A new event."""
    return torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]


def upload(packed: Packed, head_dim: int, device: torch.device) -> torch.Tensor:
    """`[T, heads, D]` on a device, on the current stream: the region itself, if they lie in one that is there.

    Of what came in an arena the host makes one copy, in pinned memory; of what lies in a region it makes none.
    """
    if any(isinstance(part, torch.Tensor) for part in packed.parts):
        parts = [part if isinstance(part, torch.Tensor) else pinned([part]) for part in packed.parts]
    else:
        parts = [pinned(packed.parts)]
    there = [part.to(device, non_blocking=True) for part in parts]
    joined = there[0] if len(there) == 1 else torch.cat(there)
    return joined.view(packed.dtype).view(-1, packed.heads, head_dim)


def pinned(parts: Sequence[Bytes]) -> torch.Tensor:
    """uint8, a copy of what came in an arena, in pinned memory."""
    there = torch.empty(sum(map(len, parts)), dtype=torch.uint8, pin_memory=True)
    copy_parts(parts, there, 0)
    return there


def copy_parts(parts: Sequence[Bytes], there: torch.Tensor, at: int) -> int:
    """Copies bytes that came in an arena to a place in others on the host, without the GIL; returns where they end."""
    for part in parts:
        if isinstance(part, torch.Tensor):
            continue
        there[at : at + len(part)].copy_(torch.frombuffer(part, dtype=torch.uint8))
        at += len(part)
    return at


def copy_shared(parts: Sequence[Bytes], there: int, stream: int) -> None:
    """Queues copies of bytes that lie in regions, one behind the other, to an address on the device."""
    for part in parts:
        if isinstance(part, torch.Tensor):
            cuda_driver.copy(there, part.data_ptr(), len(part), stream)
            there += len(part)


def _is_on_device(part: Bytes) -> bool:
    return isinstance(part, torch.Tensor) and part.is_cuda


def to_host(selection: Selection) -> Selection:
    """Where a selection will be on the host once what is queued on the stream is done."""
    scores = selection.scores
    return Selection(_copied(selection.block_ids), None if scores is None else _copied(scores))


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return there.copy_(tensor, non_blocking=True)
