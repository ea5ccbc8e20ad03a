"""Selections that share one read of the keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from blockdex.contract.messages import Queries, Spans, TokenAnswer, TokenRequest
from blockdex.executor.interface import Answer, Packed
from blockdex.scheduler.request import Entry, Outcome, too_late
from blockdex_kernels import IndexSpec

Rows = slice | NDArray[np.intp]
"""Rows of a packed tensor: one behind the other, or some."""

ALL_ROWS = slice(None)

TORCH_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8_e4m3": torch.float8_e4m3fn,
}


class Part(NamedTuple):
    """Runs of a step that are of one request: their layer and columns."""

    tenant: str
    layer: int
    spans: Spans


def rows_of(spans: Spans, chosen: NDArray[np.bool_]) -> NDArray[np.intp]:
    """The rows of the packed tensor beside `spans` that belong to the chosen spans."""
    return np.flatnonzero(np.repeat(chosen, spans.lengths))


def subset(spans: Spans, chosen: NDArray[np.bool_]) -> Spans:
    """The chosen rows of the columns."""
    return Spans(spans.sequence_ids[chosen], spans.starts[chosen], spans.lengths[chosen], spans.revisions[chosen])


def take_rows(data: bytes | memoryview, row_bytes: int, rows: Rows) -> memoryview:
    """The bytes of some rows; those received, not copied, where they lie together."""
    there = memoryview(data).cast("B")
    if isinstance(rows, slice):
        return there if rows is ALL_ROWS else there[rows.start * row_bytes : rows.stop * row_bytes]
    return np.frombuffer(there, np.uint8).reshape(-1, row_bytes)[rows].reshape(-1).data


class Reading:
    """Selections of the same tokens of one layer, by one caller or by several that hold different heads.

    Attributes:
        request: the first caller's; tenant, layer and spans are the same for all.
        callers: who still waits for the answer, each with its own heads.
        heads: of all callers, side by side.
        alike: dtype, order and whether scores are wanted, the same for all: what one launch has in common.
        num_tokens: of the spans.
        longest: tokens of the longest span.
        unread: tokens that no kernel has answered yet.
    """

    def __init__(self, entries: Sequence[Entry], head_dim: int, topk: int) -> None:
        halves = [queries_of(entry) for entry in entries]
        request = entries[0].request
        assert isinstance(request, TokenRequest)
        self.request = request
        self.callers: list[tuple[Entry, slice]] = []
        self.heads = 0
        for entry, half in zip(entries, halves, strict=True):
            self.callers.append((entry, slice(self.heads, self.heads + half.num_heads)))
            self.heads += half.num_heads
        first = halves[0]
        self.order, self.return_scores = first.order, first.return_scores
        self.dtype = TORCH_DTYPES[first.tensor.dtype]
        lengths = request.spans.lengths.tolist()
        self.longest = max(lengths)
        self.num_tokens = self.unread = sum(lengths)
        self._topk = topk
        self._row_bytes = self.heads * head_dim * self.dtype.itemsize
        self._data = first.tensor.data if len(halves) == 1 else _side_by_side(halves, self.num_tokens)
        self._answer: Answer | None = None

    @property
    def alike(self) -> tuple[object, ...]:
        """What selections of one launch have in common."""
        return self.heads, self.dtype, self.order, self.return_scores

    def queries(self, rows: Rows) -> memoryview:
        """Bytes of `[rows, heads, D]`."""
        return take_rows(self._data, self._row_bytes, rows)

    def packed(self, parts: Sequence[memoryview]) -> Packed:
        """Rows of this reading, or of others like it, as kernels take them."""
        return Packed(self.dtype, self.heads, parts)

    def drop_gone(self, now: float) -> list[Outcome]:
        """Forgets the callers that have gone or are past their deadline; returns what they are answered."""
        gone = [entry for entry, _ in self.callers if entry.cancelled or entry.deadline <= now]
        if gone:
            self.callers = [(entry, heads) for entry, heads in self.callers if entry not in gone]
        return [(entry, too_late(entry)) for entry in gone]

    def write(self, rows: Rows, answer: Answer) -> None:
        """Takes a kernel's answer for some of the tokens."""
        self.unread -= len(answer.block_ids)
        if rows is ALL_ROWS:
            self._answer = answer
            return
        if self._answer is None:
            shape = (self.num_tokens, self.heads, self._topk)
            self._answer = Answer(
                np.empty(shape, np.int32), np.empty(shape, np.float32) if self.return_scores else None
            )
        self._answer.block_ids[rows] = answer.block_ids
        if self._answer.scores is not None:
            self._answer.scores[rows] = answer.scores

    def outcomes(self, epoch: int) -> list[Outcome]:
        """Every caller's share of the answer; to be called once nothing is unread."""
        assert self._answer is not None
        block_ids, scores = self._answer.block_ids, self._answer.scores
        if len(self.callers) == 1 and self.callers[0][1] == slice(0, self.heads):
            return [(self.callers[0][0], TokenAnswer(epoch, block_ids, scores))]
        return [
            (entry, TokenAnswer(epoch, block_ids[:, heads], None if scores is None else scores[:, heads]))
            for entry, heads in self.callers
        ]


@dataclass(slots=True)
class _Group:
    """Entries that share a read, and their heads as the bits of a number."""

    entries: list[Entry] = field(default_factory=list)
    heads: int = 0


def readings(entries: Iterable[Entry], spec: IndexSpec) -> list[Reading]:
    """Groups selections whose tokens, order and dtype are the same, so that they share one read of the keys.

    A group holds each head once at most: whoever asks for the same again is another engine, and no kernel is made ready
    for more heads than the indexer has.
    """
    entries = list(entries)
    if len(entries) == 1:
        return [Reading(entries, spec.head_dim, spec.topk)]
    groups: dict[tuple[object, ...], list[_Group]] = {}
    for entry in entries:
        request, half = entry.request, queries_of(entry)
        assert isinstance(request, TokenRequest)
        spans = request.spans
        what = (request.tenant, request.layer, half.order, half.return_scores, half.tensor.dtype)
        where = (spans.sequence_ids.tobytes(), spans.starts.tobytes(), spans.lengths.tobytes())
        alike, heads = groups.setdefault((*what, *where), []), (1 << half.num_heads) - 1 << half.first_head
        group = next((group for group in alike if not group.heads & heads), None)
        if group is None:
            alike.append(group := _Group())
        group.entries.append(entry)
        group.heads |= heads
    return [Reading(group.entries, spec.head_dim, spec.topk) for alike in groups.values() for group in alike]


def queries_of(entry: Entry) -> Queries:
    """The selecting half of an entry that has one."""
    request = entry.request
    assert isinstance(request, TokenRequest)
    assert request.queries is not None
    return request.queries


def _side_by_side(halves: Sequence[Queries], num_tokens: int) -> memoryview:
    """`[T, heads, D]` of several callers as one tensor."""
    parts = [np.frombuffer(half.tensor.data, np.uint8).reshape(num_tokens, -1) for half in halves]
    return np.concatenate(parts, axis=1).reshape(-1).data
