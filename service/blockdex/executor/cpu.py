"""Steps on the CPU: what the GPU's executor does, each done when it has begun."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from blockdex.executor.interface import (
    COLUMNS,
    STEP_BUFFERS,
    Answer,
    Executor,
    Pending,
    Step,
    StepBuffer,
    append_all,
    joined,
    keys_offset,
    on_host,
    step_buffer_bytes,
    step_buffer_ids,
    write_targets,
)
from blockdex_kernels.interface import RUN_APPENDS, RUN_SELECTS, RUN_WANTS_SCORES, Backend, Selection, Spans

Rows = slice | NDArray[np.intp]


class CpuExecutor(Executor):
    """Steps on the CPU, each done when it has begun."""

    def __init__(self, backend: Backend, table_row: int) -> None:
        """`table_row`: W, cells of a row of the page tables."""
        super().__init__(backend)
        self._table_row = table_row
        self._cells: NDArray[np.int32] = np.zeros(0, np.int32)
        spec = backend.spec
        self._step_buffers = [
            StepBuffer(
                np.zeros(step_buffer_bytes(spec), np.uint8),
                np.zeros(step_buffer_ids(spec), np.int32),
                np.zeros(step_buffer_ids(spec), np.float32),
            )
            for _ in range(STEP_BUFFERS)
        ]

    def write_tables(self, cells: NDArray[np.int32], changes: NDArray[np.intp]) -> None:  # noqa: ARG002
        """See `Executor.write_tables`; reads the tables where they are."""
        self._cells = cells

    def begin(self, step: Step) -> Pending:
        """See `Executor.begin`."""
        began = time.monotonic()
        spans, selection = self._spans(step.columns), None
        if step.keys is not None:
            append_all(self.backend, joined(step.keys, step.num_tokens, self.backend.spec.head_dim), spans)
        if step.queries is not None:
            queries = joined(step.queries, step.num_tokens, self.backend.spec.head_dim)
            selection = self.backend.decode(
                queries, spans, order=step.order, return_scores=step.return_scores, raw_scores=step.raw_scores
            )
        return _Done(selection, time.monotonic() - began)

    def step_buffers(self) -> Sequence[StepBuffer]:
        """See `Executor.step_buffers`."""
        return self._step_buffers

    def run_step_buffer(self, number: int, runs: int, tokens: int) -> None:
        """See `Executor.run_step_buffer`."""
        spec, buffer = self.backend.spec, self._step_buffers[number]
        head_dim, heads = spec.head_dim, spec.num_index_heads
        columns = np.frombuffer(buffer.host, np.int32, COLUMNS * runs).reshape(COLUMNS, runs).copy()
        keys_at = keys_offset(runs)
        queries_at = keys_at + 2 * tokens * head_dim
        numbers = torch.from_numpy(buffer.host)
        keys = numbers[keys_at:queries_at].view(torch.bfloat16).view(tokens, 1, head_dim)
        queries = numbers[queries_at : queries_at + 2 * tokens * heads * head_dim].view(torch.bfloat16)
        self._append_runs(columns, keys)
        block_ids = buffer.block_ids[: tokens * heads * spec.topk].reshape(tokens, heads, spec.topk)
        scores = buffer.scores[: block_ids.size].reshape(block_ids.shape)
        self._select_runs(columns, queries.view(tokens, heads, head_dim), block_ids, scores)

    def _append_runs(self, columns: NDArray[np.int32], keys: torch.Tensor) -> None:
        own, rows = _chosen(columns, columns[4] & RUN_APPENDS != 0)
        if own.size:
            append_all(self.backend, keys[rows], self._spans(own))

    def _select_runs(
        self,
        columns: NDArray[np.int32],
        queries: torch.Tensor,
        block_ids: NDArray[np.int32],
        scores: NDArray[np.float32],
    ) -> None:
        selecting = columns[4] & (RUN_SELECTS | RUN_WANTS_SCORES)
        for flags in (RUN_SELECTS, RUN_SELECTS | RUN_WANTS_SCORES):
            own, rows = _chosen(columns, selecting == flags)
            if not own.size:
                continue
            raw = bool(flags & RUN_WANTS_SCORES)
            selection = self.backend.decode(
                queries[rows], self._spans(own), order="ascending", return_scores=raw, raw_scores=raw
            )
            block_ids[rows] = selection.block_ids.numpy()
            if selection.scores is not None:
                scores[rows] = selection.scores.numpy()
        _, rows = _chosen(columns, selecting == 0)
        block_ids[rows] = -1

    def begin_prefill(self, step: Step) -> Pending:
        """See `Executor.begin_prefill`."""
        began = time.monotonic()
        assert step.queries is not None
        selection = self.backend.prefill(
            joined(step.queries, step.num_tokens, self.backend.spec.head_dim),
            self._spans(step.columns),
            order=step.order,
            return_scores=step.return_scores,
            raw_scores=step.raw_scores,
        )
        write_targets(selection, step.targets)
        return _Done(None if step.targets else selection, time.monotonic() - began)

    def _spans(self, columns: NDArray[np.int32]) -> Spans:
        layers, starts, lengths, rows, _ = columns
        blocks = -(-int((starts + lengths).max()) // self.backend.spec.block_size)
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
            columns[:3],
        )


def _chosen(columns: NDArray[np.int32], chosen: NDArray[np.bool_]) -> tuple[NDArray[np.int32], Rows]:
    """The columns of some runs, and their rows of a packed tensor: a slice where they are all."""
    if chosen.all():
        return columns, slice(None)
    return np.ascontiguousarray(columns[:, chosen]), np.flatnonzero(np.repeat(chosen, columns[2]))


class _Done(Pending):
    def __init__(self, selection: Selection | None, seconds: float) -> None:
        self._selection = selection
        self.device_seconds = seconds

    def done(self) -> bool:
        return True

    def answer(self) -> Answer | None:
        return None if self._selection is None else on_host(self._selection)
