"""Steps on a GPU: decode from CUDA graphs, prefill in a stream of lower priority, nobody waits for a copy."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from blockdex_kernels.backend import Selection, Spans
from blockdex_kernels.runner import (
    ROOMS,
    Answer,
    Packed,
    Pending,
    Replays,
    Room,
    Runner,
    Step,
    append_all,
    check_patience,
    on_host,
)
from blockdex_kernels.triton.backend import TritonBackend
from blockdex_kernels.triton.graphs import Graphs, Launched, Shape, room_shapes, shapes

_FIRST_CELLS = 1 << 20
_HIGH, _LOW = -1, 0


class GpuRunner(Runner):
    """See `Runner`. One thread begins all steps, after `use_device`.

    Appends and decodes go through one stream, in order; prefills through another one, between whose programs they come
    first. What prefills read crosses in a third, so that the copy of one goes on beside the kernels of another.

    Args:
        backend: the kernels and their pages.
        table_row: cells of a row of the page tables.
    """

    max_pending = 2

    def __init__(self, backend: TritonBackend, table_row: int) -> None:
        super().__init__(backend)
        self.backend: TritonBackend = backend
        self._main = torch.cuda.Stream(backend.device, priority=_HIGH)  # type: ignore[no-untyped-call]
        self._side = torch.cuda.Stream(backend.device, priority=_LOW)  # type: ignore[no-untyped-call]
        self._uploads = torch.cuda.Stream(backend.device, priority=_LOW)  # type: ignore[no-untyped-call]
        self._table_row = table_row
        self._host_cells: NDArray[np.int32] = np.zeros(0, np.int32)
        self._tables = self._empty_tables(max(_FIRST_CELLS, 2 * len(backend.pages)))
        self._graphs = Graphs(backend, self._main, self._tables, self.max_pending)
        self._in_rooms = Graphs(backend, self._main, self._tables, ROOMS)
        self._replays = Replays(0, 0, [])
        self._stager = ThreadPoolExecutor(1, thread_name_prefix="blockdex-stager")

    def use_device(self) -> None:
        """See `Runner.use_device`."""
        super().use_device()
        torch.cuda.set_stream(self._main)

    def warm_up(self) -> Iterator[tuple[int, int]]:
        """Compiles the kernels, then captures the graphs."""
        captures = [(self._graphs, shape) for shape in shapes(self.backend.spec)]
        captures += [(self._in_rooms, shape) for shape in room_shapes(self.backend.spec)]
        total = 0
        for done, compiled in self.backend.warm_up():
            total = compiled
            yield done, total + len(captures)
        for done, (graphs, shape) in enumerate(captures, start=1):
            self.use_device()
            graphs.capture(shape)
            yield total + done, total + len(captures)
        self._replays = self._captured()
        torch.cuda.empty_cache()

    def _captured(self) -> Replays:
        return Replays(_address_of_launch(), self._main.cuda_stream, self._in_rooms.replays())

    def rooms(self) -> list[Room]:
        """See `Runner.rooms`."""
        return self._in_rooms.rooms()

    @property
    def replays(self) -> Replays:
        """See `Runner.replays`; none before the warm-up."""
        return self._replays

    @property
    def table_room(self) -> int:
        """See `Runner.table_room`."""
        return self._tables.numel()

    def check(self, began: float) -> None:
        """See `Runner.check`."""
        self._main.query()  # raises where the device has failed
        super().check(began)

    def write_tables(self, cells: NDArray[np.int32], changes: NDArray[np.intp]) -> None:
        """See `Runner.write_tables`."""
        self._host_cells = cells
        if len(cells) > self._tables.numel():
            # Graphs hold its address: they are captured again, those of batches as they are asked for.
            self._main.synchronize()
            self._tables = self._empty_tables(2 * len(cells))
            self._graphs = Graphs(self.backend, self._main, self._tables, self.max_pending)
            captured = self._in_rooms.replays()
            self._in_rooms.move(self._tables)
            for step in captured:
                heads = self.backend.spec.num_index_heads
                self._in_rooms.capture(Shape(step.runs, step.length, heads, step.width, appends=True))
            self._replays = self._captured()
            changes = np.arange(len(cells))
        if len(changes):
            sent = self._sent(np.concatenate((changes, cells[changes])).astype(np.int32))
            places, pages = sent[: len(changes)], sent[len(changes) :]
            # A cell that was written twice has the same page in both places.
            self._tables.view(-1).index_copy_(0, places.long(), pages)

    def begin(self, step: Step) -> Pending:
        """See `Runner.begin`."""
        shape = Shape.of(step, self.backend.spec)
        if shape is not None:
            return self._graphs.begin(shape, step)
        return self._begin_eager(step)

    def _begin_eager(self, step: Step) -> Pending:
        layers, starts, lengths, rows = self._sent(step.columns)
        blocks = -(-step.end // self.backend.spec.block_size)
        spans = Spans(layers, starts, lengths, self._tables, step.columns[:3], step.longest, rows, blocks)
        if step.keys is not None:
            append_all(self.backend, self._upload(step.keys), spans)
        selection = None
        if step.queries is not None:
            queries = self._upload(step.queries)
            selection = _to_host(
                self.backend.decode(queries, spans, order=step.order, return_scores=step.return_scores)
            )
        return Launched(selection, self._main)

    def begin_prefill(self, step: Step) -> Pending:
        """See `Runner.begin_prefill`."""
        return _Prefill(self, step)

    def _upload(self, packed: Packed) -> torch.Tensor:
        return _pinned(packed, self.backend.spec.head_dim).to(self.backend.device, non_blocking=True)

    def _sent(self, numbers: NDArray[np.int32]) -> torch.Tensor:
        return torch.from_numpy(numbers).pin_memory().to(self.backend.device, non_blocking=True)

    def _empty_tables(self, cells: int) -> torch.Tensor:
        rows = -(-cells // self._table_row)
        return torch.zeros((rows, self._table_row), dtype=torch.int32, device=self.backend.device)


class _Prefill(Pending):
    """A slice of a prefill: its queries are staged beside the engine's thread, then it is launched by `done`."""

    def __init__(self, runner: GpuRunner, step: Step) -> None:
        assert step.queries is not None
        self._runner, self._step = runner, step
        self._keys_there = _event()
        self._keys_there.record(runner._main)
        first = int(step.columns[3, 0]) * runner._table_row
        blocks = -(-step.end // runner.backend.spec.block_size)
        self._page_table = runner._host_cells[None, first : first + blocks].copy()
        self._staged: Future[torch.Tensor] = runner._stager.submit(_pinned, step.queries, runner.backend.spec.head_dim)
        self._selection: Selection | None = None
        self._start, self._end = (_event(timed=True) for _ in range(2))
        self._began = time.monotonic()

    def done(self) -> bool:
        """See `Pending.done`."""
        if self._selection is None and self._staged.done():
            self._launch(self._staged.result())
        if self._selection is None or not self._end.query():  # type: ignore[no-untyped-call]
            check_patience(self._began)
            return False
        self.device_seconds = self._start.elapsed_time(self._end) / 1000
        return True

    def _launch(self, queries: torch.Tensor) -> None:
        runner, step = self._runner, self._step
        backend, device = runner.backend, runner.backend.device
        numbers = np.concatenate((step.columns[:3].reshape(-1), self._page_table[0]))
        with torch.cuda.stream(runner._uploads):
            sent = queries.to(device, non_blocking=True)
            numbers_there = runner._sent(numbers)
            uploaded = _event()
            uploaded.record(runner._uploads)
        with torch.cuda.stream(runner._side):
            runner._side.wait_event(self._keys_there)
            runner._side.wait_event(uploaded)
            sent.record_stream(runner._side)
            numbers_there.record_stream(runner._side)
            self._start.record(runner._side)
            layers, starts, lengths = numbers_there[:3].view(3, 1)
            spans = Spans(layers, starts, lengths, numbers_there[None, 3:], step.columns[:3])
            selection = backend.prefill(sent, spans, order=step.order, return_scores=step.return_scores)
            self._selection = _to_host(selection)
            self._end.record(runner._side)

    def answer(self) -> Answer | None:
        """See `Pending.answer`."""
        assert self._selection is not None
        return on_host(self._selection)


def _address_of_launch() -> int:
    """That of the driver's cuGraphLaunch, which torch has loaded."""
    return ctypes.cast(ctypes.CDLL("libcuda.so.1").cuGraphLaunch, ctypes.c_void_p).value or 0


def _event(*, timed: bool = False) -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]


def _pinned(packed: Packed, head_dim: int) -> torch.Tensor:
    """`[T, heads, D]` in pinned memory: the one copy that the host makes."""
    size = sum(map(len, packed.parts))
    there = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    at = 0
    for part in packed.parts:
        there[at : at + len(part)].copy_(torch.frombuffer(part, dtype=torch.uint8))
        at += len(part)
    return there.view(packed.dtype).view(-1, packed.heads, head_dim)


def _to_host(selection: Selection) -> Selection:
    """Where a selection will be on the host once what is queued on the stream is done."""
    scores = selection.scores
    return Selection(_copied(selection.block_ids), None if scores is None else _copied(scores))


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return there.copy_(tensor, non_blocking=True)
