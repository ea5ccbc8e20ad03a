"""The open sequences: pages, per-layer lengths and revisions, lease. Pools and their rows lie among them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blockdex._native import SequenceIndex
from blockdex.cache.page_table import PageTables

_FIRST_ENTRIES = 64


@dataclass(frozen=True, slots=True)
class Sequence:
    """What a sequence held when it was asked for: `lengths` int64 `[L]` and `revisions` uint64 `[L]`."""

    lengths: NDArray[np.int64]
    revisions: NDArray[np.uint64]


class Sequences:
    """The open sequences of all tenants as columns, which the core shares.

    A sequence keeps one of S entries from open to close; S doubles as needed. A pool has one too, and, right behind it,
    its rows have one each; of these it has the revisions, and none has lengths or a lease that ends.

    Attributes:
        index: the entry of each sequence.
        lengths: int64 `[L, S]`, tokens.
        revisions: uint64 `[L, S]`.
        reading: int32 `[L, S]`, prefills that read the layer and are not done.
        held: int64 `[S]`, pages: as many as the longest layer reaches.
        tables: page of each block of each entry, 0 from `held` on.
        forked: int64 `[S]`, blocks up to the last page that a fork shared: pages behind them never were.
        last_calls: float64 `[S]`, clock reading of the last call that succeeded.
        leases: float64 `[S]`, seconds.
        reading_sequence: int32 `[S]`, prefills that read any layer and are not done.
        ids: uint64 `[S]`.
        tenants: uint32 `[S]`, their numbers in the index; 0 where an entry is nobody's, or a row's.
        counts: how many sequences each tenant has open.
        owners: uint32 `[S]`, whose revisions are an entry's: of a row its pool, else itself.
        num_rows: int32 `[S]`, of a pool, rows; else 0.
        max_blocks: int32 `[S]`, of a pool, cells of a row; else 0.
        filled: int64 `[S]`, of a row, blocks before its first cell without a page.
    """

    def __init__(self, num_layers: int) -> None:
        self.index = SequenceIndex()
        self.lengths: NDArray[np.int64] = np.zeros((num_layers, _FIRST_ENTRIES), np.int64)
        self.revisions: NDArray[np.uint64] = np.zeros((num_layers, _FIRST_ENTRIES), np.uint64)
        self.reading: NDArray[np.int32] = np.zeros((num_layers, _FIRST_ENTRIES), np.int32)
        self.held: NDArray[np.int64] = np.zeros(_FIRST_ENTRIES, np.int64)
        self.tables = PageTables(_FIRST_ENTRIES)
        self.forked: NDArray[np.int64] = np.zeros(_FIRST_ENTRIES, np.int64)
        self.last_calls: NDArray[np.float64] = np.zeros(_FIRST_ENTRIES, np.float64)
        self.leases: NDArray[np.float64] = np.zeros(_FIRST_ENTRIES, np.float64)
        self.reading_sequence: NDArray[np.int32] = np.zeros(_FIRST_ENTRIES, np.int32)
        self.ids: NDArray[np.uint64] = np.zeros(_FIRST_ENTRIES, np.uint64)
        self.tenants: NDArray[np.uint32] = np.zeros(_FIRST_ENTRIES, np.uint32)
        self.counts: Counter[str] = Counter()
        self.owners: NDArray[np.uint32] = np.arange(_FIRST_ENTRIES, dtype=np.uint32)
        self.num_rows: NDArray[np.int32] = np.zeros(_FIRST_ENTRIES, np.int32)
        self.max_blocks: NDArray[np.int32] = np.zeros(_FIRST_ENTRIES, np.int32)
        self.filled: NDArray[np.int64] = np.zeros(_FIRST_ENTRIES, np.int64)
        self._free = list(reversed(range(_FIRST_ENTRIES)))

    def __len__(self) -> int:
        return len(self.index)

    def find(self, tenant: str, sequence_id: int) -> int | None:
        """Entry of a sequence, None where the tenant holds no such one."""
        return self.index.find(tenant, sequence_id)

    def find_pool(self, tenant: str, pool_id: int) -> int | None:
        """Entry of a pool, None where the tenant holds no such one."""
        return self.index.find(tenant, pool_id, True)

    def rows(self, pool: int) -> slice:
        """Entries of a pool's rows."""
        return slice(pool + 1, pool + 1 + int(self.num_rows[pool]))

    def is_open(self, entry: int) -> bool:
        """Whether an entry is a sequence's, or a pool's."""
        return bool(self.tenants[entry])

    def open_entries(self) -> NDArray[np.intp]:
        """Entries of all open sequences; also from another thread."""
        # Of a copy: numpy fails where another thread changes what it looks for meanwhile.
        tenants = self.tenants.copy()
        return np.flatnonzero(tenants * (self.num_rows[: len(tenants)] == 0))

    def pages(self, entry: int) -> NDArray[np.int32]:
        """Pages of a sequence `[held]`."""
        return self.tables.get(entry, np.arange(self.held[entry]))

    def state(self, entry: int) -> Sequence:
        """Lengths and revisions as of now."""
        return Sequence(self.lengths[:, entry].copy(), self.revisions[:, entry].copy())

    def add(self, tenant: str, sequence_id: int, lease: float, now: float) -> int:
        """Opens an empty sequence, whose id the tenant does not have open, and answers its entry."""
        if not self._free:
            self._double()
        entry = self._free[-1]
        self.tenants[entry] = self.index.open(tenant, sequence_id, entry)
        self.counts[tenant] += 1
        self._free.pop()
        self.ids[entry] = sequence_id
        self.leases[entry] = lease
        self.last_calls[entry] = now
        return entry

    def remove(self, entry: int) -> None:
        """Closes a sequence; its pages are the caller's to release, before."""
        tenant = self.index.tenant(int(self.tenants[entry]))
        self.counts[tenant] -= 1
        if not self.counts[tenant]:
            del self.counts[tenant]
        self.index.close(int(self.tenants[entry]), int(self.ids[entry]))
        self.tenants[entry] = self.ids[entry] = 0
        self.lengths[:, entry] = 0
        self.revisions[:, entry] = 0
        self.set_pages(entry, 0, np.zeros(0, np.int32))
        self.forked[entry] = 0
        self._free.append(entry)

    def add_pool(
        self, tenant: str, pool_id: int, pages: NDArray[np.int32], num_rows: int, max_blocks: int, now: float
    ) -> None:
        """Opens a pool of such pages, whose id the tenant does not have open, with rows of cells that are not set."""
        entry = self._take_run(1 + num_rows)
        self.tenants[entry] = self.index.open(tenant, pool_id, entry, True)
        self.ids[entry] = pool_id
        self.leases[entry], self.last_calls[entry] = np.inf, now
        self.num_rows[entry], self.max_blocks[entry] = num_rows, max_blocks
        self.set_pages(entry, 0, pages)
        rows = self.rows(entry)
        self.owners[rows] = entry
        for row in range(rows.start, rows.stop):
            self.tables.open_row(row, max_blocks)

    def has_cells(self, pool: int) -> bool:
        """Whether any cell of a pool's rows was set."""
        rows, blocks = self.rows(pool), np.arange(self.max_blocks[pool])
        return any((self.tables.get(row, blocks) >= 0).any() for row in range(rows.start, rows.stop))

    def remove_pool(self, entry: int) -> None:
        """Closes a pool; its pages are the caller's to release, before."""
        rows, max_blocks = self.rows(entry), int(self.max_blocks[entry])
        for row in range(rows.start, rows.stop):
            self.tables.resize(row, max_blocks, 0)
        self.index.close(int(self.tenants[entry]), int(self.ids[entry]), True)
        self.set_pages(entry, 0, np.zeros(0, np.int32))
        self.owners[rows] = np.arange(rows.start, rows.stop)
        self.filled[rows] = 0
        self.revisions[:, entry] = 0
        self.tenants[entry] = self.ids[entry] = self.num_rows[entry] = self.max_blocks[entry] = 0
        self._free += range(entry, rows.stop)

    def set_pages(self, entry: int, block: int, pages: NDArray[np.int32]) -> None:
        """Makes `pages` all that a page table holds from `block` on."""
        held = block + len(pages)
        self.tables.resize(entry, int(self.held[entry]), held)
        self.tables.set(entry, np.arange(block, held), pages)
        self.held[entry] = held

    def _take_run(self, count: int) -> int:
        """The first of so many free entries, one behind the other."""
        while True:
            free = np.sort(np.array(self._free, np.intp))
            spans = free[count - 1 :] - free[: max(len(free) - count + 1, 0)]
            runs = np.flatnonzero(spans == count - 1)
            if len(runs):
                first = int(free[runs[0]])
                self._free = [entry for entry in self._free if not first <= entry < first + count]
                return first
            self._double()

    def _double(self) -> None:
        old = len(self.held)
        for name in ("lengths", "revisions", "reading"):
            setattr(self, name, np.pad(getattr(self, name), ((0, 0), (0, old))))
        # Of these what another thread reads first, the tenants, comes last.
        columns = (
            "held",
            "forked",
            "last_calls",
            "leases",
            "reading_sequence",
            "ids",
            "num_rows",
            "max_blocks",
            "filled",
        )
        for name in (*columns, "tenants"):
            setattr(self, name, np.pad(getattr(self, name), (0, old)))
        self.owners = np.concatenate((self.owners, np.arange(old, 2 * old, dtype=np.uint32)))
        self.tables.double_entries()
        self._free = [*reversed(range(old, 2 * old)), *self._free]
