"""The cache's verbs: how long each layer of a sequence is, which pages hold it, and what a request may do to that.

The cache knows page ids, not pages: it says where keys go and which pages must be copied first; its caller moves the
data. It belongs to one thread; only `usage` and `overview` may be called from another.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from blockdex.cache.append_plan import AppendPlan
from blockdex.cache.checks import check_appended, check_done, check_not_future, check_not_stale, check_starts
from blockdex.cache.eviction import are_idle, choose_victims
from blockdex.cache.overview import overview
from blockdex.cache.page_pool import PageCopy, PagePool
from blockdex.cache.sequence import Sequence, Sequences
from blockdex.contract.errors import (
    AlreadyExistsError,
    NotFoundError,
    Reason,
    ResourceExhaustedError,
)
from blockdex.contract.limits import check_epoch
from blockdex.contract.messages import CacheOverview, CacheUsage, Spans
from blockdex_kernels import IndexSpec


class Books(NamedTuple):
    """What is known of S slots in L layers: see `Sequences`, and `PageTables` for the first rows."""

    lengths: NDArray[np.int64]
    revisions: NDArray[np.uint64]
    held: NDArray[np.int64]
    forked: NDArray[np.int64]
    last_calls: NDArray[np.float64]
    first_rows: NDArray[np.int32]
    generations: NDArray[np.uint32]


MANY_SEQUENCES = 4096
"""From so many on, those that are empty and past their lease are given up as others are opened."""

_LOOKED_AT = 4
_NO_WRITES = np.zeros((0, 2), np.intp)


class Cache:
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.spec = spec
        self.epoch = secrets.randbelow(2**64 - 1) + 1
        self._default_lease_seconds = default_lease_seconds
        self._clock = clock
        self._pool = PagePool(num_pages)
        self._sequences = Sequences(spec.num_layers)
        self._evictions = 0
        self._kept_since = float("inf")
        self._next_looked_at = 0

    def begin_batch(self) -> None:
        """From now on until the next batch begins, no sequence is evicted that a call has named meanwhile."""
        self._kept_since = self._clock()

    def check_epoch(self, epoch: int) -> None:
        """Refuses a request of another epoch; 0 stands for any.

        Raises:
            FailedPreconditionError: EPOCH_MISMATCH.
        """
        check_epoch(epoch, self.epoch)

    def open_sequences(self, tenant: str, leases: Mapping[int, float]) -> None:
        """Opens empty sequences, all or none, each with its lease in seconds; 0 stands for the default.

        One that is open and still as it was opened is only given its lease.

        Raises:
            AlreadyExistsError: SEQUENCE_EXISTS, of the first that has tokens or a revision.
        """
        sequences, now = self._sequences, self._clock()
        for sequence_id in leases:
            slot = sequences.slot(tenant, sequence_id)
            if slot is not None and (sequences.lengths[:, slot].any() or sequences.revisions[:, slot].any()):
                raise _exists(sequence_id)
        for sequence_id, seconds in leases.items():
            lease, slot = seconds or self._default_lease_seconds, sequences.slot(tenant, sequence_id)
            if slot is None:
                self._add(tenant, sequence_id, lease, now)
            else:
                sequences.leases[slot], sequences.last_calls[slot] = lease, now

    def get_sequence(self, tenant: str, sequence_id: int) -> Sequence:
        """Lengths and revisions.

        Raises:
            NotFoundError: UNKNOWN_SEQUENCE.
        """
        slot = self._slot(tenant, sequence_id)
        self._sequences.last_calls[slot] = self._clock()
        return self._sequences.state(slot)

    def fork_sequence(self, tenant: str, parent_id: int, child_id: int, length: int) -> tuple[Sequence, list[PageCopy]]:
        """Opens `child_id` with the first `length` tokens of each of its parent's layers, or as many as there are.

        Pages are shared, but for those inside which a layer of the child ends: they are copied.

        Returns:
            The child, and the copies to make, in order, before any key is written.

        Raises:
            NotFoundError: UNKNOWN_SEQUENCE, the parent.
            AlreadyExistsError: SEQUENCE_EXISTS, the child.
            ResourceExhaustedError: OUT_OF_PAGES.
        """
        sequences, pool, block_size = self._sequences, self._pool, self.spec.block_size
        parent = self._slot(tenant, parent_id)
        self._check_absent(tenant, child_id)
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
        slot = self._slot(tenant, sequence_id)
        lengths = np.minimum(self._sequences.lengths[:, slot], length)
        self._sequences.lengths[:, slot] = lengths
        self._resize(slot, int(self._blocks(lengths).max()))
        self._sequences.last_calls[slot] = self._clock()
        return self._sequences.state(slot)

    def close_sequences(self, tenant: str, sequence_ids: Iterable[int]) -> None:
        """Gives up sequences; one that is not open is fine."""
        for sequence_id in sequence_ids:
            slot = self._sequences.slot(tenant, sequence_id)
            if slot is not None:
                self._remove(slot)

    def plan_append(self, tenant: str, layer: int, spans: Spans, *, rollback: bool = False) -> AppendPlan:
        """Checks an append whole, down to the pages it takes; changes nothing.

        Sequences are checked before revisions, revisions before positions, positions before pages.

        Returns:
            What `apply_append` will do; good until the cache changes.

        Raises:
            NotFoundError: UNKNOWN_SEQUENCE.
            AbortedError: STALE_REVISION.
            OutOfRangeError: APPEND_BEYOND_LENGTH, or, without `rollback`, APPEND_OVERLAPS.
            ResourceExhaustedError: OUT_OF_PAGES.
        """
        slots = self._slots(tenant, spans)
        lengths, revisions = self._layer(layer, slots)
        applies, all_apply, after = np.ones(len(slots), np.bool_), True, revisions
        if spans.revisions.any():
            check_not_stale("append", layer, spans, revisions)
            applies = (spans.revisions != revisions) | (spans.revisions == 0)
            all_apply, after = bool(applies.all()), np.maximum(spans.revisions, revisions)
            check_done(layer, spans, ~applies, lengths)
        ends = spans.starts + spans.lengths
        check_starts(layer, spans, applies, lengths, rollback=rollback)

        ends = np.where(applies, ends, lengths)
        held = self._held_after(layer, slots, lengths, ends)
        shared_writes = self._shared_writes(slots[applies], spans.starts[applies], ends[applies])
        writes = int(np.maximum(held - self._sequences.held[slots], 0).sum()) + len(shared_writes)
        victims: list[int] = []
        if writes > self._pool.free:
            subject = f"sequence {spans.sequence_ids[0]}" if len(slots) == 1 else f"{len(slots)} sequences"
            readers = self._readers_after(slots, held, shared_writes)
            victims = self._find_room(f"{subject}, layer {layer}: append", slots, readers, writes)
        return AppendPlan(
            layer=layer,
            slots=slots,
            applies=applies,
            lengths=ends,
            revisions=after,
            held=held,
            shared_writes=shared_writes,
            victims=victims,
            all_apply=all_apply,
        )

    def apply_append(self, plan: AppendPlan) -> list[PageCopy]:
        """Does what was planned, which cannot fail: the keys of the rows that apply may be written then.

        Returns:
            The copies to make, in order, before any key is written.
        """
        sequences, slots = self._sequences, plan.slots
        self._evict(plan.victims)
        more = plan.held - sequences.held[slots]
        changed = np.flatnonzero(more)
        for row in changed[np.argsort(more[changed])]:  # those that give pages back go first
            self._resize(int(slots[row]), int(plan.held[row]))
        sequences.lengths[plan.layer][slots] = plan.lengths
        sequences.revisions[plan.layer][slots] = plan.revisions
        sequences.last_calls[slots] = self._clock()
        return self._unshare(plan.shared_writes)

    def would_unshare(self, tenant: str, sequence_id: int, start: int, end: int) -> bool:
        """Whether writing positions `start` to `end` of any layer moves a sequence off pages that others hold too."""
        slot = self._sequences.slot(tenant, sequence_id)
        if slot is None:
            return False
        block_size, held = self.spec.block_size, int(self._sequences.held[slot])
        blocks = np.arange(start // block_size, min(-(-end // block_size), held))
        return bool((self._pool.holders[self._sequences.tables.get(slot, blocks)] > 1).any())

    def slot(self, tenant: str, sequence_id: int) -> int | None:
        """The slot of a sequence, None where it is not open: its place in the `books`, until it is closed."""
        return self._sequences.slot(tenant, sequence_id)

    @property
    def books(self) -> Books:
        """The columns themselves, for who checks and enters appends that need no page; replaced by longer ones."""
        sequences = self._sequences
        return Books(
            sequences.lengths,
            sequences.revisions,
            sequences.held,
            sequences.forked,
            sequences.last_calls,
            sequences.tables.first_rows,
            sequences.generations,
        )

    def check_selection(self, tenant: str, layer: int, spans: Spans, plan: AppendPlan | None = None) -> None:
        """Checks that the keys which a selection reads are there.

        Args:
            tenant: whose sequences.
            layer: where it reads.
            spans: positions of the queries.
            plan: the append that goes before it in the same request, for the same layer and spans, not yet applied.

        Raises:
            NotFoundError: UNKNOWN_SEQUENCE.
            AbortedError: STALE_REVISION of any row before FUTURE_REVISION of any.
            FailedPreconditionError: KEYS_NOT_APPENDED.
        """
        slots = self._slots(tenant, spans) if plan is None else plan.slots
        lengths, revisions = self._layer(layer, slots) if plan is None else (plan.lengths, plan.revisions)
        if spans.revisions.any():
            check_not_stale("selection", layer, spans, revisions)
            check_not_future("selection", layer, spans, revisions)
        check_appended(layer, spans, lengths)
        if plan is None:
            self._sequences.last_calls[slots] = self._clock()

    @property
    def table_cells(self) -> NDArray[np.int32]:
        """int32 `[rows * TABLE_ROW]`: all page tables, as of now; replaced by a longer array as they grow."""
        return self._sequences.tables.cells

    def take_table_changes(self) -> NDArray[np.intp]:
        """Which of the cells were written since this was last asked."""
        return self._sequences.tables.take_changes()

    def table_rows(self, tenant: str, spans: Spans) -> NDArray[np.int32]:
        """Row of the cells in which the page table of each row's sequence begins, as of now: int32 `[N]`.

        Raises:
            NotFoundError: UNKNOWN_SEQUENCE.
        """
        return self._sequences.tables.first_rows[self._slots(tenant, spans)]

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
        )

    def overview(self, max_cells: int) -> CacheOverview:
        """What every page and sequence is like, the pages in `max_cells` cells at most.

        Takes time by the pages, and by those of the sequences past their lease: milliseconds.
        """
        return overview(self._pool, self._sequences, self.spec, max_cells, self._clock())

    def _blocks(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        return -(-lengths // self.spec.block_size)

    def _slot(self, tenant: str, sequence_id: int) -> int:
        slot = self._sequences.slot(tenant, sequence_id)
        if slot is None:
            raise _unknown(sequence_id)
        return slot

    def _slots(self, tenant: str, spans: Spans) -> NDArray[np.intp]:
        try:
            return self._sequences.slots(tenant, spans.sequence_ids)
        except KeyError as unknown:
            raise _unknown(unknown.args[0]) from None

    def _layer(self, layer: int, slots: NDArray[np.intp]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        return self._sequences.lengths[layer][slots], self._sequences.revisions[layer][slots]

    def _check_absent(self, tenant: str, sequence_id: int) -> None:
        if self._sequences.slot(tenant, sequence_id) is not None:
            raise _exists(sequence_id)

    def _held_after(
        self, layer: int, slots: NDArray[np.intp], lengths: NDArray[np.int64], ends: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Pages of each sequence once the layer's lengths have become `ends`: what its longest layer then reaches."""
        held = np.maximum(self._sequences.held[slots], self._blocks(ends))
        cut = np.flatnonzero(ends < lengths)
        if len(cut):
            layers = self._sequences.lengths[:, slots[cut]]
            layers[layer] = ends[cut]
            held[cut] = self._blocks(layers.max(axis=0))
        return held

    def _shared_writes(
        self, slots: NDArray[np.intp], starts: NDArray[np.int64], ends: NDArray[np.int64]
    ) -> NDArray[np.intp]:
        """Slot and block `[M, 2]` of the pages that writing `starts` to `ends` touches and that others hold too."""
        first = starts // self.spec.block_size
        if not (first < self._sequences.forked[slots]).any():
            return _NO_WRITES
        counts = np.minimum(self._blocks(ends), self._sequences.held[slots]) - first
        blocks = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts - first, counts)
        writers = np.repeat(slots, counts)
        shared = self._pool.holders[self._sequences.tables.get(writers, blocks)] > 1
        return np.stack((writers[shared], blocks[shared]), axis=1)

    def _readers_after(
        self, slots: NDArray[np.intp], held: NDArray[np.int64], shared_writes: NDArray[np.intp]
    ) -> NDArray[np.int32]:
        """Holders of each page, less those that an append gives back and those that it writes: int32 `[num_pages]`."""
        readers = self._pool.holders.copy()
        for slot, kept in zip(slots.tolist(), held.tolist(), strict=True):
            readers[self._sequences.pages(slot)[kept:]] -= 1
        writers, blocks = shared_writes.T
        np.subtract.at(readers, self._sequences.tables.get(writers, blocks), 1)
        return readers

    def _find_room(self, subject: str, named: NDArray[np.intp], readers: NDArray[np.int32], writes: int) -> list[int]:
        """Sequences to evict for a request: each writer of a page needs one to itself, all its readers one together.

        Args:
            subject: how the message begins.
            named: slots that the request names; they stay.
            readers: int32 `[num_pages]`, holders of each page that do not write it; counted down.
            writes: pages that are written, once for every writer, new ones included.
        """
        pool = self._pool
        shortage = int(np.count_nonzero(readers)) + writes - pool.total
        if shortage <= 0:
            return []
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
        for slot in victims:
            self._remove(slot)
        self._evictions += len(victims)

    def _add(self, tenant: str, sequence_id: int, lease: float, now: float) -> int:
        """Opens an empty sequence, and answers its slot."""
        if len(self._sequences) >= MANY_SEQUENCES:
            self._give_up_empty(now)
        return self._sequences.add(tenant, sequence_id, lease, now)

    def _give_up_empty(self, now: float) -> None:
        """Gives up those of the next few slots that are empty and past their lease.

        Nothing else would, since eviction is after pages, and they hold none. More than one slot is looked at for each
        that is opened, so they are ever fewer; and only a few are, so that opening takes the same time however many.
        """
        sequences = self._sequences
        slots = (self._next_looked_at + np.arange(_LOOKED_AT)) % len(sequences.held)
        self._next_looked_at = int(slots[-1]) + 1
        empty = are_idle(sequences, slots, self._kept_since, now) & (sequences.held[slots] == 0)
        for slot in slots[empty].tolist():
            if sequences.is_open(slot):
                self._remove(slot)

    def _remove(self, slot: int) -> None:
        self._pool.release(self._sequences.pages(slot))
        self._sequences.remove(slot)

    def _resize(self, slot: int, held: int) -> None:
        """Gives pages back from block `held` on, or takes fresh ones up to it."""
        pages = self._sequences.pages(slot)
        self._pool.release(pages[held:])
        self._sequences.set_pages(slot, min(held, len(pages)), self._pool.allocate(max(held - len(pages), 0)))

    def _unshare(self, writes: NDArray[np.intp]) -> list[PageCopy]:
        """Gives each slot and block `[M, 2]` a page of its own, where others still hold the one it has."""
        tables, pool = self._sequences.tables, self._pool
        copies: list[PageCopy] = []
        for write in writes:
            slot, block = write[:1], write[1:]
            shared = tables.get(slot, block)
            if pool.holders[shared] > 1:
                fresh = pool.allocate(1)
                copies.append(PageCopy(int(shared[0]), int(fresh[0])))
                pool.release(shared)
                tables.set(slot, block, fresh)
        return copies


def _unknown(sequence_id: int) -> NotFoundError:
    words = f"sequence {sequence_id}: unknown (never opened, closed, or evicted)"
    return NotFoundError(words, Reason.UNKNOWN_SEQUENCE, sequence_id=sequence_id)


def _exists(sequence_id: int) -> AlreadyExistsError:
    words = f"sequence {sequence_id}: open already"
    return AlreadyExistsError(words, Reason.SEQUENCE_EXISTS, sequence_id=sequence_id)
