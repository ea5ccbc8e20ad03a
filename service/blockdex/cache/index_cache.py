"""The cache's verbs: the life of sequences, and which pages hold them.

What an append or a selection may do is the core's to say (`csrc/core/admit.c`), which reads and writes the columns that
are kept here; it asks for the pages that an append needs. The cache knows page ids, not pages: it says which pages must
be copied first; its caller moves the data. It belongs to one thread; only `usage` and `overview` may be called from
another.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from blockdex._native import SequenceIndex
from blockdex._native import now as native_now
from blockdex.cache.eviction import are_idle, choose_victims
from blockdex.cache.overview import overview
from blockdex.cache.page_pool import PageCopy, PagePool
from blockdex.cache.pools import check_pool, check_tables, pool_exists
from blockdex.cache.sequence import Sequence, Sequences
from blockdex.contract.errors import (
    AlreadyExistsError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
    ResourceExhaustedError,
)
from blockdex.contract.messages import CacheOverview, CacheUsage
from blockdex_kernels import IndexSpec


class SequenceColumns(NamedTuple):
    """What the core shares of S sequences in L layers: see `Sequences`, `PageTables` and `PagePool`."""

    sequences: SequenceIndex
    lengths: NDArray[np.int64]
    revisions: NDArray[np.uint64]
    reading: NDArray[np.int32]
    held: NDArray[np.int64]
    forked: NDArray[np.int64]
    last_calls: NDArray[np.float64]
    first_rows: NDArray[np.int32]
    reading_sequence: NDArray[np.int32]
    cells: NDArray[np.int32]
    holders: NDArray[np.int32]
    free_pages: NDArray[np.int64]
    owners: NDArray[np.uint32]
    num_rows: NDArray[np.int32]
    max_blocks: NDArray[np.int32]
    filled: NDArray[np.int64]
    page_numbers: NDArray[np.int32]


MANY_SEQUENCES = 4096
"""From so many on, those that are empty and past their lease are given up as others are opened."""

_LOOKED_AT = 4


class IndexCache:
    """Sequences, and the pages that they hold.

    Attributes:
        spec: the indexer.
        epoch: uint64, drawn at random when the cache was born, never 0.
    """

    def __init__(
        self,
        spec: IndexSpec,
        num_pages: int,
        *,
        default_lease_seconds: float = 600.0,
        max_lease_seconds: float = math.inf,
        max_tenant_sequences: float = math.inf,
        clock: Callable[[], float] = native_now,
    ) -> None:
        self.spec = spec
        self.epoch = secrets.randbelow(2**64 - 1) + 1
        self._default_lease_seconds = default_lease_seconds
        self._max_lease_seconds = max_lease_seconds
        self._max_tenant_sequences = max_tenant_sequences
        self._clock = clock
        self._pool = PagePool(num_pages)
        self._sequences = Sequences(spec.num_layers)
        self._evictions = 0
        self._evicted: dict[str, list[int]] = {}
        self._to_clear: list[NDArray[np.int32]] = []
        self._kept_since = float("inf")
        self._named = np.zeros(0, np.intp)
        self._next_looked_at = 0

    def begin_batch(self, began: float | None = None, named: NDArray[np.intp] | None = None) -> None:
        """No sequence is evicted that a call has named since then, a clock reading, or from now on.

        Args:
            began: the clock reading; None for now.
            named: entries `[N]` of the batch's own requests, which are not evicted before those have had their turn.
        """
        self._kept_since = self._clock() if began is None else began
        self._named = np.zeros(0, np.intp) if named is None else named

    def open_sequences(self, tenant: str, leases: Mapping[int, float]) -> None:
        """Opens empty sequences, all or none, each with its lease in seconds; 0 stands for the default.

        One that is open and still as it was opened is only given its lease.

        Raises:
            InvalidArgumentError: INVALID_SPANS, of the first whose lease is longer than any may be.
            AlreadyExistsError: SEQUENCE_EXISTS, of the first that has tokens or a revision.
            ResourceExhaustedError: OVERLOADED, the tenant would have more open than it may.
        """
        sequences, now, more = self._sequences, self._clock(), 0
        for sequence_id, seconds in leases.items():
            if seconds > self._max_lease_seconds:
                raise _too_long_a_lease(sequence_id, seconds, self._max_lease_seconds)
            entry = sequences.find(tenant, sequence_id)
            if entry is not None and (sequences.lengths[:, entry].any() or sequences.revisions[:, entry].any()):
                raise _exists(sequence_id)
            more += entry is None
        self._check_count(tenant, more, now)
        for sequence_id, seconds in leases.items():
            lease, entry = seconds or self._default_lease_seconds, sequences.find(tenant, sequence_id)
            if entry is None:
                self._add(tenant, sequence_id, lease, now)
            else:
                sequences.leases[entry], sequences.last_calls[entry] = lease, now

    def get_sequence(self, tenant: str, sequence_id: int) -> Sequence:
        """Lengths and revisions.

        Raises:
            NotFoundError: UNKNOWN_SEQUENCE.
        """
        entry = self._entry(tenant, sequence_id)
        self._sequences.last_calls[entry] = self._clock()
        return self._sequences.state(entry)

    def fork_sequence(self, tenant: str, parent_id: int, child_id: int, length: int) -> tuple[Sequence, list[PageCopy]]:
        """Opens `child_id` with the first `length` tokens of each of its parent's layers, or as many as there are.

        Pages are shared, but for those inside which a layer of the child ends: they are copied.

        Returns:
            The child, and the copies to make, in order, before any key is written.

        Raises:
            NotFoundError: UNKNOWN_SEQUENCE, the parent.
            AlreadyExistsError: SEQUENCE_EXISTS, the child.
            ResourceExhaustedError: OUT_OF_PAGES; or OVERLOADED, the tenant would have more open than it may.
        """
        sequences, pool, block_size = self._sequences, self._pool, self.spec.block_size
        parent = self._entry(tenant, parent_id)
        self._check_absent(tenant, child_id)
        self._check_count(tenant, 1, self._clock())
        lengths = np.minimum(sequences.lengths[:, parent], length)
        pages = sequences.pages(parent)[: self._blocks(lengths).max()]
        partial = np.unique(lengths[lengths % block_size != 0] // block_size)
        if len(partial) > pool.free:
            subject = f"sequence {child_id}: fork of sequence {parent_id}"
            self._evict(self._find_room(subject, np.array([parent]), pool.holders.copy(), len(partial)))

        sequences.last_calls[parent] = now = self._clock()
        child = self._add(tenant, child_id, float(sequences.leases[parent]), now)
        pool.share(np.delete(pages, partial))
        sources, pages[partial] = pages[partial], pool.allocate(len(partial))
        sequences.set_pages(child, 0, pages)
        sequences.lengths[:, child] = lengths
        # Those that were copied are nobody else's, so who goes on in one of them writes into no page that is shared.
        shared = np.setdiff1d(np.arange(len(pages)), partial, assume_unique=True)
        sequences.forked[[parent, child]] = np.maximum(sequences.forked[[parent, child]], shared.max(initial=-1) + 1)
        return sequences.state(child), list(map(PageCopy, sources.tolist(), pages[partial].tolist()))

    def truncate_sequence(self, tenant: str, sequence_id: int, length: int) -> Sequence:
        """Cuts every layer to at most `length` tokens; revisions stay.

        Raises:
            NotFoundError: UNKNOWN_SEQUENCE.
        """
        entry = self._entry(tenant, sequence_id)
        lengths = np.minimum(self._sequences.lengths[:, entry], length)
        self._sequences.lengths[:, entry] = lengths
        self._resize(entry, int(self._blocks(lengths).max()))
        self._sequences.last_calls[entry] = self._clock()
        return self._sequences.state(entry)

    def close_sequences(self, tenant: str, sequence_ids: Iterable[int]) -> None:
        """Gives up sequences; one that is not open is fine."""
        for sequence_id in sequence_ids:
            entry = self._sequences.find(tenant, sequence_id)
            if entry is not None:
                self._remove(entry)

    def create_pool(self, tenant: str, pool_id: int, num_pages: int, num_rows: int, max_blocks: int) -> None:
        """Sets pages aside, and a table of rows whose cells are not set.

        A pool that is there already, of the same sizes and without a cell that was set, stays as it is.

        Raises:
            InvalidArgumentError: INVALID_POOL, sizes or an id that no pool has.
            AlreadyExistsError: POOL_EXISTS.
            ResourceExhaustedError: OUT_OF_PAGES; OVERLOADED where the tables of all pools would be too large.
        """
        sequences, pool = self._sequences, self._pool
        check_pool(pool_id, num_pages, num_rows, max_blocks, self.spec.max_blocks)
        entry = sequences.find_pool(tenant, pool_id)
        if entry is not None:
            sizes = (int(sequences.held[entry]), int(sequences.num_rows[entry]), int(sequences.max_blocks[entry]))
            if sizes != (num_pages, num_rows, max_blocks) or sequences.has_cells(entry):
                raise pool_exists(pool_id, sizes, (num_pages, num_rows, max_blocks))
            return
        check_tables(pool_id, sequences.num_rows, sequences.max_blocks, num_rows, max_blocks)
        nobody = np.zeros(0, np.intp)
        self._evict(self._find_room(f"pool {pool_id}: creation", nobody, pool.holders.copy(), num_pages))
        pages = pool.allocate(num_pages)
        pool.numbers[pages] = np.arange(num_pages)
        # Of a pool all is read that its cells name, so nothing of another tenant may be left there.
        self._to_clear.append(pages)
        sequences.add_pool(tenant, pool_id, pages, num_rows, max_blocks, self._clock())

    def close_pool(self, tenant: str, pool_id: int) -> None:
        """Gives up a pool and its pages; one that is not there is fine."""
        entry = self._sequences.find_pool(tenant, pool_id)
        if entry is not None:
            self._pool.release(self._sequences.pages(entry))
            self._sequences.remove_pool(entry)

    def allocate_pages(
        self,
        subject: str,
        named: NDArray[np.intp],
        entries: NDArray[np.intp],
        starts: NDArray[np.int64],
        ends: NDArray[np.int64],
    ) -> list[PageCopy]:
        """Sees to it that the pages of some positions are there, and their sequences' alone.

        Args:
            subject: how a message begins.
            named: the sequences that are not to be evicted for that.
            entries: those that are to be written, `[N]`.
            starts: first position of each that is to be written, `[N]`.
            ends: position behind the last.

        Returns:
            The copies to make, in order, before any key is written.

        Raises:
            ResourceExhaustedError: OUT_OF_PAGES; nothing has changed.
        """
        sequences, now = self._sequences, self._clock()
        more = np.maximum(self._blocks(ends) - sequences.held[entries], 0)
        shared = self._shared_writes(entries, starts, ends)
        writes = int(more.sum()) + len(shared)
        if writes > self._pool.free:
            readers = self._pool.holders.copy()
            np.subtract.at(readers, sequences.tables.get(*shared.T), 1)
            self._evict(self._find_room(subject, named, readers, writes))
        for entry, count in zip(entries[more > 0].tolist(), more[more > 0].tolist(), strict=True):
            sequences.set_pages(entry, int(sequences.held[entry]), self._pool.allocate(count))
        sequences.last_calls[named] = now  # so that nothing takes the pages before they are written
        return self._unshare(shared)

    def moves_readers(self, entries: NDArray[np.intp], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> bool:
        """Whether writing those positions moves one of the sequences off a page while a prefill reads it.

        Whoever else holds such a page may write it then, or give it away.
        """
        read = self._sequences.reading_sequence[entries] > 0
        return bool(read.any()) and len(self._shared_writes(entries[read], starts[read], ends[read])) > 0

    def trim(self, entry: int) -> None:
        """Gives back the pages that no layer of a sequence reaches any more."""
        self._resize(entry, int(self._blocks(self._sequences.lengths[:, entry]).max()))

    def begin_reading(self, layer: int, entry: int) -> None:
        """A prefill reads a layer from now on: nothing is appended to it, and its sequence stays."""
        self._count_readers(layer, entry, 1)

    def end_reading(self, layer: int, entry: int) -> None:
        """It is done, as if it had been called just now."""
        self._count_readers(layer, entry, -1)
        self._sequences.last_calls[entry] = self._clock()

    @property
    def sequence_columns(self) -> SequenceColumns:
        """What the core shares, as of now; arrays are replaced by longer ones as they grow."""
        sequences, pool = self._sequences, self._pool
        return SequenceColumns(
            sequences.index,
            sequences.lengths,
            sequences.revisions,
            sequences.reading,
            sequences.held,
            sequences.forked,
            sequences.last_calls,
            sequences.tables.first_rows,
            sequences.reading_sequence,
            sequences.tables.cells,
            pool.holders,
            pool.free_pages,
            sequences.owners,
            sequences.num_rows,
            sequences.max_blocks,
            sequences.filled,
            pool.numbers,
        )

    @property
    def table_cells(self) -> NDArray[np.int32]:
        """int32 `[rows * TABLE_ROW]`: all page tables, as of now; replaced by a longer array as they grow."""
        return self._sequences.tables.cells

    def take_table_changes(self) -> NDArray[np.intp]:
        """Which of the cells were written since this was last asked."""
        return self._sequences.tables.take_changes()

    @property
    def first_rows(self) -> NDArray[np.int32]:
        """int32 `[S]`: row of the cells in which the page table of each entry begins, as of now."""
        return self._sequences.tables.first_rows

    def take_pages_to_clear(self) -> NDArray[np.int32]:
        """Pages that were given to pools since this was last asked, which are to hold zeros."""
        pages, self._to_clear = self._to_clear, []
        return np.concatenate([*pages, np.zeros(0, np.int32)])

    def take_evicted(self) -> dict[str, list[int]]:
        """Ids of the sequences, by tenant, that were given up for being past their lease since this was last asked."""
        evicted, self._evicted = self._evicted, {}
        return evicted

    def usage(self) -> CacheUsage:
        """Pages and sequences, now."""
        pool = self._pool
        return CacheUsage(
            pages_total=pool.total,
            pages_used=pool.total - pool.free,
            pages_shared=pool.shared,
            capacity_tokens=pool.total * self.spec.block_size,
            page_bytes=self.spec.bytes_per_page,
            sequences=len(self._sequences),
            evictions=self._evictions,
            pools=self._sequences.index.num_pools,
        )

    def overview(self, max_cells: int) -> CacheOverview:
        """What every page and sequence is like, the pages in `max_cells` cells at most.

        Takes time by the pages, and by those of the sequences past their lease: milliseconds.
        """
        return overview(self._pool, self._sequences, self.spec, max_cells, self._clock())

    def _count_readers(self, layer: int, entry: int, more: int) -> None:
        """Of a row its pool is read, layer by layer, and whatever would change the cells of either waits."""
        sequences, owner = self._sequences, int(self._sequences.owners[entry])
        sequences.reading[layer, owner] += more
        sequences.reading_sequence[list({entry, owner})] += more

    def _blocks(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        return -(-lengths // self.spec.block_size)

    def _entry(self, tenant: str, sequence_id: int) -> int:
        entry = self._sequences.find(tenant, sequence_id)
        if entry is None:
            raise _unknown(sequence_id)
        return entry

    def _check_absent(self, tenant: str, sequence_id: int) -> None:
        if self._sequences.find(tenant, sequence_id) is not None:
            raise _exists(sequence_id)

    def _check_count(self, tenant: str, more: int, now: float) -> None:
        most = self._max_tenant_sequences
        if self._sequences.counts[tenant] + more > most:
            self._give_up_empty(now)
        if (count := self._sequences.counts[tenant]) + more > most:
            raise ResourceExhaustedError(
                f"sequences: a tenant may have {most} open, it has {count} and asks for {more} more",
                Reason.OVERLOADED,
                count=count,
                max_tenant_sequences=most,
            )

    def _shared_writes(
        self, entries: NDArray[np.intp], starts: NDArray[np.int64], ends: NDArray[np.int64]
    ) -> NDArray[np.intp]:
        """Entry and block `[M, 2]` of the pages that writing `starts` to `ends` touches and that others hold too."""
        first = starts // self.spec.block_size
        counts = np.maximum(np.minimum(self._blocks(ends), self._sequences.held[entries]) - first, 0)
        blocks = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts - first, counts)
        writers = np.repeat(entries, counts)
        shared = self._pool.holders[self._sequences.tables.get(writers, blocks)] > 1
        return np.stack((writers[shared], blocks[shared]), axis=1)

    def _find_room(self, subject: str, named: NDArray[np.intp], readers: NDArray[np.int32], writes: int) -> list[int]:
        """Sequences to evict for a request: each writer of a page needs one to itself, all its readers one together.

        Args:
            subject: how the message begins.
            named: entries that the request names; they stay.
            readers: int32 `[num_pages]`, holders of each page that do not write it; counted down.
            writes: pages that are written, once for every writer, new ones included.
        """
        pool = self._pool
        shortage = int(np.count_nonzero(readers)) + writes - pool.total
        if shortage <= 0:
            return []
        named = np.concatenate((named, self._named))
        victims, freed = choose_victims(self._sequences, readers, shortage, named, self._kept_since, self._clock())
        if freed < shortage:
            raise ResourceExhaustedError(
                f"{subject} is out of pages: {pool.free + shortage} needed, {pool.free} free, {freed} evictable, "
                f"{pool.total} in all",
                Reason.OUT_OF_PAGES,
                needed=pool.free + shortage,
                free=pool.free,
                evictable=freed,
                total=pool.total,
            )
        return victims

    def _evict(self, victims: list[int]) -> None:
        for entry in victims:
            self._give_up(entry)
        self._evictions += len(victims)

    def _give_up(self, entry: int) -> None:
        """Removes a sequence that nobody has closed, whose tenant is to hear of it."""
        sequences = self._sequences
        tenant = sequences.index.tenant(int(sequences.tenants[entry]))
        self._evicted.setdefault(tenant, []).append(int(sequences.ids[entry]))
        self._remove(entry)

    def _add(self, tenant: str, sequence_id: int, lease: float, now: float) -> int:
        """Opens an empty sequence, and answers its entry."""
        if len(self._sequences) >= MANY_SEQUENCES:
            self._give_up_empty(now)
        return self._sequences.add(tenant, sequence_id, lease, now)

    def _give_up_empty(self, now: float) -> None:
        """Gives up those of the next few entries that are empty and past their lease.

        Nothing else would, since eviction is after pages, and they hold none. More than one entry is looked at for
        each that is opened, so they are ever fewer; and only a few are, so that opening takes the same time however
        many.
        """
        sequences = self._sequences
        entries = (self._next_looked_at + np.arange(_LOOKED_AT)) % len(sequences.held)
        self._next_looked_at = int(entries[-1]) + 1
        empty = are_idle(sequences, entries, self._kept_since, now) & (sequences.held[entries] == 0)
        for entry in np.setdiff1d(entries[empty], self._named).tolist():
            if sequences.is_open(entry):
                self._give_up(entry)

    def _remove(self, entry: int) -> None:
        self._pool.release(self._sequences.pages(entry))
        self._sequences.remove(entry)

    def _resize(self, entry: int, held: int) -> None:
        """Gives pages back from block `held` on, or takes fresh ones up to it."""
        pages = self._sequences.pages(entry)
        self._pool.release(pages[held:])
        self._sequences.set_pages(entry, min(held, len(pages)), self._pool.allocate(max(held - len(pages), 0)))

    def _unshare(self, writes: NDArray[np.intp]) -> list[PageCopy]:
        """Gives each entry and block `[M, 2]` a page of its own, where others still hold the one it has."""
        tables, pool = self._sequences.tables, self._pool
        copies: list[PageCopy] = []
        for write in writes:
            entry, block = write[:1], write[1:]
            shared = tables.get(entry, block)
            if pool.holders[shared] > 1:
                fresh = pool.allocate(1)
                copies.append(PageCopy(int(shared[0]), int(fresh[0])))
                pool.release(shared)
                tables.set(entry, block, fresh)
        return copies


def _unknown(sequence_id: int) -> NotFoundError:
    words = f"sequence {sequence_id}: unknown (never opened, closed, or evicted)"
    return NotFoundError(words, Reason.UNKNOWN_SEQUENCE, sequence_id=sequence_id)


def _too_long_a_lease(sequence_id: int, seconds: float, most: float) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"sequence {sequence_id}: lease_seconds must be at most {most:g}, got {seconds:g}",
        Reason.INVALID_SPANS,
        sequence_id=sequence_id,
        lease_seconds=seconds,
        max_lease_seconds=most,
    )


def _exists(sequence_id: int) -> AlreadyExistsError:
    words = f"sequence {sequence_id}: open already"
    return AlreadyExistsError(words, Reason.SEQUENCE_EXISTS, sequence_id=sequence_id)
