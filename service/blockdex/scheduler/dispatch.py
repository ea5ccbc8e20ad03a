"""From admitted requests to steps on the device, and back."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from blockdex.cache import Cache
from blockdex.contract.errors import Reason, ResourceExhaustedError
from blockdex.contract.messages import Phase, Spans, TensorData, TokenAnswer, TokenRequest
from blockdex.contract.stats import Stats
from blockdex.executor.interface import Executor, Packed, Pending, Step
from blockdex.logs import log_event
from blockdex.scheduler.batch import Batch
from blockdex.scheduler.prefill import Prefill, Prefills
from blockdex.scheduler.request import Entry, Outcome, SequenceKey, selects
from blockdex.scheduler.selection_group import (
    ALL_ROWS,
    TORCH_DTYPES,
    Part,
    Reading,
    Rows,
    readings,
    rows_of,
    subset,
    take_rows,
)

if TYPE_CHECKING:
    from blockdex.scheduler.fast_path import ShortWay

logger = logging.getLogger(__name__)

# Share of the last slice in what is expected of the next one.
_LEARNING_RATE = 0.25


@dataclass(slots=True)
class Flight:
    """A step on its way.

    Attributes:
        pending: how it gets on.
        phase: `append`, `decode` or `prefill`.
        parts: readings that get so many rows of its answer, in their order, and for which of their own.
        sequence: of a prefill, the sequence and layer that it reads.
        products: of a prefill, dot products that it takes.
        steps_before: of a prefill, steps that had begun before it.
    """

    pending: Pending
    phase: Phase
    parts: list[tuple[Reading, int, Rows]]
    sequence: tuple[SequenceKey, int] | None = None
    products: float = 0.0
    steps_before: int = 0


class Launcher:
    """Runs batches and slices of prefills, without waiting for them.

    Args:
        cache: where the sequences are.
        executor: takes steps to the device.
        stats: where time and sizes are counted.
        decode_queries: a span of at most so many queries is decode, a longer one prefill.
        prefill_slice_seconds: time that one slice of a prefill may take, about.
        short_way: what runs decodes beside it, if anything does.

    Attributes:
        prefills: what is left to begin of the long spans.
    """

    def __init__(
        self,
        cache: Cache,
        executor: Executor,
        stats: Stats,
        *,
        decode_queries: int,
        prefill_slice_seconds: float,
        short_way: ShortWay | None,
    ) -> None:
        self.prefills = Prefills()
        self._cache = cache
        self._executor = executor
        self._spec = executor.backend.spec
        self._stats = stats
        self._decode_queries = decode_queries
        self._slice_seconds = prefill_slice_seconds
        self._short_way = short_way
        self._clock = time.monotonic if short_way is None else short_way.time_beside
        self._steps = 0
        self._products_per_second = 1e8
        self._flights: deque[Flight] = deque()
        self._slices: deque[Flight] = deque()
        self._landed: list[Outcome] = []
        self._busy_since = 0.0

    @property
    def in_flight(self) -> bool:
        """Whether anything is on its way."""
        return bool(self._flights or self._slices or self._landed)

    @property
    def only_prefills(self) -> bool:
        """Whether nothing else is on its way, and no other slice is to begin now."""
        if not self._slices or self._flights or self._landed:
            return False
        return not self.prefills or len(self._slices) >= self._executor.max_slices

    @property
    def reads(self) -> bool:
        """Whether any prefill is not done."""
        return bool(self.prefills or self._slices)

    @property
    def has_room(self) -> bool:
        """Whether a batch can begin without waiting for one before."""
        return len(self._flights) < self._executor.max_pending

    def reading(self) -> Iterator[tuple[SequenceKey, int]]:
        """The (sequence, layer) pairs that unfinished prefills read, begun or not."""
        yield from (prefill.sequence for prefill in self.prefills)
        yield from (flight.sequence for flight in self._slices if flight.sequence is not None)

    def being_read(self) -> Iterator[SequenceKey]:
        """The sequences whose pages slices on their way read, from page tables as these were when they began."""
        yield from (flight.sequence[0] for flight in self._slices if flight.sequence is not None)

    def begin(self, batch: Batch) -> list[Outcome]:
        """Begins what a batch asks of the device; returns the answers that need not wait for it."""
        changes = self._cache.take_table_changes()
        if len(changes):
            self._executor.write_tables(self._cache.table_cells, changes)
        if batch.copies:
            self._executor.copy_pages(*map(list, zip(*batch.copies, strict=True)))
        made = readings(batch.selections, self._spec)
        self._note([entry for entry, _ in batch.appends], "append")
        self._append(batch.appends)
        self._select(made)
        done, now = [entry for entry, _ in batch.appends if not selects(entry)], time.monotonic()
        for entry in done:
            entry.finished = now
        return [(entry, TokenAnswer(self._cache.epoch)) for entry in done]

    def begin_slice(self) -> None:
        """Begins one slice of the prefill whose turn it is, if there is one, and if not enough are on their way."""
        if not self.prefills or len(self._slices) >= self._executor.max_slices:
            return
        prefill = self.prefills.pop()
        reading = prefill.reading
        in_time = prefill.tokens_within(self._products_per_second * self._slice_seconds)
        most = min(prefill.remaining, max(self._executor.max_slice_rows // reading.heads, 1))
        tokens = min(max(in_time, self._executor.least_slice), most)
        products = prefill.products(tokens)
        part, rows = prefill.take(tokens)
        if prefill.remaining:
            # Behind the others: a short prefill does not wait for a long one to end.
            self.prefills.add(prefill)
        queries = reading.packed([reading.queries(rows)])
        step = Step(self._columns([part]), None, queries, reading.order, reading.return_scores)
        self._note([entry for entry, _ in reading.callers], "prefill")
        self._note_busy()
        try:
            pending = self._executor.begin_prefill(step)
        except torch.OutOfMemoryError as error:
            self._give_up([reading], error)
            return
        self._slices.append(
            Flight(pending, "prefill", [(reading, tokens, rows)], prefill.sequence, products, self._steps_begun())
        )
        self._stats.launched("prefill", tokens, 1)

    def land(self) -> list[Outcome]:
        """What has become of the steps on their way: the answers of the requests that are answered whole."""
        while self._flights and self._flights[0].pending.done():
            self._arrive(self._flights.popleft())
        while self._slices and self._has_ended(self._slices[0]):
            self._arrive(self._slices.popleft())
        landed, self._landed = self._landed, []
        return landed

    def keep_alive(self) -> None:
        """Renews the leases of the sequences that prefills read, lest their pages be given away."""
        for sequence, _ in self.reading():
            self._cache.get_sequence(*sequence)

    def drop_gone(self, now: float) -> list[Outcome]:
        """Gives up prefills that nobody waits for any more; returns what the callers that are gone are answered."""
        outcomes = [outcome for prefill in self.prefills for outcome in prefill.reading.drop_gone(now)]
        if outcomes:
            self.prefills.keep(lambda prefill: bool(prefill.reading.callers))
        return outcomes

    def _append(self, appends: Sequence[tuple[Entry, NDArray[np.bool_] | None]]) -> None:
        """Writes the keys of every entry, one step for all that came in the same dtype."""
        by_dtype: dict[torch.dtype, list[tuple[memoryview, Part]]] = {}
        for entry, applies in appends:
            request, keys = entry.request, _keys(entry)
            assert isinstance(request, TokenRequest)
            spans = request.spans
            if applies is not None:
                keys = take_rows(keys, len(keys) // spans.num_tokens, rows_of(spans, applies))
                spans = subset(spans, applies)
            part = Part(request.tenant, request.layer, spans)
            by_dtype.setdefault(_keys_dtype(entry), []).append((keys, part))
        for dtype, parts in by_dtype.items():
            step = Step(self._columns([part for _, part in parts]), Packed(dtype, 1, [keys for keys, _ in parts]))
            self._begin(step, "append", [])
            self._stats.launched("append", step.num_tokens, len(parts))

    def _select(self, made: Sequence[Reading]) -> None:
        """Begins to answer the short spans of every reading; the long ones become prefills."""
        groups: dict[tuple[object, ...], list[tuple[Reading, Spans, Rows]]] = {}
        for reading in made:
            spans = reading.request.spans
            if reading.longest <= self._decode_queries:
                groups.setdefault(reading.alike, []).append((reading, spans, ALL_ROWS))
                continue
            short = spans.lengths <= self._decode_queries
            for row in np.flatnonzero(~short).tolist():
                self.prefills.add(Prefill(reading, row))
            if short.any():
                groups.setdefault(reading.alike, []).append((reading, subset(spans, short), rows_of(spans, short)))
        for group in groups.values():
            self._decode(group)

    def _decode(self, group: Sequence[tuple[Reading, Spans, Rows]]) -> None:
        """Begins to answer short spans that are alike."""
        first = group[0][0]
        queries = first.packed([reading.queries(rows) for reading, _, rows in group])
        parts = [Part(reading.request.tenant, reading.request.layer, spans) for reading, spans, _ in group]
        step = Step(self._columns(parts), None, queries, first.order, first.return_scores)
        self._note([entry for reading, _, _ in group for entry, _ in reading.callers], "decode")
        try:
            self._begin(step, "decode", [(reading, spans.num_tokens, rows) for reading, spans, rows in group])
        except torch.OutOfMemoryError as error:
            self._give_up([reading for reading, _, _ in group], error)
            return
        self._stats.launched("decode", step.num_tokens, len(group))

    def _columns(self, parts: Sequence[Part]) -> NDArray[np.int32]:
        """int32 `[4, R]`: see `Step.columns`."""
        columns = np.empty((4, sum(len(part.spans.lengths) for part in parts)), np.int32)
        row = 0
        for tenant, layer, spans in parts:
            own = columns[:, row : row + len(spans.lengths)]
            own[0], own[1], own[2] = layer, spans.starts, spans.lengths
            own[3] = self._cache.table_rows(tenant, spans)
            row += own.shape[1]
        return columns

    def _begin(
        self,
        step: Step,
        phase: Phase,
        parts: list[tuple[Reading, int, Rows]],
    ) -> None:
        while not self.has_room:
            if self._flights[0].pending.done():
                self._arrive(self._flights.popleft())
            time.sleep(0)
        self._note_busy()
        self._steps += 1
        self._flights.append(Flight(self._executor.begin(step), phase, parts))

    def _steps_begun(self) -> int:
        """Other steps that have begun so far, on the short way too."""
        return self._steps + (0 if self._short_way is None else self._short_way.steps)

    def _note_busy(self) -> None:
        if not (self._flights or self._slices):
            self._busy_since = self._clock()

    def _arrive(self, flight: Flight) -> None:
        now = time.monotonic()
        self._stats.device_seconds[flight.phase] += flight.pending.device_seconds
        answer = flight.pending.answer() if flight.parts else None
        row = 0
        for reading, tokens, rows in flight.parts:
            assert answer is not None
            reading.write(rows, answer if len(flight.parts) == 1 else answer[row : row + tokens])
            row += tokens
            if not reading.unread:
                for entry, _ in reading.callers:
                    entry.finished = now
                self._landed += reading.outcomes(self._cache.epoch)
        if not (self._flights or self._slices):
            self._stats.device_busy_seconds += self._clock() - self._busy_since

    def _has_ended(self, flight: Flight) -> bool:
        """Whether a slice is done, or has failed for want of memory, which ends its readings."""
        try:
            if not flight.pending.done():
                return False
        except torch.OutOfMemoryError as error:
            self._give_up([reading for reading, _, _ in flight.parts], error)
            flight.parts.clear()
            return True
        self._learn(flight)
        return True

    def _learn(self, flight: Flight) -> None:
        """Corrects the rate by a slice's.

        One that may have waited for the host, or for decodes, only says that the device is no slower. Otherwise what
        slices wait for would make them shorter, and shorter ones wait for more of it.
        """
        rate = flight.products / max(flight.pending.device_seconds, 1e-6)
        disturbed = flight.pending.device_waited or self._steps_begun() != flight.steps_before
        if rate > self._products_per_second or not disturbed:
            self._products_per_second += _LEARNING_RATE * (rate - self._products_per_second)

    def _give_up(self, readings: Sequence[Reading], error: torch.OutOfMemoryError) -> None:
        """Answers the callers of selections that the device has no memory for; pages are as they were."""
        self.prefills.keep(lambda prefill: prefill.reading not in readings)
        self._refuse([entry for reading in readings for entry, _ in reading.callers], error)
        for reading in readings:
            reading.callers = []

    def _refuse(self, entries: Iterable[Entry], error: torch.OutOfMemoryError) -> None:
        log_event(logger, logging.ERROR, "device out of memory", reason=str(error))
        refused = ResourceExhaustedError("device: no memory left to select with", Reason.OVERLOADED)
        self._landed += [(entry, refused) for entry in entries]

    @staticmethod
    def _note(entries: Iterable[Entry], phase: Phase) -> None:
        now = time.monotonic()
        for entry in entries:
            # The last one names it: what a request appends comes first, then its short spans, then its long ones.
            entry.launched, entry.phase = now, phase


def _keys(entry: Entry) -> memoryview:
    """Bytes of `[T, D]`."""
    return memoryview(_keys_of(entry).data).cast("B")


def _keys_dtype(entry: Entry) -> torch.dtype:
    return TORCH_DTYPES[_keys_of(entry).dtype]


def _keys_of(entry: Entry) -> TensorData:
    request = entry.request
    assert isinstance(request, TokenRequest)
    assert request.keys is not None
    return request.keys.tensor
