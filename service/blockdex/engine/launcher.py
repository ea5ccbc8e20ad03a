"""From admitted requests to kernel calls."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from blockdex.cache import Cache, PageCopy
from blockdex.engine.entry import Entry, Outcome, SequenceKey, selects
from blockdex.engine.reading import Reading, kernel_spans, readings, rows_of, subset, to_device, to_host, view
from blockdex.engine.stats import Stats
from blockdex.errors import Reason, ResourceExhaustedError
from blockdex.logs import log_event
from blockdex.messages import Phase, Spans, TokenAnswer, TokenRequest
from blockdex_kernels.backend import Backend, Selection

logger = logging.getLogger(__name__)

# A slice is never shorter than this, so that a slow machine still gets on: one tile of rows.
_MIN_SLICE_TOKENS = 16


class Prefill:
    """One long span of a reading, answered slice by slice."""

    def __init__(self, reading: Reading, row: int) -> None:
        request = reading.request
        self.reading = reading
        self.sequence: tuple[SequenceKey, int] = (
            (request.tenant, int(request.spans.sequence_ids[row])),
            request.layer,
        )
        self._spans = subset(request.spans, np.arange(len(request.spans.lengths)) == row)
        self._first_row = int(request.spans.lengths[:row].sum())
        self._done = 0

    @property
    def remaining(self) -> int:
        """Tokens that are not answered yet."""
        return int(self._spans.lengths[0]) - self._done

    @property
    def products_per_token(self) -> int:
        """Upper bound of the dot products of one token of the next slice."""
        return self.reading.queries.shape[1] * int(self._spans.starts[0] + self._spans.lengths[0])

    def take(self, tokens: int) -> tuple[Spans, slice]:
        """The next slice: its span, and its rows in the reading."""
        tokens = min(tokens, self.remaining)
        spans = self._spans
        span = Spans(spans.sequence_ids, spans.starts + self._done, np.array([tokens]), spans.revisions)
        rows = slice(self._first_row + self._done, self._first_row + self._done + tokens)
        self._done += tokens
        return span, rows


class Launcher:
    """Runs appends, decodes and slices of prefills on a backend.

    Args:
        backend: the kernels and their pages.
        stats: where time and sizes are counted.
        decode_queries: a span of at most so many queries is decode, a longer one prefill.
        prefill_slice_seconds: time that one slice of a prefill may take, about.
    """

    def __init__(self, backend: Backend, stats: Stats, *, decode_queries: int, prefill_slice_seconds: float) -> None:
        self._backend = backend
        self._stats = stats
        self._decode_queries = decode_queries
        self._slice_seconds = prefill_slice_seconds
        self._products_per_second = 1e8
        self.prefills: deque[Prefill] = deque()

    def reading(self) -> Iterator[tuple[SequenceKey, int]]:
        """The (sequence, layer) pairs that unfinished prefills read."""
        return (prefill.sequence for prefill in self.prefills)

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        """Copies pages in order."""
        if copies:
            pairs = torch.tensor(copies, dtype=torch.int64)
            self._backend.copy_pages(pairs[:, 0].contiguous(), pairs[:, 1].contiguous())

    def append(self, cache: Cache, appends: Sequence[tuple[Entry, NDArray[np.bool_]]]) -> list[Outcome]:
        """Writes the keys of every entry, one kernel call for all that came in the same dtype.

        Returns:
            The answers of those that only append.
        """
        by_dtype: dict[torch.dtype, list[tuple[torch.Tensor, tuple[str, int, Spans], Entry]]] = {}
        for entry, applies in appends:
            request = entry.request
            assert isinstance(request, TokenRequest)
            assert request.keys is not None
            spans = request.spans
            keys = view(request.keys.tensor, spans.num_tokens, self._backend.spec.head_dim)
            if not applies.all():
                keys, spans = _take_rows(keys, rows_of(spans, applies)), subset(spans, applies)
            by_dtype.setdefault(keys.dtype, []).append((keys, (request.tenant, request.layer, spans), entry))
        for parts in by_dtype.values():
            keys = _concatenate([part for part, _, _ in parts])
            with self._timed("append", len(keys), [entry for _, _, entry in parts]):
                targets = kernel_spans(cache, self._backend.device, [part for _, part, _ in parts])
                self._backend.append(to_device(keys, self._backend.device), targets)
        return [(entry, TokenAnswer(cache.epoch)) for entry, _ in appends if not selects(entry)]

    def decode(self, cache: Cache, selections: Sequence[Entry]) -> list[Outcome]:
        """Answers the short spans of every entry; the long ones become prefills. Returns what is answered whole."""
        spec = self._backend.spec
        groups: dict[tuple[object, ...], list[tuple[Reading, Spans, slice | torch.Tensor]]] = {}
        outcomes: list[Outcome] = []
        for reading in readings(selections, spec.head_dim, spec.topk):
            spans = reading.request.spans
            short = spans.lengths <= self._decode_queries
            self.prefills.extend(Prefill(reading, int(row)) for row in np.flatnonzero(~short))
            if short.any():
                rows = slice(None) if short.all() else rows_of(spans, short)
                alike = (reading.queries.shape[1], reading.queries.dtype, reading.order, reading.return_scores)
                groups.setdefault(alike, []).append((reading, subset(spans, short), rows))
        for group in groups.values():
            try:
                self._decode_group(cache, group)
            except torch.OutOfMemoryError as error:
                outcomes += self._give_up([reading for reading, _, _ in group], error)
                continue
            outcomes += [
                outcome for reading, _, _ in group if not reading.unread for outcome in reading.outcomes(cache.epoch)
            ]
        return outcomes

    def _decode_group(self, cache: Cache, group: list[tuple[Reading, Spans, slice | torch.Tensor]]) -> None:
        first = group[0][0]
        device = self._backend.device
        queries = _concatenate([_take_rows(reading.queries, rows) for reading, _, rows in group])
        parts = [(reading.request.tenant, reading.request.layer, spans) for reading, spans, _ in group]
        callers = [entry for reading, _, _ in group for entry, _ in reading.callers]
        with self._timed("decode", len(queries), callers):
            places = kernel_spans(cache, device, parts)
            queries = to_device(queries, device)
            selection = to_host(
                self._backend.decode(queries, places, order=first.order, return_scores=first.return_scores)
            )
        row = 0
        for reading, spans, rows in group:
            own = slice(row, row + spans.num_tokens)
            scores = None if selection.scores is None else selection.scores[own]
            reading.write(rows, Selection(selection.block_ids[own], scores))
            row = own.stop

    def prefill_slice(self, cache: Cache) -> list[Outcome]:
        """Answers one slice of the prefill whose turn it is; returns what is answered whole with it."""
        prefill = self.prefills.popleft()
        reading = prefill.reading
        wanted = int(self._products_per_second * self._slice_seconds / prefill.products_per_token)
        spans, rows = prefill.take(max(wanted, _MIN_SLICE_TOKENS))
        request, device = reading.request, self._backend.device
        began = time.monotonic()
        try:
            with self._timed("prefill", spans.num_tokens, [entry for entry, _ in reading.callers]):
                places = kernel_spans(cache, device, [(request.tenant, request.layer, spans)])
                queries = to_device(reading.queries[rows], device)
                selection = to_host(
                    self._backend.prefill(queries, places, order=reading.order, return_scores=reading.return_scores)
                )
        except torch.OutOfMemoryError as error:
            return self._give_up([reading], error)
        reading.write(rows, selection)
        rate = spans.num_tokens * prefill.products_per_token / max(time.monotonic() - began, 1e-6)
        self._products_per_second += 0.25 * (rate - self._products_per_second)
        if prefill.remaining:
            # Behind the others: a short prefill does not wait for a long one to end.
            self.prefills.append(prefill)
        return [] if reading.unread else reading.outcomes(cache.epoch)

    def keep_alive(self, cache: Cache) -> None:
        """Renews the leases of the sequences that prefills read, lest their pages be given away."""
        for prefill in self.prefills:
            cache.get_sequence(*prefill.sequence[0])

    def drop_gone(self, now: float) -> list[Outcome]:
        """Gives up prefills that nobody waits for any more; returns what the callers that are gone are answered."""
        outcomes = [outcome for prefill in self.prefills for outcome in prefill.reading.drop_gone(now)]
        if outcomes:
            self.prefills = deque(prefill for prefill in self.prefills if prefill.reading.callers)
        return outcomes

    def _give_up(self, readings: Sequence[Reading], error: torch.OutOfMemoryError) -> list[Outcome]:
        """What the callers of selections are answered that the device has no memory for; pages are as they were."""
        log_event(logger, logging.ERROR, "device out of memory", reason=str(error))
        self.prefills = deque(prefill for prefill in self.prefills if prefill.reading not in readings)
        return [
            (entry, ResourceExhaustedError("device: no memory left to select with", Reason.OVERLOADED))
            for reading in readings
            for entry, _ in reading.callers
        ]

    @contextmanager
    def _timed(self, phase: Phase, tokens: int, entries: Sequence[Entry]) -> Iterator[None]:
        """Times a launch, from the copy to the device to the answer on the host.

        An append has no answer to wait for: on a GPU what is left of it is waited for, and counted, in what follows.
        """
        began = time.monotonic()
        yield
        ended = time.monotonic()
        for entry in entries:
            # The last one names it: what a request appends comes first, then its short spans, then its long ones.
            entry.launched, entry.finished, entry.phase = began, ended, phase
        self._stats.launched(phase, tokens, len(entries))
        self._stats.device_seconds[phase] += ended - began
        self._stats.device_busy_seconds += ended - began


def _take_rows(tensor: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
    if isinstance(rows, slice):
        return tensor[rows]
    # Bytes, since torch has no gather for fp8 on every device.
    return tensor.contiguous().view(torch.uint8)[rows].view(tensor.dtype)


def _concatenate(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return (
        tensors[0]
        if len(tensors) == 1
        else torch.cat([part.view(torch.uint8) for part in tensors]).view(tensors[0].dtype)
    )
