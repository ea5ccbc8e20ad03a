"""A device whose steps end when a simulation says so, in an order that a stream allows, and not before.

It reads what it is given as late as a device may: step buffers and page tables of the host when a step runs, not when
it is launched. In place of blocks it answers fingerprints of all keys that a query sees, so that one key too many, too
few or from elsewhere shows; as scores it writes the same.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from blockdex.executor.interface import (
    STEP_BUFFERS,
    Answer,
    Executor,
    Packed,
    Pending,
    Replay,
    Replays,
    Step,
    StepBuffer,
    joined,
    keys_offset,
    step_buffer_bytes,
    step_buffer_ids,
)
from blockdex_kernels import IndexSpec
from blockdex_kernels.cpu import CpuBackend
from blockdex_kernels.interface import RUN_APPENDS, RUN_SELECTS

SPEC = IndexSpec(num_layers=2, num_index_heads=2, head_dim=4, block_size=4, topk=4, max_sequence_tokens=64)
LONGEST = 3
"""Tokens of a decode's span."""
SHAPES = ((4, LONGEST), (256, 2), (128, LONGEST))
"""Runs and tokens of captured steps."""
_BLOCKS = SPEC.max_sequence_tokens // SPEC.block_size
_WEIGHTS = np.random.default_rng(7).integers(1, 2**63, SPEC.max_sequence_tokens, np.uint64) | np.uint64(1)
_DIGITS = np.array([1, 1 << 16, 1 << 32, 1 << 48], np.uint64)
"""Of a vector of bfloat16, as one number."""
_MIX = np.uint64(0x9E3779B97F4A7C15)


def _numbers_of(vectors: NDArray[np.float32]) -> NDArray[np.uint64]:
    """A number for each vector `[..., D]` of numbers that bfloat16 has."""
    return (vectors.view(np.uint32) >> 16).astype(np.uint64) @ _DIGITS


def fingerprints(keys: NDArray[np.float32], queries: NDArray[np.float32], start: int) -> NDArray[np.int32]:
    """What queries `[T, heads, D]` at positions from `start` on are answered over keys `[length, D]`."""
    seen = np.cumsum(_numbers_of(keys) * _WEIGHTS[: len(keys)])[start : start + len(queries)]
    mixed = seen[:, None] * _MIX ^ _numbers_of(queries)
    parts = mixed[:, :, None] >> np.arange(0, 15 * SPEC.topk, 15, dtype=np.uint64)
    return (parts & np.uint64(0x7FFF)).astype(np.int32)


class SimulatedPages(CpuBackend):
    """The numbers of a device that is simulated.

    Attributes:
        run_all: ends all that was begun.
    """

    run_all: Callable[[], None]

    def synchronize(self) -> None:
        """As `Backend.synchronize`."""
        self.run_all()


class SimulatedDevice(Executor):
    """Takes steps, and runs one of them whenever it is told to.

    Args:
        backend: whose numbers and pages it stands for.
        table_row: W, cells of a row of the page tables.

    Attributes:
        random: of what runs when; set by the simulation before the first step.
        failure: what the next use of the device fails with, once: `launch`, `copy`, `allocation`, `late`; None.
        failed: how often each was seen.
    """

    least_slice = 2

    def __init__(self, backend: SimulatedPages, table_row: int) -> None:
        super().__init__(backend)
        self.random = np.random.default_rng(0)
        self.failure: str | None = None
        self._table_row = table_row
        self._keys = np.zeros((len(backend.pages), SPEC.num_layers, SPEC.block_size, SPEC.head_dim), np.float32)
        self._cells = np.zeros(0, np.int32)
        self._host_cells = self._cells
        self._stream: deque[Callable[[], None]] = deque()
        self._ran = self._queued = 0
        self._slices: list[tuple[int, Callable[[], None]]] = []
        self._buffers = [
            StepBuffer(
                np.zeros(step_buffer_bytes(SPEC), np.uint8),
                np.zeros(step_buffer_ids(SPEC), np.int32),
                np.zeros(step_buffer_ids(SPEC), np.float32),
            )
            for _ in range(STEP_BUFFERS)
        ]
        self._launched = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(self._launch)
        launch = ctypes.cast(self._launched, ctypes.c_void_p).value
        assert launch is not None
        steps = [
            Replay(runs, length, _BLOCKS, tuple(1 + STEP_BUFFERS * shape + buffer for buffer in range(STEP_BUFFERS)))
            for shape, (runs, length) in enumerate(SHAPES)
        ]
        self._replays = Replays(launch, 0, 0, steps)
        backend.run_all = self.run_all

    # What the engine asks for.

    def write_tables(self, cells: NDArray[np.int32], changes: NDArray[np.intp]) -> None:
        """See `Executor.write_tables`."""
        self._host_cells, values = cells, cells[changes].copy()

        def run() -> None:
            if len(self._cells) < len(cells):
                self._cells = np.concatenate((self._cells, np.zeros(len(cells) - len(self._cells), np.int32)))
            self._cells[changes] = values

        self._queue(run)

    def copy_pages(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """See `Executor.copy_pages`."""
        if self._fails("copy"):
            raise RuntimeError("device: a copy failed, made for this simulation")

        def run() -> None:
            for source, destination in zip(sources, destinations, strict=True):
                self._keys[destination] = self._keys[source]

        self._queue(run)

    def step_buffers(self) -> Sequence[StepBuffer]:
        """See `Executor.step_buffers`."""
        return self._buffers

    @property
    def replays(self) -> Replays:
        """See `Executor.replays`."""
        return self._replays

    def begin(self, step: Step) -> Pending:
        """See `Executor.begin`; what it is given is copied before this returns."""
        self._fail_begin(step)
        keys = None if step.keys is None else _rows(step.keys, step.num_tokens)
        queries = None if step.queries is None else _rows(step.queries, step.num_tokens)
        pending = _Pending(self)

        def run() -> None:
            if keys is not None:
                self._append(step.columns, keys, self._cells)
            pending.end(None if queries is None else self._select(step.columns, queries, self._cells))

        self._queue(run)
        return pending

    def begin_prefill(self, step: Step) -> Pending:
        """See `Executor.begin_prefill`; runs beside the stream, and reads its queries when it does."""
        self._fail_begin(step)
        pending, cells = _Pending(self), self._host_cells.copy()

        def run() -> None:
            assert step.queries is not None
            pending.end(self._select(step.columns, _rows(step.queries, step.num_tokens), cells))

        self._slices.append((self._queued, run))
        return pending

    def check(self, began: float) -> None:
        """Asks after nothing: the simulation sees to it that every step ends."""

    # What the simulation asks for.

    @property
    def busy(self) -> bool:
        """Whether anything was begun that has not run."""
        return bool(self._stream or self._slices)

    def run_one(self) -> None:
        """Runs what is next in the stream, or a slice of a prefill whose keys are there."""
        ready = [number for number, (after, _) in enumerate(self._slices) if after <= self._ran]
        if ready and (not self._stream or self.random.random() < 0.5):
            self._slices.pop(ready[int(self.random.integers(len(ready)))])[1]()
        elif self._stream:
            self._stream.popleft()()
            self._ran += 1

    def run_all(self) -> None:
        """Runs everything that was begun; also what whoever synchronizes waits for."""
        while self.busy:
            self.run_one()

    def keys_of(self, pages: Sequence[int], layer: int) -> NDArray[np.float32]:
        """Keys `[blocks * block_size, D]` of a layer in some pages."""
        return self._keys[list(pages), layer].reshape(-1, SPEC.head_dim)

    def fails_late(self) -> bool:
        """Whether what is asked after has failed."""
        return self._fails("late")

    # How steps run.

    def _queue(self, run: Callable[[], None]) -> None:
        self._stream.append(run)
        self._queued += 1

    def _fails(self, what: str) -> bool:
        if self.failure != what:
            return False
        self.failure = None
        return True

    def _fail_begin(self, step: Step) -> None:
        if self._fails("launch"):
            raise RuntimeError("device: a launch failed, made for this simulation")
        if step.keys is None and self._fails("allocation"):
            raise torch.OutOfMemoryError("device: no memory, made for this simulation")

    def _launch(self, program: int, stream: int | None) -> int:
        if self._fails("launch"):
            return 1
        shape, number = divmod(program - 1, STEP_BUFFERS)
        self._queue(lambda: self._run_buffer(number, *SHAPES[shape]))
        return 0

    def _run_buffer(self, number: int, runs: int, length: int) -> None:
        buffer, tokens = self._buffers[number], runs * length
        columns = buffer.host[: 20 * runs].view(np.int32).reshape(5, runs)
        keys_at = keys_offset(runs)
        queries_at = keys_at + 2 * tokens * SPEC.head_dim
        used = int(columns[2].sum())
        keys = _floats(buffer.host[keys_at : keys_at + 2 * used * SPEC.head_dim]).reshape(-1, 1, SPEC.head_dim)
        row = SPEC.num_index_heads * SPEC.head_dim
        queries = _floats(buffer.host[queries_at : queries_at + 2 * used * row])
        ids = np.full((tokens, SPEC.num_index_heads, SPEC.topk), -1, np.int32)
        queries = queries.reshape(-1, SPEC.num_index_heads, SPEC.head_dim)
        own = columns[:, columns[2] > 0]
        self._append(own, keys, self._cells, RUN_APPENDS)
        ids[:used] = self._select(own, queries, self._cells, RUN_SELECTS)
        buffer.scores[: ids.size] = ids.reshape(-1)
        buffer.block_ids[: ids.size] = ids.reshape(-1)

    def _append(
        self, columns: NDArray[np.int32], keys: NDArray[np.float32], cells: NDArray[np.int32], flag: int = 0
    ) -> None:
        """Writes keys `[T, 1, D]` of the runs that have a flag."""
        top = 0
        for layer, start, length, row, flags in zip(*columns.tolist(), strict=True):
            if flags & flag == flag:
                blocks, places = np.divmod(np.arange(start, start + length), SPEC.block_size)
                pages = cells[row * self._table_row :][blocks]
                self._keys[pages, layer, places] = keys[top : top + length, 0]
            top += length

    def _select(
        self, columns: NDArray[np.int32], queries: NDArray[np.float32], cells: NDArray[np.int32], flag: int = 0
    ) -> NDArray[np.int32]:
        """Block ids `[T, heads, topk]` of queries `[T, heads, D]`, -1 for runs that have not a flag."""
        ids = np.full((*queries.shape[:2], SPEC.topk), -1, np.int32)
        top = 0
        for layer, start, length, row, flags in zip(*columns.tolist(), strict=True):
            tokens = slice(top, top + length)
            if flags & flag == flag:
                pages = cells[row * self._table_row :][: -(-(start + length) // SPEC.block_size)]
                held = self._keys[pages, layer].reshape(-1, SPEC.head_dim)[: start + length]
                ids[tokens] = fingerprints(held, queries[tokens], start)
            top += length
        return ids


class _Pending(Pending):
    """A step that looks whether it has run, at which the device may get on."""

    def __init__(self, device: SimulatedDevice) -> None:
        self._device = device
        self._done = False
        self._ids: NDArray[np.int32] | None = None

    def end(self, ids: NDArray[np.int32] | None) -> None:
        self._done, self._ids = True, ids

    def done(self) -> bool:
        if self._device.fails_late():
            raise RuntimeError("device: a step failed, made for this simulation")
        if not self._done and self._device.random.random() < 0.3:
            self._device.run_one()
        return self._done

    def answer(self) -> Answer | None:
        return None if self._ids is None else Answer(self._ids, self._ids.astype(np.float32))


def _floats(bits: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Numbers of bfloat16, copied."""
    return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _rows(packed: Packed, tokens: int) -> NDArray[np.float32]:
    """Rows of a packed tensor, copied: `[T, heads, D]`."""
    rows: NDArray[np.float32] = joined(packed, tokens, SPEC.head_dim).float().numpy()
    return rows
