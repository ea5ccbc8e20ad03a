"""Steps on the CPU: what the GPU's executor does, each done when it has begun."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from blockdex.executor.interface import (
    STEP_BUFFERS,
    Answer,
    Executor,
    Packed,
    Pending,
    Step,
    StepBuffer,
    append_all,
    joined,
    on_host,
    step_buffer_bytes,
    step_buffer_ids,
)
from blockdex_kernels.interface import Backend, Selection, Spans


class CpuExecutor(Executor):
    """Steps on the CPU, each done when it has begun."""

    def __init__(self, backend: Backend, table_row: int) -> None:
        """`table_row`: W, cells of a row of the page tables."""
        super().__init__(backend)
        self._table_row = table_row
        self._cells: NDArray[np.int32] = np.zeros(0, np.int32)
        spec = backend.spec
        self._step_buffers = [
            StepBuffer(np.zeros(step_buffer_bytes(spec), np.uint8), np.zeros(step_buffer_ids(spec), np.int32))
            for _ in range(STEP_BUFFERS)
        ]

    def write_tables(self, cells: NDArray[np.int32], changes: NDArray[np.intp]) -> None:  # noqa: ARG002
        """See `Executor.write_tables`; reads the tables where they are."""
        self._cells = cells

    def begin(self, step: Step) -> Pending:
        """See `Executor.begin`."""
        began = time.monotonic()
        spans, selection = self._spans(step), None
        if step.keys is not None:
            append_all(self.backend, joined(step.keys, step.num_tokens, self.backend.spec.head_dim), spans)
        if step.queries is not None:
            queries = joined(step.queries, step.num_tokens, self.backend.spec.head_dim)
            selection = self.backend.decode(queries, spans, order=step.order, return_scores=step.return_scores)
        return _Done(selection, time.monotonic() - began)

    def step_buffers(self) -> Sequence[StepBuffer]:
        """See `Executor.rooms`."""
        return self._step_buffers

    def run_step_buffer(self, room: int, runs: int, tokens: int) -> None:
        """See `Executor.run_step_buffer`."""
        spec, host = self.backend.spec, self._step_buffers[room].host
        head_dim, heads = spec.head_dim, spec.num_index_heads
        columns = np.frombuffer(host, np.int32, 4 * runs).reshape(4, runs)
        keys_at = 16 * max(runs, 4)
        queries_at = keys_at + 2 * tokens * head_dim
        memory = memoryview(host.data)
        keys = Packed(torch.bfloat16, 1, [memory[keys_at:queries_at]])
        queries = Packed(torch.bfloat16, heads, [memory[queries_at : queries_at + 2 * tokens * heads * head_dim]])
        answer = self.begin(Step(columns.copy(), keys, queries)).answer()
        assert answer is not None
        self._step_buffers[room].block_ids[: answer.block_ids.size] = answer.block_ids.reshape(-1)

    def begin_prefill(self, step: Step) -> Pending:
        """See `Executor.begin_prefill`."""
        began = time.monotonic()
        assert step.queries is not None
        selection = self.backend.prefill(
            joined(step.queries, step.num_tokens, self.backend.spec.head_dim),
            self._spans(step),
            order=step.order,
            return_scores=step.return_scores,
        )
        return _Done(selection, time.monotonic() - began)

    def _spans(self, step: Step) -> Spans:
        layers, starts, lengths, rows = step.columns
        blocks = -(-step.end // self.backend.spec.block_size)
        places = rows[:, None] * np.intp(self._table_row) + np.arange(blocks)
        # A short table beside a long one ends before the last of these, at the end of all tables too.
        page_table = self._cells[np.minimum(places, len(self._cells) - 1)]
        needed = -(-(starts + lengths) // self.backend.spec.block_size)
        page_table[np.arange(blocks) >= needed[:, None]] = 0
        return Spans(
            torch.from_numpy(layers),
            torch.from_numpy(starts),
            torch.from_numpy(lengths),
            torch.from_numpy(page_table),
            step.columns[:3],
        )


class _Done(Pending):
    def __init__(self, selection: Selection | None, seconds: float) -> None:
        self._selection = selection
        self.device_seconds = seconds

    def done(self) -> bool:
        return True

    def answer(self) -> Answer | None:
        return None if self._selection is None else on_host(self._selection)
