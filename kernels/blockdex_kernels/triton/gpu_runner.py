"""Steps on a GPU: decode from CUDA graphs, prefill in a stream of lower priority, nobody waits for a copy."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from blockdex_kernels.backend import Selection, Spans
from blockdex_kernels.runner import (
    Answer,
    Packed,
    Pending,
    Runner,
    Step,
    append_all,
    check_patience,
    on_host,
)
from blockdex_kernels.triton.backend import TritonBackend
from blockdex_kernels.triton.graphs import Graphs, Launched, Shape

_FIRST_CELLS = 1 << 20
_HIGH, _LOW = -1, 0


class GpuRunner(Runner):
    """See `Runner`. One thread begins all steps, after `use_device`.

    Appends and decodes go through one stream, in order; prefills through another one, between whose programs they come
    first. What prefills read crosses in a third and what they answer in a fourth, so that the copies of one go on
    beside the kernels of another. A second thread launches them: only the host's part of decodes holds up decodes.

    Args:
        backend: the kernels and their pages.
        table_row: cells of a row of the page tables.
    """

    max_pending = 2
    max_slices = 3
    least_slice = 256

    def __init__(self, backend: TritonBackend, table_row: int) -> None:
        super().__init__(backend)
        self.backend: TritonBackend = backend
        self._main = torch.cuda.Stream(backend.device, priority=_HIGH)  # type: ignore[no-untyped-call]
        self._side = torch.cuda.Stream(backend.device, priority=_LOW)  # type: ignore[no-untyped-call]
        self._uploads = torch.cuda.Stream(backend.device, priority=_LOW)  # type: ignore[no-untyped-call]
        self._downloads = torch.cuda.Stream(backend.device, priority=_LOW)  # type: ignore[no-untyped-call]
        self._table_row = table_row
        self._host_cells: NDArray[np.int32] = np.zeros(0, np.int32)
        self._tables = self._empty_tables(max(_FIRST_CELLS, 2 * len(backend.pages)))
        self._graphs = Graphs(backend, self._main, self._tables, self.max_pending)
        self._launcher = ThreadPoolExecutor(1, "blockdex-prefill", self._use_side)

    def use_device(self) -> None:
        """See `Runner.use_device`."""
        super().use_device()
        torch.cuda.set_stream(self._main)

    def _use_side(self) -> None:
        super().use_device()
        torch.cuda.set_stream(self._side)

    def warm_up(self) -> Iterator[tuple[int, int]]:
        """Compiles the kernels, then captures the graphs."""
        shapes = list(self._graphs.shapes())
        total = 0
        for done, compiled in self.backend.warm_up():
            total = compiled
            yield done, total + len(shapes)
        for done, shape in enumerate(shapes, start=1):
            self.use_device()
            self._graphs.capture(shape)
            yield total + done, total + len(shapes)
        torch.cuda.empty_cache()

    def write_tables(self, cells: NDArray[np.int32], changes: NDArray[np.intp]) -> None:
        """See `Runner.write_tables`."""
        self._host_cells = cells
        if len(cells) > self._tables.numel():
            # Graphs hold its address: they are captured again as they are asked for.
            self._main.synchronize()
            self._tables = self._empty_tables(2 * len(cells))
            self._graphs = Graphs(self.backend, self._main, self._tables, self.max_pending)
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
    """A slice of a prefill: staged, uploaded and launched beside the engine's thread, which only asks whether it is done.

    The time between its start and its end is the device's alone where all was launched before the device came to it.
    """

    def __init__(self, runner: GpuRunner, step: Step) -> None:
        self._keys_there = _event()
        self._keys_there.record(runner._main)
        first = int(step.columns[3, 0]) * runner._table_row
        blocks = -(-step.end // runner.backend.spec.block_size)
        # Copied here: the next step may change the tables.
        numbers = np.concatenate((step.columns[:3, 0], runner._host_cells[first : first + blocks]))
        self._start, self._end = (_event(timed=True) for _ in range(2))
        self._answered = _event()
        self._launched: Future[Selection] = runner._launcher.submit(self._launch, runner, step, numbers)
        self._began = time.monotonic()

    def done(self) -> bool:
        """See `Pending.done`."""
        if not self._launched.done() or not (self._launched.exception() or self._answered.query()):
            check_patience(self._began)
            return False
        self._launched.result()
        self.device_seconds = self._start.elapsed_time(self._end) / 1000
        return True

    def _launch(self, runner: GpuRunner, step: Step, numbers: NDArray[np.int32]) -> Selection:
        """On the launching thread: the selection on the host, which is there once it was `_answered`."""
        queries = step.queries
        assert queries is not None
        side = runner._side
        with torch.cuda.stream(runner._uploads):
            sent = runner._upload(queries)
            numbers_there = runner._sent(numbers)
            uploaded = _event()
            uploaded.record(runner._uploads)
        for tensor in (sent, numbers_there):
            tensor.record_stream(side)
        layers, starts, lengths = numbers_there[:3].view(3, 1)
        spans = Spans(layers, starts, lengths, numbers_there[None, 3:], step.columns[:3])
        side.wait_event(self._keys_there)
        side.wait_event(uploaded)
        self._start.record(side)
        selection = runner.backend.prefill(sent, spans, order=step.order, return_scores=step.return_scores)
        self._end.record(side)
        self.device_waited = self._start.query()
        # The next slice need not wait for the way to the host.
        runner._downloads.wait_event(self._end)
        with torch.cuda.stream(runner._downloads):
            there = _to_host(selection)
            self._answered.record(runner._downloads)
        for tensor in (selection.block_ids, selection.scores):
            if tensor is not None:
                tensor.record_stream(runner._downloads)
        return there

    def answer(self) -> Answer | None:
        """See `Pending.answer`."""
        return on_host(self._launched.result())


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
