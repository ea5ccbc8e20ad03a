"""The open sequences: pages, per-layer lengths and revisions, lease."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blockdex._native import SequenceIndex
from blockdex.cache.page_table import PageTables

_FIRST_COLUMNS = 64


@dataclass(frozen=True, slots=True)
class Sequence:
    """What a sequence held when it was asked for: `lengths` int64 `[L]` and `revisions` uint64 `[L]`."""

    lengths: NDArray[np.int64]
    revisions: NDArray[np.uint64]


class Sequences:
    """The open sequences of all tenants as columns, which the core shares.

    A sequence keeps one of S columns from open to close; S doubles as needed.

    Attributes:
        index: the column of each sequence.
        lengths: int64 `[L, S]`, tokens.
        revisions: uint64 `[L, S]`.
        reading: int32 `[L, S]`, prefills that read the layer and are not done.
        held: int64 `[S]`, pages: as many as the longest layer reaches.
        tables: page of each block of each column, 0 from `held` on.
        forked: int64 `[S]`, blocks up to the last page that a fork shared: pages behind them never were.
        last_calls: float64 `[S]`, clock reading of the last call that succeeded.
        leases: float64 `[S]`, seconds.
        reading_sequence: int32 `[S]`, prefills that read any layer and are not done.
        ids: uint64 `[S]`.
        tenants: uint32 `[S]`, their numbers in the index; 0 where a column is nobody's.
    """

    def __init__(self, num_layers: int) -> None:
        self.index = SequenceIndex()
        self.lengths: NDArray[np.int64] = np.zeros((num_layers, _FIRST_COLUMNS), np.int64)
        self.revisions: NDArray[np.uint64] = np.zeros((num_layers, _FIRST_COLUMNS), np.uint64)
        self.reading: NDArray[np.int32] = np.zeros((num_layers, _FIRST_COLUMNS), np.int32)
        self.held: NDArray[np.int64] = np.zeros(_FIRST_COLUMNS, np.int64)
        self.tables = PageTables(_FIRST_COLUMNS)
        self.forked: NDArray[np.int64] = np.zeros(_FIRST_COLUMNS, np.int64)
        self.last_calls: NDArray[np.float64] = np.zeros(_FIRST_COLUMNS, np.float64)
        self.leases: NDArray[np.float64] = np.zeros(_FIRST_COLUMNS, np.float64)
        self.reading_sequence: NDArray[np.int32] = np.zeros(_FIRST_COLUMNS, np.int32)
        self.ids: NDArray[np.uint64] = np.zeros(_FIRST_COLUMNS, np.uint64)
        self.tenants: NDArray[np.uint32] = np.zeros(_FIRST_COLUMNS, np.uint32)
        self._free = list(reversed(range(_FIRST_COLUMNS)))

    def __len__(self) -> int:
        return len(self.index)

    def find(self, tenant: str, sequence_id: int) -> int | None:
        """Column of a sequence, None where the tenant holds no such one."""
        return self.index.find(tenant, sequence_id)

    def is_open(self, column: int) -> bool:
        """Whether a column is a sequence's."""
        return bool(self.tenants[column])

    def open_columns(self) -> NDArray[np.intp]:
        """Columns of all open sequences; also from another thread."""
        # Of a copy: numpy fails where another thread changes what it looks for meanwhile.
        return np.flatnonzero(self.tenants.copy())

    def pages(self, column: int) -> NDArray[np.int32]:
        """Pages of a sequence `[held]`."""
        return self.tables.get(column, np.arange(self.held[column]))

    def state(self, column: int) -> Sequence:
        """Lengths and revisions as of now."""
        return Sequence(self.lengths[:, column].copy(), self.revisions[:, column].copy())

    def add(self, tenant: str, sequence_id: int, lease: float, now: float) -> int:
        """Opens an empty sequence, whose id the tenant does not have open, and answers its column."""
        if not self._free:
            self._double()
        column = self._free[-1]
        self.tenants[column] = self.index.open(tenant, sequence_id, column)
        self._free.pop()
        self.ids[column] = sequence_id
        self.leases[column] = lease
        self.last_calls[column] = now
        return column

    def remove(self, column: int) -> None:
        """Closes a sequence; its pages are the caller's to release, before."""
        self.index.close(int(self.tenants[column]), int(self.ids[column]))
        self.tenants[column] = self.ids[column] = 0
        self.lengths[:, column] = 0
        self.revisions[:, column] = 0
        self.set_pages(column, 0, np.zeros(0, np.int32))
        self.forked[column] = 0
        self._free.append(column)

    def set_pages(self, column: int, block: int, pages: NDArray[np.int32]) -> None:
        """Makes `pages` all that a page table holds from `block` on."""
        held = block + len(pages)
        self.tables.resize(column, int(self.held[column]), held)
        self.tables.set(column, np.arange(block, held), pages)
        self.held[column] = held

    def _double(self) -> None:
        old = len(self.held)
        for name in ("lengths", "revisions", "reading"):
            setattr(self, name, np.pad(getattr(self, name), ((0, 0), (0, old))))
        for name in ("held", "forked", "last_calls", "leases", "reading_sequence", "ids", "tenants"):
            setattr(self, name, np.pad(getattr(self, name), (0, old)))
        self.tables.double_columns()
        self._free = list(reversed(range(old, 2 * old)))
