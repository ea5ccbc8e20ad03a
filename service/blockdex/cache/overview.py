"""What pages and sequences are like, for people to look at."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from blockdex.cache.page_pool import PagePool
from blockdex.cache.sequence import Sequences
from blockdex.contract.messages import CacheOverview
from blockdex_kernels import IndexSpec

_PAGES_AT_ONCE = 2**20


def overview(pool: PagePool, sequences: Sequences, spec: IndexSpec, max_cells: int, now: float) -> CacheOverview:
    """The pages in `max_cells` cells at most, and the sequences by length; from any thread.

    The cache may change meanwhile, and nothing is locked: its thread must not wait for onlookers. That does no harm.
    The columns of the sequences are replaced only by longer ones, and before an entry beyond the shorter one is in use,
    so every entry read first is found in them. Page ids in them are always ids of pages. Where a sequence comes or
    goes while it is read, its pages may be drawn in the wrong colour, until the next look. All states are told from one
    copy of the holders, so they add up to all pages whatever happens.
    """
    entries = sequences.open_entries()
    lengths = sequences.lengths[:, entries].max(axis=0, initial=0)
    idle_entries = entries[now - sequences.last_calls[entries] >= sequences.leases[entries]]
    holders = pool.holders.copy()
    idle = (holders > 0) & (_holders_among(sequences, idle_entries, len(holders)) >= holders)
    pages_per_cell = max(1, -(-len(holders) // max_cells))
    first_pages = np.arange(0, len(holders), pages_per_cell)

    def cells(pages: NDArray[np.bool_]) -> NDArray[np.int64]:
        return np.add.reduceat(pages, first_pages, dtype=np.int64)

    bounds = _length_bounds(spec)
    return CacheOverview(
        pages_total=len(holders),
        pages_per_cell=pages_per_cell,
        private=cells((holders == 1) & ~idle),
        shared=cells((holders > 1) & ~idle),
        idle=cells(idle),
        idle_sequences=len(idle_entries),
        tokens=int(lengths.sum()),
        lengths=np.bincount(np.searchsorted(bounds, lengths), minlength=len(bounds)),
        length_bounds=bounds,
    )


def _holders_among(sequences: Sequences, entries: NDArray[np.intp], num_pages: int) -> NDArray[np.intp]:
    """How many of the entries hold each page: intp `[num_pages]`."""
    holders = np.zeros(num_pages, np.intp)
    parts = int(sequences.held[entries].sum()) // _PAGES_AT_ONCE + 1
    for part in np.array_split(entries, parts):
        held = sequences.held[part]
        blocks = np.arange(held.sum()) - np.repeat(np.cumsum(held) - held, held)
        pages = sequences.tables.glimpse(np.repeat(part, held), blocks)
        holders += np.bincount(pages, minlength=num_pages)
    return holders


def _length_bounds(spec: IndexSpec) -> tuple[int, ...]:
    """One block, and so on in doubles, up to the longest sequence."""
    bounds = [spec.block_size]
    while bounds[-1] < spec.max_sequence_tokens:
        bounds.append(2 * bounds[-1])
    return tuple(bounds)
