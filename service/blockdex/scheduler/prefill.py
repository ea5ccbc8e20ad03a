"""Long spans, answered slice by slice."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np

from blockdex.contract.messages import Spans
from blockdex.scheduler.request import SequenceKey
from blockdex.scheduler.selection_group import Part, Reading


class Prefill:
    """One long span of a reading, row `row` of its spans.

    Attributes:
        reading: where it is from.
        sequence: the sequence and layer that it reads.
    """

    def __init__(self, reading: Reading, row: int) -> None:
        spans = reading.request.spans
        self.reading = reading
        self._row = row
        self.sequence: tuple[SequenceKey, int] = (
            (reading.request.tenant, int(spans.sequence_ids[row])),
            reading.request.layer,
        )
        self._start, self._length = int(spans.starts[row]), int(spans.lengths[row])
        self._first_row = int(spans.lengths[:row].sum())
        self._done = 0

    @property
    def remaining(self) -> int:
        """Tokens that are in no slice yet."""
        return self._length - self._done

    def products(self, tokens: int) -> float:
        """Dot products that the next slice takes if it has so many tokens."""
        return self.reading.heads * tokens * (self._start + self._done + tokens / 2)

    def tokens_within(self, products: float) -> int:
        """Most tokens of the next slice that take no more dot products."""
        before = self._start + self._done
        return int(math.sqrt(before * before + 2 * products / self.reading.heads)) - before

    def take(self, tokens: int) -> tuple[Part, slice]:
        """The next slice: its run, and its rows in the reading."""
        request, first = self.reading.request, self._done
        self._done += min(tokens, self.remaining)
        spans = request.spans
        run = Spans(
            spans.sequence_ids[self._row : self._row + 1],
            np.array([self._start + first]),
            np.array([self._done - first]),
            spans.revisions[self._row : self._row + 1],
        )
        rows = slice(self._first_row + first, self._first_row + self._done)
        return Part(request.tenant, request.layer, run), rows


class Prefills:
    """Those that are not wholly begun. Tenants take turns, and so do the prefills of each."""

    def __init__(self) -> None:
        self._turns: dict[str, deque[Prefill]] = {}

    def __iter__(self) -> Iterator[Prefill]:
        return (prefill for turns in self._turns.values() for prefill in turns)

    def __bool__(self) -> bool:
        return bool(self._turns)

    def add(self, prefill: Prefill) -> None:
        """Puts one behind all others of its tenant."""
        self._turns.setdefault(prefill.reading.request.tenant, deque()).append(prefill)

    def pop(self) -> Prefill:
        """Takes out the one whose turn it is; its tenant's next turn comes after all other tenants'."""
        tenant, turns = next(iter(self._turns.items()))
        del self._turns[tenant]
        prefill = turns.popleft()
        if turns:
            self._turns[tenant] = turns
        return prefill

    def keep(self, wanted: Callable[[Prefill], bool]) -> None:
        """Forgets all others."""
        kept = {tenant: deque(filter(wanted, turns)) for tenant, turns in self._turns.items()}
        self._turns = {tenant: turns for tenant, turns in kept.items() if turns}
