"""Steps on a GPU: decodes before slices of prefill, which another thread launches; nobody waits for a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from blockdex._native import now
from blockdex.executor import shared_memory
from blockdex.executor.cuda_graphs import Graphs, Launched, shapes
from blockdex.executor.device_tables import DeviceTables
from blockdex.executor.interface import (
    STEP_BUFFERS,
    Answer,
    Executor,
    Packed,
    Pending,
    Replays,
    Step,
    StepBuffer,
    append_all,
    check_patience,
    on_host,
)
from blockdex.executor.prefill_slices import MAX_ROWS, Marks, Slices, to_host, upload
from blockdex_kernels import cuda_driver
from blockdex_kernels.interface import Selection, Spans
from blockdex_kernels.triton.backend import TritonBackend

_FIRST_CELLS = 1 << 20
_HIGH = -1


class GpuExecutor(Executor):
    """See `Executor`. One thread begins all steps, after `use_device`.

    Appends and decodes go through one stream, in order; prefills through others of lower priority, between whose
    programs they come first. A thread of their own launches prefills, so that decodes need not wait for that either,
    but for slices that the device waits for.

    Args:
        backend: the kernels and their pages.
        table_row: cells of a row of the page tables.
    """

    max_pending = 2
    max_slices = 3
    least_slice = 256
    max_slice_rows = MAX_ROWS
    imports_memory = True

    def __init__(self, backend: TritonBackend, table_row: int) -> None:
        super().__init__(backend)
        self.backend: TritonBackend = backend
        self._main = torch.cuda.Stream(backend.device, priority=_HIGH)  # type: ignore[no-untyped-call]
        self._table_row = table_row
        self._host_cells: NDArray[np.int32] = np.zeros(0, np.int32)
        self._tables = DeviceTables(backend.device, table_row, max(_FIRST_CELLS, 2 * len(backend.pages)))
        self._graphs = Graphs(backend, self._main, self._tables.rows, STEP_BUFFERS)
        self._replays = Replays(0, 0, 0, [])
        self._slices = Slices(backend, self.max_slices)
        self._launching = ThreadPoolExecutor(1, "blockdex-prefill", backend.use_device)
        self._newest: Future[Selection | None] = Future()
        self._newest.set_result(None)

    def use_device(self) -> None:
        """See `Executor.use_device`."""
        super().use_device()
        torch.cuda.set_stream(self._main)

    def warm_up(self) -> Iterator[tuple[int, int]]:
        """Compiles the kernels, then captures the graphs."""
        spec = self.backend.spec
        captures: list[Callable[[], None]] = [partial(self._graphs.capture, shape) for shape in shapes(spec)]
        captures += [partial(self._slices.capture, shape) for shape in self._slices.shapes()]
        total = 0
        for done, compiled in self.backend.warm_up():
            total = compiled
            yield done, total + len(captures)
        for done, capture in enumerate(captures, start=1):
            self.use_device()
            capture()
            yield total + done, total + len(captures)
        launch, signal = map(cuda_driver.address_of, ("cuGraphLaunch", "cuStreamWriteValue64_v2"))
        self._replays = Replays(launch, signal, self._main.cuda_stream, self._graphs.replays())
        torch.cuda.empty_cache()

    def step_buffers(self) -> list[StepBuffer]:
        """See `Executor.step_buffers`."""
        return self._graphs.step_buffers()

    @property
    def replays(self) -> Replays:
        """See `Executor.replays`; none before the warm-up."""
        return self._replays

    def check(self, began: float) -> None:
        """See `Executor.check`."""
        self._main.query()  # raises where the device has failed
        super().check(began)

    def write_tables(self, cells: NDArray[np.int32], changes: NDArray[np.intp]) -> None:
        """See `Executor.write_tables`."""
        self._host_cells = cells
        self._tables.make_room(len(cells))
        self._tables.write(changes, cells[changes])

    def pin(self, address: int, num_bytes: int) -> Callable[[], None]:
        """See `Executor.pin`."""
        return shared_memory.pin(self.backend.device.index or 0, address, num_bytes)

    def import_memory(self, fd: int, num_bytes: int, handle: bytes, uuid: str) -> shared_memory.Opened:
        """See `Executor.import_memory`."""
        device = self.backend.device.index or 0
        if fd < 0:
            return shared_memory.open_handle(device, handle, uuid)
        return shared_memory.open_file(device, fd, num_bytes, uuid)

    def begin(self, step: Step) -> Pending:
        """See `Executor.begin`."""
        layers, starts, lengths, rows, _ = self._sent(step.columns)
        blocks = -(-step.end // self.backend.spec.block_size)
        spans = Spans(layers, starts, lengths, self._tables.rows, step.columns[:3], step.longest, rows, blocks)
        if step.keys is not None:
            append_all(self.backend, self._upload(step.keys), spans)
        selection = None
        if step.queries is not None:
            queries = self._upload(step.queries)
            selected = self.backend.decode(
                queries, spans, order=step.order, return_scores=step.return_scores, raw_scores=step.raw_scores
            )
            selection = to_host(selected)
        return Launched(selection, self._main, step)

    def begin_prefill(self, step: Step) -> Pending:
        """See `Executor.begin_prefill`."""
        return _Prefill(self, step)

    def _launch_slice(self, step: Step, cells: NDArray[np.int32], marks: Marks) -> Future[Selection | None]:
        """Has a slice launched: by this thread where the device waits for it, since to wake the other takes as long."""
        if not self._newest.done() or not self._slices.is_waited_for(step):
            self._newest = self._launching.submit(self._slices.launch, step, cells, marks)
            return self._newest
        launched: Future[Selection | None] = Future()
        launched.set_result(self._slices.launch(step, cells, marks))
        return launched

    def _upload(self, packed: Packed) -> torch.Tensor:
        return upload(packed, self.backend.spec.head_dim, self.backend.device)

    def _sent(self, numbers: NDArray[np.int32]) -> torch.Tensor:
        return torch.from_numpy(numbers).pin_memory().to(self.backend.device, non_blocking=True)


class _Prefill(Pending):
    """A slice of a prefill, staged, uploaded and launched beside the engine's thread, which asks whether it is done."""

    def __init__(self, executor: GpuExecutor, step: Step) -> None:
        self._marks = Marks.new(executor._main)
        first = int(step.columns[3, 0]) * executor._table_row
        blocks = -(-step.end // executor.backend.spec.block_size)
        # Copied, since the next step may change the tables.
        cells = executor._host_cells[first : first + blocks].copy()
        self._launched = executor._launch_slice(step, cells, self._marks)
        self._began = now()
        self._step = step  # it holds regions that the device reads and writes

    def done(self) -> bool:
        """See `Pending.done`."""
        if not self._launched.done() or not self._is_answered():
            check_patience(self._began)
            return False
        marks = self._marks
        self.device_seconds = marks.begun.elapsed_time(marks.ended) / 1000
        self.device_waited = marks.waited
        return True

    def _is_answered(self) -> bool:
        self._launched.result()  # Raises what went wrong.
        return bool(self._marks.answered.query())  # type: ignore[no-untyped-call]

    def answer(self) -> Answer | None:
        """See `Pending.answer`; in its slot."""
        selection = self._launched.result()
        return None if selection is None else on_host(selection)
