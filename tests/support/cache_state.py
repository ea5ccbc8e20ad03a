"""What the cache tests share: requests in short, a cache laid open, and pages that really hold something."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.ring_messages import Spans
from blockdex.cache import TABLE_ROW, IndexCache, PageCopy
from blockdex.cache.page_table import PageTables

Name = tuple[str, int]


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def spans(*rows: tuple[int, ...]) -> Spans:
    """Spans of rows (sequence id, start, length[, revision])."""
    padded = [(*row, 0)[:4] for row in rows]
    ids, starts, lengths, revisions = zip(*padded, strict=True)
    return Spans(
        np.array(ids, np.uint64),
        np.array(starts, np.int64),
        np.array(lengths, np.int64),
        np.array(revisions, np.uint64),
    )


def pages(cache: IndexCache, tenant: str, sequence_id: int) -> list[int]:
    """All pages of a sequence."""
    return held_pages(cache)[tenant, sequence_id]


def held_pages(cache: IndexCache) -> dict[Name, list[int]]:
    """Pages of every open sequence, without a call that the cache would notice."""
    sequences = cache._sequences
    return {name_of(cache, entry): sequences.pages(entry).tolist() for entry in sequences.open_entries().tolist()}


def name_of(cache: IndexCache, entry: int) -> Name:
    """Whose an entry is."""
    sequences = cache._sequences
    return sequences.index.tenant(int(sequences.tenants[entry])), int(sequences.ids[entry])


def page_table(cache: IndexCache, tenant: str, spans: Spans) -> NDArray[np.int32]:
    """Page of each block of each row's sequence, as far as the longest span reaches, 0 where there is none."""
    width = -(-int((spans.starts + spans.lengths).max()) // cache.spec.block_size)
    rows = cache.first_rows[[cache._entry(tenant, sequence) for sequence in spans.sequence_ids.tolist()]]
    held = [len(pages(cache, tenant, sequence)) for sequence in spans.sequence_ids.tolist()]
    table = np.zeros((len(rows), width), np.int32)
    for row, (first, count) in enumerate(zip(rows.tolist(), held, strict=True)):
        own = cache.table_cells[first * TABLE_ROW :][: min(count, width)]
        table[row, : len(own)] = own
    return table


def snapshot(cache: IndexCache) -> dict[str, Any]:
    """All that a cache holds, to be compared before and after a call that must change nothing."""
    state: dict[str, Any] = {"evictions": cache._evictions, "epoch": cache.epoch}
    for part in (cache._pool, cache._sequences, cache._sequences.tables):
        for name, value in vars(part).items():
            if name == "index":
                state[name] = len(value)
            elif name != "tables":
                state[f"{type(part).__name__}.{name}"] = pickle.dumps(value)
    return state


def check_integrity(cache: IndexCache) -> None:
    """Recounts everything that the cache counts, and checks that no page and no slot is in two places."""
    pool, sequences, held = cache._pool, cache._sequences, held_pages(cache)
    free = list(pool._free)
    holders = Counter(page for pages in held.values() for page in pages)
    assert all(len(set(pages)) == len(pages) for pages in held.values()), "a page twice in one sequence"
    assert len(set(free)) == len(free), "a page freed twice"
    assert set(free).isdisjoint(holders), "a page both free and held"
    assert set(free) | set(holders) == set(range(pool.total)), "a page lost"
    assert pool.holders.tolist() == [holders[page] for page in range(pool.total)]
    tenants = {(page, tenant) for (tenant, _), pages in held.items() for page in pages}
    assert len(tenants) == len(holders), "a page held by two tenants"

    usage = cache.usage()
    assert (usage.pages_total, usage.pages_used) == (pool.total, len(holders))
    assert usage.pages_shared == sum(count > 1 for count in holders.values())
    assert usage.sequences == len(held)

    tables = check_tables(sequences.tables, sequences.held)
    for entry in sequences.open_entries().tolist():
        tenant, sequence_id = name_of(cache, entry)
        assert sequences.find(tenant, sequence_id) == entry
        longest = int(sequences.lengths[:, entry].max())
        assert sequences.held[entry] == -(-longest // cache.spec.block_size), "pages that no layer reaches, or too few"
        assert not tables[entry, sequences.held[entry] :].any(), "a page behind the last one"
        shared = [block for block, page in enumerate(held[tenant, sequence_id]) if holders[page] > 1]
        assert all(block < sequences.forked[entry] for block in shared)
    free_entries = sequences._free
    assert sorted([*free_entries, *sequences.open_entries().tolist()]) == list(range(len(sequences.held)))
    assert len(sequences) == len(held)
    assert not sequences.reading.any() and not sequences.reading_sequence.any(), "a prefill that does not end"
    assert pool.free_pages[0] == len(free)
    for column in (sequences.lengths.T, sequences.revisions.T, sequences.held, sequences.forked, tables):
        assert not column[free_entries].any(), "a free entry that remembers"


def first_blocks(tables: PageTables, entries: NDArray[np.intp], width: int) -> NDArray[np.int32]:
    """The first `width` cells of entries `[N]`, 0 behind what is an entry's own: `[N, width]`."""
    blocks = np.arange(width)
    inside = blocks < tables._num_rows[entries, None] * TABLE_ROW
    return tables.cells[np.where(inside, tables.first_rows[entries, None] * TABLE_ROW + blocks, 0)]


def check_tables(tables: PageTables, held: NDArray[np.int64]) -> NDArray[np.int32]:
    """Checks that every row is in one place, and answers all page tables in full."""
    taken = [range(first, first + rows) for first, rows in zip(tables.first_rows, tables._num_rows, strict=True)]
    free = [range(first, first + rows) for rows, firsts in tables._free.items() for first in firsts]
    rows = sorted(row for extent in (*taken, *free) for row in extent)
    assert rows == list(range(1, tables._unused_row)), "a row lost, or in two places"
    assert not any(tables.cells[64 * extent.start : 64 * extent.stop].any() for extent in free), (
        "a free row that remembers"
    )
    assert not tables.cells[:64].any()
    assert ((tables._num_rows == 0) == (held == 0)).all()
    assert (tables._num_rows * 64 >= held).all()
    return first_blocks(tables, np.arange(len(held)), 64 * int(tables._num_rows.max()))


class PageStore:
    """Pages `[num_pages, L, block_size]` that hold one integer a key, moved and written as an engine would."""

    def __init__(self, num_pages: int, num_layers: int, block_size: int) -> None:
        self.pages: NDArray[np.int64] = np.full((num_pages, num_layers, block_size), -1, np.int64)

    def copy(self, copies: Iterable[PageCopy]) -> None:
        """Copies pages, in order."""
        for source, destination in copies:
            self.pages[destination] = self.pages[source]

    def write(self, table: NDArray[np.int32], layer: int, start: int, keys: Sequence[int]) -> None:
        """Writes keys from position `start` on."""
        block_size = self.pages.shape[2]
        for position, key in enumerate(keys, start):
            self.pages[table[position // block_size], layer, position % block_size] = key

    def read(self, table: NDArray[np.int32], layer: int, length: int) -> list[int]:
        """The first `length` keys."""
        keys: list[int] = self.pages[table, layer].reshape(-1)[:length].tolist()
        return keys
