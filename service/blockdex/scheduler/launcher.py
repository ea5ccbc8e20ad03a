"""What the core does not run itself: large requests, short spans at once and long ones in slices, and their answers."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from blockdex._native import Core
from blockdex.cache import IndexCache
from blockdex.contract.errors import Reason, ResourceExhaustedError
from blockdex.contract.messages import PHASES, Phase
from blockdex.contract.stats import Stats
from blockdex.executor.interface import Bytes, Executor, Packed, Pending, Step
from blockdex.faults import strikes
from blockdex.logs import log_event
from blockdex.ring import layout
from blockdex.scheduler.large_request import ALL_TOKENS, Chosen, LargeRequest, Reading, Rows, readings
from blockdex.scheduler.prefill import Prefill, Prefills
from blockdex.scheduler.sequences import refuse

logger = logging.getLogger(__name__)

# Share of the last slice in what is expected of the next one.
_LEARNING_RATE = 0.25
# Longest slice while several tenants ask, by the device: what one of them asks for next waits for it. On a CPU, so
# short ones take a tenth longer in all.
_CONTENDED_SECONDS = {"cpu": 0.0005, "cuda": 0.001}
# Part of a slice that goes first where queries have to cross to an idle device: it begins early, and what follows
# crosses beside its kernels.
_FIRST_PART = 2


@dataclass(slots=True)
class InFlight:
    """A step on its way.

    Attributes:
        pending: how it gets on.
        phase: `append`, `decode` or `prefill`.
        parts: readings that get so many rows of its answer, in their order, and for which of their own tokens.
        prefill: whose slice it is, if it is one.
        products: of a slice, dot products that it takes.
        steps_before: of a slice, steps that had begun before it.
        appended: requests of keys in regions, which are answered when nobody reads these any more.
    """

    pending: Pending
    phase: Phase
    parts: list[tuple[Reading, int, Chosen]]
    prefill: Prefill | None = None
    products: float = 0.0
    steps_before: int = 0
    appended: Sequence[LargeRequest] = ()


class Launcher:
    """Runs large requests and slices of prefills, without waiting for them, and answers them.

    Args:
        core: has their requests, and is told their answers.
        cache: where the sequences are.
        executor: takes steps to the device.
        stats: where time and sizes are counted.
        decode_queries: a span of at most so many queries is decode, a longer one prefill.
        prefill_slice_seconds: time that one slice of a prefill may take, about.

    Attributes:
        prefills: what is left to begin of the long spans.
    """

    def __init__(
        self,
        core: Core,
        cache: IndexCache,
        executor: Executor,
        stats: Stats,
        *,
        decode_queries: int,
        prefill_slice_seconds: float,
    ) -> None:
        self.prefills = Prefills(core.weight)
        self._core = core
        self._cache = cache
        self._executor = executor
        self._spec = executor.backend.spec
        self._stats = stats
        self._decode_queries = decode_queries
        self._slice_seconds = prefill_slice_seconds
        self._steps = 0
        self._products_per_second = 1e8
        self._in_flight: deque[InFlight] = deque()
        self._slices: deque[InFlight] = deque()
        self._reading: list[Prefill] = []
        self._busy_since = 0.0

    @property
    def in_flight(self) -> bool:
        """Whether anything is on its way."""
        return bool(self._in_flight or self._slices)

    @property
    def waits_for_slices(self) -> bool:
        """Whether nothing else is on its way, and no other slice is to begin now."""
        if not self._slices or self._in_flight:
            return False
        return not self.prefills or len(self._slices) >= self._executor.max_slices

    @property
    def reads(self) -> bool:
        """Whether any prefill is not done."""
        return bool(self._reading)

    def begin(self, requests: Sequence[LargeRequest]) -> None:
        """Begins what large requests ask of the device: all appends, then all selections."""
        self._append([request for request in requests if request.keys is not None and request.rows.applies.any()])
        self._select(readings((request for request in requests if request.queries is not None), self._spec))
        for request in requests:
            if request.queries is None and not _is_read_late(request):
                self._answer_append(request)

    def begin_slice(self) -> None:
        """Begins one slice of the prefill whose turn it is, if there is one, and if not enough are on their way."""
        if not self.prefills or len(self._slices) >= self._executor.max_slices:
            return
        prefill = self.prefills.pop()
        reading, first = prefill.reading, prefill.reading.first
        seconds = self._slice_seconds
        if self._core.contended:
            seconds = min(seconds, _CONTENDED_SECONDS[self._executor.backend.device.type])
        in_time = prefill.tokens_within(self._products_per_second * seconds)
        most = min(prefill.remaining, max(self._executor.max_slice_rows // reading.heads, 1))
        if not self._slices and not reading.lies_on(self._executor.backend.device):
            in_time //= _FIRST_PART
        tokens = min(max(in_time, self._executor.least_slice), most)
        products = prefill.products(tokens)
        part = prefill.take(tokens)
        if prefill.remaining:
            # Behind the others: a short prefill does not wait for a long one to end.
            self.prefills.add(prefill)
        row = (prefill.layer, part.start, part.length, self._cache.first_rows[prefill.entry], 0)
        columns = np.array([row], np.int32).T.copy()
        queries = reading.packed([reading.queries(part.tokens)])
        targets = reading.targets(part.tokens)
        step = Step(columns, None, queries, first.order, first.return_scores, first.raw_scores, targets)
        self._note([caller for caller, _ in reading.callers], "prefill")
        self._note_busy()
        try:
            pending = self._on_device(self._executor.begin_prefill, step)
        except torch.OutOfMemoryError as error:
            prefill.slices -= 1
            self._give_up([reading], error)
            return
        parts: list[tuple[Reading, int, Chosen]] = [(reading, part.length, part.tokens)]
        self._slices.append(InFlight(pending, "prefill", parts, prefill, products, self._steps_begun()))
        self._stats.launched("prefill", part.length, 1)

    def land(self) -> None:
        """Answers the requests of steps that have ended, once they are answered whole."""
        while self._in_flight and self._in_flight[0].pending.done():
            self._arrive(self._in_flight.popleft())
        while self._slices and self._has_ended(self._slices[0]):
            self._arrive(self._slices.popleft())

    def drop_gone(self) -> None:
        """Gives up prefills that nobody waits for any more."""
        for reading in {id(prefill.reading): prefill.reading for prefill in self.prefills}.values():
            reading.callers = [each for each in reading.callers if not self._core.drop_if_gone(each[0].number)]
            if not reading.callers:
                self._stop_reading([reading])

    def _append(self, requests: Sequence[LargeRequest]) -> None:
        """Writes the keys of every request, one step for all that came in the same dtype."""
        by_dtype: dict[torch.dtype, list[tuple[Bytes, LargeRequest, Rows]]] = {}
        self._note(requests, "append")
        for request in requests:
            rows, keys = request.rows, request.keys
            assert keys is not None
            tokens: Chosen = ALL_TOKENS
            if not rows.applies.all():
                tokens, rows = rows.tokens_of(rows.applies), rows.subset(rows.applies)
            data = keys.take(self._spec.head_dim * keys.dtype.itemsize, tokens)
            by_dtype.setdefault(keys.dtype, []).append((data, request, rows))
        for dtype, parts in by_dtype.items():
            columns = self._columns([(request.layer, rows) for _, request, rows in parts])
            step = Step(columns, Packed(dtype, 1, [data for data, _, _ in parts]))
            appended = [request for _, request, _ in parts if request.queries is None and _is_read_late(request)]
            self._begin(step, "append", [], appended)
            self._stats.launched("append", step.num_tokens, len(parts))

    def _select(self, made: Sequence[Reading]) -> None:
        """Begins to answer the short spans of every reading; the long ones become prefills."""
        groups: dict[tuple[object, ...], list[tuple[Reading, Rows, Chosen]]] = {}
        for reading in made:
            rows = reading.first.rows
            if reading.longest <= self._decode_queries:
                groups.setdefault(reading.alike, []).append((reading, rows, ALL_TOKENS))
                continue
            short = rows.lengths <= self._decode_queries
            reading.is_direct = not short.any() and all(each.is_answered_in_regions for each, _ in reading.callers)
            for row in np.flatnonzero(~short).tolist():
                self._add_prefill(Prefill(reading, row))
            if short.any():
                groups.setdefault(reading.alike, []).append((reading, rows.subset(short), rows.tokens_of(short)))
        for group in groups.values():
            self._decode(group)

    def _add_prefill(self, prefill: Prefill) -> None:
        self._cache.begin_reading(prefill.layer, prefill.entry)
        self._reading.append(prefill)
        self.prefills.add(prefill)

    def _decode(self, group: Sequence[tuple[Reading, Rows, Chosen]]) -> None:
        """Begins to answer short spans that are alike."""
        first = group[0][0]
        queries = first.packed([reading.queries(tokens) for reading, _, tokens in group])
        columns = self._columns([(reading.first.layer, rows) for reading, rows, _ in group])
        asked = first.first
        step = Step(columns, None, queries, asked.order, asked.return_scores, asked.raw_scores)
        self._note([caller for reading, _, _ in group for caller, _ in reading.callers], "decode")
        try:
            self._begin(step, "decode", [(reading, int(rows.lengths.sum()), tokens) for reading, rows, tokens in group])
        except torch.OutOfMemoryError as error:
            self._give_up([reading for reading, _, _ in group], error)
            return
        self._stats.launched("decode", step.num_tokens, len(group))

    def _columns(self, parts: Sequence[tuple[int, Rows]]) -> NDArray[np.int32]:
        """int32 `[5, R]`: see `Step.columns`."""
        first_rows = self._cache.first_rows
        made = [
            np.stack([np.full(len(rows.ids), layer), rows.starts, rows.lengths, first_rows[rows.entries]])
            for layer, rows in parts
        ]
        columns = np.zeros((5, sum(part.shape[1] for part in made)), np.int32)
        columns[:4] = np.concatenate(made, axis=1)
        return columns

    def _begin(
        self, step: Step, phase: Phase, parts: list[tuple[Reading, int, Chosen]], appended: Sequence[LargeRequest] = ()
    ) -> None:
        while len(self._in_flight) >= self._executor.max_pending:
            if self._in_flight[0].pending.done():
                self._arrive(self._in_flight.popleft())
            time.sleep(0)
        self._note_busy()
        self._steps += 1
        self._in_flight.append(InFlight(self._on_device(self._executor.begin, step), phase, parts, appended=appended))

    def _on_device(self, begin: Callable[[Step], Pending], step: Step) -> Pending:
        if strikes("launch"):
            raise RuntimeError("device: a launch failed on purpose")
        if step.keys is None and strikes("allocation"):
            raise torch.OutOfMemoryError("device: an allocation failed on purpose")
        return begin(step)

    def _steps_begun(self) -> int:
        """Other steps that have begun so far, the core's too."""
        return self._steps + self._core.steps

    def _note_busy(self) -> None:
        if not self.in_flight:
            self._busy_since = self._core.time_beside

    def _note(self, requests: Sequence[LargeRequest], phase: Phase) -> None:
        # The last one names it: what a request appends comes first, then its short spans, then its long ones.
        for request in requests:
            self._core.begin(request.number, PHASES.index(phase) + 1)

    def _arrive(self, flight: InFlight) -> None:
        self._stats.device_seconds[flight.phase] += flight.pending.device_seconds
        answer = flight.pending.answer() if flight.parts else None
        row = 0
        for request in flight.appended:
            self._answer_append(request)
        for reading, count, tokens in flight.parts:
            own = answer if answer is None or len(flight.parts) == 1 else answer[row : row + count]
            reading.write(tokens, count, own)
            row += count
            if not reading.unread:
                self._answer(reading)
        if flight.prefill is not None:
            flight.prefill.slices -= 1
            self._end_reading()
        if not self.in_flight:
            self._stats.device_busy_seconds += self._core.time_beside - self._busy_since

    def _answer_append(self, request: LargeRequest) -> None:
        self._core.answer(request.number, 0, 0, 0, 0, 0, None, None)

    def _answer(self, reading: Reading) -> None:
        for caller, answer in reading.shares():
            flags = layout.HAS_BLOCK_IDS | (layout.HAS_SCORES if caller.return_scores else 0)
            ids = scores = None
            if answer is not None:
                if caller.pages:
                    self._core.name_pages(caller.number, answer.block_ids)
                ids = _for_answer(answer.block_ids, caller.block_ids)
                scores = _for_answer(answer.scores, caller.scores)
            shape = (reading.num_tokens, caller.num_heads, self._spec.topk)
            self._core.answer(caller.number, flags, *shape, 0, ids, scores)
        reading.callers = []

    def _end_reading(self) -> None:
        """What prefills have read to the end may be written again."""
        for prefill in self._reading:
            if prefill.is_done:
                self._cache.end_reading(prefill.layer, prefill.entry)
                self._core.try_again()
        self._reading = [prefill for prefill in self._reading if not prefill.is_done]

    def _stop_reading(self, given_up: Sequence[Reading]) -> None:
        for prefill in self._reading:
            prefill.given_up |= prefill.reading in given_up
        self.prefills.keep(lambda prefill: not prefill.given_up)
        self._end_reading()

    def _has_ended(self, flight: InFlight) -> bool:
        """Whether a slice is done, or has failed for want of memory, which ends its reading."""
        try:
            if not flight.pending.done():
                return False
        except torch.OutOfMemoryError as error:
            self._give_up([reading for reading, _, _ in flight.parts], error)
            flight.parts.clear()
            return True
        self._learn(flight)
        return True

    def _learn(self, flight: InFlight) -> None:
        """Corrects the rate by a slice's.

        One that may have waited for the host, or for decodes, only says that the device is no slower. Otherwise what
        slices wait for would make them shorter, and shorter ones wait for more of it.
        """
        rate = flight.products / max(flight.pending.device_seconds, 1e-6)
        disturbed = flight.pending.device_waited or self._steps_begun() != flight.steps_before
        if rate > self._products_per_second or not disturbed:
            self._products_per_second += _LEARNING_RATE * (rate - self._products_per_second)

    def _give_up(self, given_up: Sequence[Reading], error: torch.OutOfMemoryError) -> None:
        """Answers the callers of selections that the device has no memory for; pages are as they were."""
        log_event(logger, logging.ERROR, "device out of memory", reason=str(error))
        refused = ResourceExhaustedError("device: no memory left to select with", Reason.OVERLOADED)
        for reading in given_up:
            for caller, _ in reading.callers:
                refuse(self._core, caller.number, refused)
            reading.callers = []
        self._stop_reading(given_up)


def _is_read_late(request: LargeRequest) -> bool:
    """Whether the device reads its keys from a region, after they were asked for."""
    return request.keys is not None and isinstance(request.keys.data, torch.Tensor) and bool(request.rows.applies.any())


def _for_answer(part: NDArray[Any] | None, region: torch.Tensor | None) -> NDArray[Any] | None:
    """A part of an answer for the core to write; None where it is on the device now, which the core cannot reach."""
    if part is None or region is None or not region.is_cuda:
        return part
    there = torch.from_numpy(part).view(-1)
    region.view(there.dtype).copy_(there)
    return None
