"""Long spans, answered slice by slice."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from blockdex.scheduler.large_request import Reading


class Slice(NamedTuple):
    """Part of a long span: position of its first token, its tokens, and where they are in the reading."""

    start: int
    length: int
    tokens: slice


class Prefill:
    """One long span of a reading, row `row` of it.

    Attributes:
        reading: where it is from.
        layer: what it reads.
        entry: whose.
        slices: that are on their way.
        given_up: whether nobody waits for the rest of it.
    """

    def __init__(self, reading: Reading, row: int) -> None:
        rows = reading.first.rows
        self.reading = reading
        self.layer, self.entry = reading.first.layer, int(rows.entries[row])
        self.slices = 0
        self.given_up = False
        self._start, self._length = int(rows.starts[row]), int(rows.lengths[row])
        self._first_token = int(rows.lengths[:row].sum())
        self._done = 0

    @property
    def remaining(self) -> int:
        """Tokens that are in no slice yet."""
        return self._length - self._done

    @property
    def is_done(self) -> bool:
        """Whether nothing reads for it any more."""
        return not self.slices and (self.given_up or not self.remaining)

    def products(self, tokens: int) -> float:
        """Dot products that the next slice takes if it has so many tokens."""
        return self.reading.heads * tokens * (self._start + self._done + tokens / 2)

    def tokens_within(self, products: float) -> int:
        """Most tokens of the next slice that take no more dot products."""
        before = self._start + self._done
        return int(math.sqrt(before * before + 2 * products / self.reading.heads)) - before

    def take(self, tokens: int) -> Slice:
        """The next slice, of so many tokens or all that remain."""
        first = self._done
        self._done += min(tokens, self.remaining)
        self.slices += 1
        tokens_there = slice(self._first_token + first, self._first_token + self._done)
        return Slice(self._start + first, self._done - first, tokens_there)


class Prefills:
    """Those that are not wholly begun. Tenants take turns, as many as they weigh, and so do the prefills of each.

    Args:
        weight_of: the weight of a tenant, by its number.
    """

    def __init__(self, weight_of: Callable[[int], float]) -> None:
        self._weight_of = weight_of
        self._turns: dict[int, deque[Prefill]] = {}
        self._left: dict[int, float] = {}

    def __iter__(self) -> Iterator[Prefill]:
        return (prefill for turns in self._turns.values() for prefill in turns)

    def __bool__(self) -> bool:
        return bool(self._turns)

    def add(self, prefill: Prefill) -> None:
        """Puts one behind all others of its tenant."""
        self._turns.setdefault(prefill.reading.first.tenant, deque()).append(prefill)

    def pop(self) -> Prefill:
        """Takes out the one whose turn it is; once its tenant's turn is over, the next one comes after all others'."""
        while True:
            tenant, turns = next(iter(self._turns.items()))
            left = self._left.get(tenant, 0.0)
            if left >= 1.0:
                break
            # Behind all others, with what it may take when they have had their turns.
            self._turns[tenant] = self._turns.pop(tenant)
            self._left[tenant] = left + self._weight_of(tenant)
        self._left[tenant] = left - 1.0
        prefill = turns.popleft()
        if not turns:
            del self._turns[tenant]
        if not self._turns:
            self._left.clear()
        return prefill

    def keep(self, wanted: Callable[[Prefill], bool]) -> None:
        """Forgets all others."""
        kept = {tenant: deque(filter(wanted, turns)) for tenant, turns in self._turns.items()}
        self._turns = {tenant: turns for tenant, turns in kept.items() if turns}
