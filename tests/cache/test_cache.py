"""The cache's rules, one by one."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from blockdex.cache import IndexCache, PageCopy
from blockdex.cache.index_cache import MANY_SEQUENCES
from blockdex.contract.errors import AbortedError, BlockdexError, OutOfRangeError, Reason, ResourceExhaustedError
from blockdex_kernels import IndexSpec
from support.admission import append, select
from support.cache_state import Clock, check_integrity, held_pages, page_table, pages, snapshot, spans

SPEC = IndexSpec(num_layers=3, head_dim=1, block_size=4, topk=2, max_sequence_tokens=4096)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cache(clock: Clock) -> IndexCache:
    """Ten pages, leases of ten seconds, an empty sequence 1."""
    cache = IndexCache(SPEC, 10, default_lease_seconds=10, clock=clock)
    cache.open_sequences("red", {1: 0})
    return cache


def lengths(cache: IndexCache, sequence_id: int) -> list[int]:
    return list(map(int, cache.get_sequence("red", sequence_id).lengths))


def revisions(cache: IndexCache, sequence_id: int) -> list[int]:
    return list(map(int, cache.get_sequence("red", sequence_id).revisions))


class TestSequences:
    def test_starts_empty(self, cache: IndexCache) -> None:
        state = cache.get_sequence("red", 1)
        assert (state.lengths.dtype.name, state.revisions.dtype.name) == ("int64", "uint64")
        assert (state.lengths.tolist(), state.revisions.tolist()) == ([0, 0, 0], [0, 0, 0])
        assert pages(cache, "red", 1) == []

    def test_answers_are_copies(self, cache: IndexCache) -> None:
        state = cache.get_sequence("red", 1)
        append(cache, "red", 0, (1, 0, 3, 7))
        assert (state.lengths.tolist(), state.revisions.tolist()) == ([0, 0, 0], [0, 0, 0])
        state.lengths[:] = 99
        assert lengths(cache, 1) == [3, 0, 0]

    def test_ids_are_a_tenants_own(self, cache: IndexCache) -> None:
        cache.open_sequences("blue", {1: 0})
        append(cache, "blue", 0, (1, 0, 5))
        assert lengths(cache, 1) == [0, 0, 0]
        cache.close_sequences("red", [1])
        assert cache.get_sequence("blue", 1).lengths.tolist() == [5, 0, 0]

    def test_ids_have_64_bits(self, cache: IndexCache) -> None:
        cache.open_sequences("red", {2**64 - 1: 0})
        append(cache, "red", 2, (2**64 - 1, 0, 2, 2**64 - 1))
        state = cache.get_sequence("red", 2**64 - 1)
        assert (state.lengths.tolist(), state.revisions.tolist()) == ([0, 0, 2], [0, 0, 2**64 - 1])

    def test_close_frees_and_forgets(self, cache: IndexCache) -> None:
        append(cache, "red", 0, (1, 0, 40, 3))
        cache.close_sequences("red", [1])
        assert cache.usage().pages_used == 0
        before = snapshot(cache)
        cache.close_sequences("red", [1])
        cache.close_sequences("green", [1])
        assert snapshot(cache) == before
        cache.open_sequences("red", {1: 0})
        assert (lengths(cache, 1), revisions(cache, 1)) == ([0, 0, 0], [0, 0, 0])

    def test_many_and_long_ones(self) -> None:
        cache = IndexCache(SPEC, 1200)
        for sequence_id in range(300):
            cache.open_sequences("red", {sequence_id: 0})
            append(cache, "red", 1, (sequence_id, 0, sequence_id % 9 + 1, sequence_id + 1))
        append(cache, "red", 2, (5, 0, 1000))
        check_integrity(cache)
        for sequence_id in range(300):
            tokens = 1000 if sequence_id == 5 else 0
            assert lengths(cache, sequence_id) == [0, sequence_id % 9 + 1, tokens]
            assert revisions(cache, sequence_id) == [0, sequence_id + 1, 0]
        assert page_table(cache, "red", spans((5, 999, 1), (6, 0, 7))).shape == (2, 250)

    def test_usage(self, cache: IndexCache) -> None:
        append(cache, "red", 0, (1, 0, 9))
        cache.fork_sequence("red", 1, 2, 8)
        usage = cache.usage()
        assert (usage.pages_total, usage.pages_used, usage.pages_shared) == (10, 3, 2)
        assert (usage.capacity_tokens, usage.page_bytes) == (40, SPEC.bytes_per_page)
        assert (usage.sequences, usage.evictions) == (2, 0)


class TestAppend:
    def test_takes_pages_for_the_longest_layer(self, cache: IndexCache) -> None:
        for layer, count, held in ((0, 4, 1), (1, 5, 2), (2, 3, 2)):
            append(cache, "red", layer, (1, 0, count))
            assert cache.usage().pages_used == held
        assert lengths(cache, 1) == [4, 5, 3]

    def test_rolls_back(self, cache: IndexCache) -> None:
        append(cache, "red", 0, (1, 0, 17))
        append(cache, "red", 1, (1, 0, 9))
        append(cache, "red", 0, (1, 2, 3))
        assert lengths(cache, 1) == [5, 9, 0]
        assert cache.usage().pages_used == 3
        append(cache, "red", 1, (1, 0, 1))
        assert cache.usage().pages_used == 2

    def test_many_rows(self, cache: IndexCache) -> None:
        cache.open_sequences("red", {2: 0})
        cache.open_sequences("red", {3: 0})
        assert append(cache, "red", 1, (3, 0, 9), (1, 0, 2), (2, 0, 4)) == []
        assert [lengths(cache, sequence_id)[1] for sequence_id in (1, 2, 3)] == [2, 4, 9]
        assert [len(pages(cache, "red", sequence_id)) for sequence_id in (1, 2, 3)] == [1, 1, 3]

    def test_revisions(self, cache: IndexCache) -> None:
        append(cache, "red", 0, (1, 0, 5, 3))
        append(cache, "red", 0, (1, 5, 1))
        assert (lengths(cache, 1), revisions(cache, 1)) == ([6, 0, 0], [3, 0, 0])
        append(cache, "red", 0, (1, 6, 1, 9))
        assert (lengths(cache, 1), revisions(cache, 1)) == ([7, 0, 0], [9, 0, 0])

    def test_what_is_done_already_is_skipped(self, cache: IndexCache, clock: Clock) -> None:
        cache.open_sequences("red", {2: 0})
        append(cache, "red", 0, (1, 0, 5, 3))
        clock.now = 8.0
        append(cache, "red", 0, (1, 2, 3, 3), (2, 0, 4, 3))
        assert (lengths(cache, 1), revisions(cache, 1)) == ([5, 0, 0], [3, 0, 0])
        assert (lengths(cache, 2), revisions(cache, 2)) == ([4, 0, 0], [3, 0, 0])

    def test_a_layer_is_cut_by_who_says_so_alone(self, cache: IndexCache) -> None:
        append(cache, "red", 0, (1, 0, 5, 3), rollback=False)
        append(cache, "red", 0, (1, 3, 1, 4), rollback=False)
        append(cache, "red", 0, (1, 4, 2), rollback=False)
        with pytest.raises(OutOfRangeError, match="append starts at 5, length is 6; to roll back") as refused:
            append(cache, "red", 0, (1, 5, 9), rollback=False)
        assert (refused.value.reason, lengths(cache, 1)) == (Reason.APPEND_OVERLAPS, [6, 0, 0])
        append(cache, "red", 0, (1, 5, 1), rollback=True)
        assert lengths(cache, 1) == [6, 0, 0]

    def test_another_append_of_the_same_revision_is_stale(self, cache: IndexCache) -> None:
        append(cache, "red", 0, (1, 0, 5, 3))
        for start, length in ((0, 4), (5, 1), (0, 6)):
            with pytest.raises(AbortedError, match=f"append ends at {start + length}, length at its revision 3 is 5"):
                append(cache, "red", 0, (1, start, length, 3))
        append(cache, "red", 0, (1, 4, 1, 3))
        assert lengths(cache, 1) == [5, 0, 0]

    def test_revisions_survive_a_rollback_of_the_length(self, cache: IndexCache) -> None:
        append(cache, "red", 0, (1, 0, 5, 3))
        assert cache.truncate_sequence("red", 1, 2).revisions.tolist() == [3, 0, 0]


class TestForkAndCopyOnWrite:
    def test_shares_full_pages_and_copies_partly_filled_ones(self, cache: IndexCache) -> None:
        append(cache, "red", 0, (1, 0, 14, 5))
        append(cache, "red", 1, (1, 0, 6))
        append(cache, "red", 2, (1, 0, 8))
        parent = pages(cache, "red", 1)
        state, copies = cache.fork_sequence("red", 1, 2, 12)
        child = pages(cache, "red", 2)
        assert state.lengths.tolist() == lengths(cache, 2) == [12, 6, 8]
        assert state.revisions.tolist() == revisions(cache, 2) == [0, 0, 0]
        assert copies == [PageCopy(parent[1], child[1])]
        assert (child[0], child[2]) == (parent[0], parent[2])
        assert pages(cache, "red", 1) == parent

    def test_copies_in_order_for_every_layer_that_ends_inside(self, cache: IndexCache) -> None:
        for layer, count in enumerate((10, 6, 2)):
            append(cache, "red", layer, (1, 0, count))
        _, copies = cache.fork_sequence("red", 1, 2, 99)
        parent, child = pages(cache, "red", 1), pages(cache, "red", 2)
        assert copies == [PageCopy(*pair) for pair in zip(parent, child, strict=True)]
        assert cache.usage().pages_shared == 0

    @pytest.mark.parametrize("length", [0, 4, 8])
    def test_copies_nothing_at_a_block_edge(self, cache: IndexCache, length: int) -> None:
        for layer in range(3):
            append(cache, "red", layer, (1, 0, 9))
        state, copies = cache.fork_sequence("red", 1, 2, length)
        assert state.lengths.tolist() == [length] * 3
        assert copies == []
        assert pages(cache, "red", 2) == pages(cache, "red", 1)[: length // 4]

    def test_outlives_its_parent(self, cache: IndexCache) -> None:
        append(cache, "red", 0, (1, 0, 8))
        cache.fork_sequence("red", 1, 2, 8)
        cache.close_sequences("red", [1])
        assert len(pages(cache, "red", 2)) == cache.usage().pages_used == 2
        assert cache.usage().pages_shared == 0
        cache.close_sequences("red", [2])
        assert cache.usage().pages_used == 0

    def test_inherits_the_lease(self, cache: IndexCache, clock: Clock) -> None:
        cache.open_sequences("red", {2: 25})
        append(cache, "red", 0, (2, 0, 4))
        clock.now = 5.0
        cache.fork_sequence("red", 2, 3, 4)
        cache.close_sequences("red", [2])
        clock.now = 29.0
        with pytest.raises(ResourceExhaustedError, match="0 evictable"):
            append(cache, "red", 0, (1, 0, 40))
        clock.now = 30.0
        append(cache, "red", 0, (1, 0, 40))

    def test_writing_copies_shared_pages_first(self, cache: IndexCache) -> None:
        append(cache, "red", 0, (1, 0, 16))
        cache.fork_sequence("red", 1, 2, 16)
        parent = pages(cache, "red", 1)
        copies = append(cache, "red", 1, (2, 0, 7))
        child = pages(cache, "red", 2)
        assert copies == [PageCopy(parent[0], child[0]), PageCopy(parent[1], child[1])]
        assert child[2:] == parent[2:]
        assert pages(cache, "red", 1) == parent
        assert append(cache, "red", 1, (2, 0, 7)) == []
        assert append(cache, "red", 0, (1, 3, 1)) == []

    def test_writes_to_all_of_a_rolled_back_range(self, cache: IndexCache) -> None:
        append(cache, "red", 0, (1, 0, 16))
        cache.fork_sequence("red", 1, 2, 16)
        parent = pages(cache, "red", 1)
        copies = append(cache, "red", 0, (2, 5, 15))
        child = pages(cache, "red", 2)
        assert copies == [PageCopy(parent[block], child[block]) for block in (1, 2, 3)]
        assert child[0] == parent[0]
        assert len(child) == 5
        check_integrity(cache)

    def test_the_last_of_two_writers_writes_in_place(self, cache: IndexCache) -> None:
        append(cache, "red", 0, (1, 0, 4))
        cache.fork_sequence("red", 1, 2, 4)
        (shared,) = pages(cache, "red", 1)
        (copy,) = append(cache, "red", 1, (1, 0, 2), (2, 0, 2))
        assert copy.source == shared
        assert sorted(pages(cache, "red", 1) + pages(cache, "red", 2)) == sorted(copy)

    def test_a_skipped_row_copies_nothing(self, cache: IndexCache) -> None:
        append(cache, "red", 0, (1, 0, 4))
        append(cache, "red", 1, (1, 0, 4, 2))
        cache.fork_sequence("red", 1, 2, 4)
        assert append(cache, "red", 1, (1, 0, 4, 2)) == []
        assert cache.usage().pages_shared == 1

    def test_pages_given_back_are_no_longer_shared(self, cache: IndexCache) -> None:
        append(cache, "red", 0, (1, 0, 8))
        cache.fork_sequence("red", 1, 2, 8)
        cache.truncate_sequence("red", 2, 4)
        assert cache.usage().pages_shared == 1
        assert append(cache, "red", 0, (1, 4, 4)) == []


class TestTruncate:
    def test_cuts_and_frees(self, cache: IndexCache) -> None:
        append(cache, "red", 0, (1, 0, 14, 2))
        append(cache, "red", 1, (1, 0, 3))
        state = cache.truncate_sequence("red", 1, 7)
        assert (state.lengths.tolist(), state.revisions.tolist()) == ([7, 3, 0], [2, 0, 0])
        assert cache.usage().pages_used == 2

    def test_never_extends(self, cache: IndexCache) -> None:
        append(cache, "red", 0, (1, 0, 3))
        assert cache.truncate_sequence("red", 1, 99).lengths.tolist() == [3, 0, 0]

    def test_to_nothing(self, cache: IndexCache) -> None:
        append(cache, "red", 0, (1, 0, 14))
        assert cache.truncate_sequence("red", 1, 0).lengths.tolist() == [0, 0, 0]
        assert pages(cache, "red", 1) == []


class TestSelection:
    def test_needs_the_keys_and_the_revision(self, cache: IndexCache) -> None:
        append(cache, "red", 0, (1, 0, 5, 3))
        select(cache, "red", 0, (1, 0, 5))
        select(cache, "red", 0, (1, 4, 1, 3))

    def test_sees_the_append_of_its_own_request(self, cache: IndexCache) -> None:
        append(cache, "red", 0, (1, 0, 5, 3))
        append(cache, "red", 0, (1, 5, 6, 4), select=True)
        append(cache, "red", 0, (1, 5, 6, 4), select=True)
        assert lengths(cache, 1) == [11, 0, 0]


class TestPageTable:
    def test_is_as_wide_as_the_longest_span(self, cache: IndexCache) -> None:
        cache.open_sequences("red", {2: 0})
        append(cache, "red", 0, (1, 0, 17), (2, 0, 3))
        table = page_table(cache, "red", spans((2, 0, 1), (1, 0, 9)))
        assert table.dtype == np.int32
        assert table.tolist() == [[*pages(cache, "red", 2), 0, 0], pages(cache, "red", 1)[:3]]

    def test_is_a_copy(self, cache: IndexCache) -> None:
        append(cache, "red", 0, (1, 0, 8))
        table = page_table(cache, "red", spans((1, 0, 8)))
        held = pages(cache, "red", 1)
        cache.close_sequences("red", [1])
        assert table.tolist() == [held]


class TestEviction:
    def fill(self, cache: IndexCache, clock: Clock) -> None:
        """Sequences 2, 3, 4 of three pages each, last called at 2, 3 and 4; one page is free."""
        for sequence_id in (2, 3, 4):
            clock.now = float(sequence_id)
            cache.open_sequences("red", {sequence_id: 0})
            append(cache, "red", 0, (sequence_id, 0, 12))

    def test_oldest_first_and_no_more_than_needed(self, cache: IndexCache, clock: Clock) -> None:
        self.fill(cache, clock)
        clock.now = 100.0
        append(cache, "red", 0, (1, 0, 17))
        assert set(held_pages(cache)) == {("red", 1), ("red", 4)}
        assert cache.usage().evictions == 2
        assert [sorted(ids) for ids in cache.take_evicted().values()] == [[2, 3]]
        cache.close_sequences("red", [1, 4])
        assert cache.take_evicted() == {}, "those were told already, and who closes knows"
        check_integrity(cache)

    def test_what_a_batch_has_named_stays_until_the_next_one(self, cache: IndexCache, clock: Clock) -> None:
        self.fill(cache, clock)
        clock.now = 100.0
        cache.begin_batch()
        cache.get_sequence("red", 2)
        clock.now = 200.0
        append(cache, "red", 0, (1, 0, 17))
        assert set(held_pages(cache)) == {("red", 1), ("red", 2)}
        with pytest.raises(ResourceExhaustedError, match="0 evictable"):
            append(cache, "red", 0, (1, 17, 12))
        cache.begin_batch()
        append(cache, "red", 0, (1, 17, 12))
        assert set(held_pages(cache)) == {("red", 1)}
        check_integrity(cache)

    def test_empty_ones_go_after_their_lease_where_many_are_open(self, cache: IndexCache, clock: Clock) -> None:
        """Those with keys stay, and so does who is called; opened one a second, no more are there than a lease has."""
        cache.open_sequences("blue", {7: 0})
        append(cache, "red", 0, (1, 0, 1))
        most = MANY_SEQUENCES + MANY_SEQUENCES // 2
        for sequence_id in range(10, 10 + 3 * MANY_SEQUENCES):
            clock.now += 1.0
            if sequence_id % 9 == 0:
                cache.get_sequence("blue", 7)
            cache.open_sequences("red", {sequence_id: 0})
            if sequence_id == 10 + MANY_SEQUENCES // 2:
                assert cache.usage().sequences == MANY_SEQUENCES // 2 + 3, "not so many yet"
            assert cache.usage().sequences <= most
            for young in range(max(sequence_id - 9, 10), sequence_id):
                assert cache._sequences.find("red", young) is not None
        assert cache._sequences.find("red", 1) is not None
        assert cache._sequences.find("blue", 7) is not None
        assert cache.usage().evictions == 0, "it was not for pages"
        assert len(cache.take_evicted()["red"]) + cache.usage().sequences == 2 + 3 * MANY_SEQUENCES
        check_integrity(cache)

    def test_an_empty_parent_stays_for_its_fork(self, cache: IndexCache, clock: Clock) -> None:
        for sequence_id in range(10, 10 + MANY_SEQUENCES):
            cache.open_sequences("red", {sequence_id: 0})
        clock.now = 100.0
        parents = range(10, 10 + MANY_SEQUENCES, 17)
        for parent in parents:
            if cache._sequences.find("red", parent) is not None:
                cache.fork_sequence("red", parent, 100_000 + parent, 5)
                assert cache._sequences.find("red", parent) is not None
        assert cache.usage().sequences < MANY_SEQUENCES
        check_integrity(cache)

    def test_nobody_goes_while_pages_are_free(self, cache: IndexCache, clock: Clock) -> None:
        self.fill(cache, clock)
        clock.now = 100.0
        append(cache, "red", 0, (1, 0, 4))
        assert cache.usage().evictions == 0

    @pytest.mark.parametrize("refresh", ["get", "append", "done already", "select", "truncate", "fork"])
    def test_a_call_refreshes_the_lease(self, cache: IndexCache, clock: Clock, refresh: str) -> None:
        self.fill(cache, clock)
        clock.now = 2.0
        append(cache, "red", 1, (2, 0, 1, 1))
        clock.now = 11.0
        match refresh:
            case "get":
                cache.get_sequence("red", 2)
            case "append":
                append(cache, "red", 1, (2, 0, 1))
            case "done already":
                append(cache, "red", 1, (2, 0, 1, 1))
            case "select":
                select(cache, "red", 0, (2, 0, 1))
            case "truncate":
                cache.truncate_sequence("red", 2, 12)
            case "fork":
                cache.fork_sequence("red", 2, 5, 0)
        clock.now = 14.0
        append(cache, "red", 0, (1, 0, 8))
        assert ("red", 2) in held_pages(cache)
        assert ("red", 3) not in held_pages(cache)

    def test_a_lease_ends_on_time(self, cache: IndexCache, clock: Clock) -> None:
        self.fill(cache, clock)
        clock.now = 11.9
        before = snapshot(cache)
        with pytest.raises(ResourceExhaustedError, match="is out of pages: 2 needed, 1 free, 0 evictable, 10 in all"):
            append(cache, "red", 0, (1, 0, 8))
        assert snapshot(cache) == before
        clock.now = 12.0
        append(cache, "red", 0, (1, 0, 8))
        assert ("red", 2) not in held_pages(cache)

    def test_the_default_lease_is_ten_minutes(self, clock: Clock) -> None:
        cache = IndexCache(SPEC, 1, clock=clock)
        for sequence_id in (1, 2):
            cache.open_sequences("red", {sequence_id: 0})
        append(cache, "red", 0, (1, 0, 1))
        clock.now = 599.9
        with pytest.raises(ResourceExhaustedError):
            append(cache, "red", 0, (2, 0, 1))
        clock.now = 600.0
        append(cache, "red", 0, (2, 0, 1))

    def test_nobody_goes_when_that_does_not_suffice(self, cache: IndexCache, clock: Clock) -> None:
        self.fill(cache, clock)
        clock.now = 13.0
        before = snapshot(cache)
        with pytest.raises(ResourceExhaustedError, match="is out of pages: 8 needed, 1 free, 6 evictable, 10 in all"):
            append(cache, "red", 0, (1, 0, 32))
        assert snapshot(cache) == before

    def test_those_that_the_request_names_stay(self, cache: IndexCache, clock: Clock) -> None:
        self.fill(cache, clock)
        append(cache, "red", 1, (2, 0, 1, 1))
        clock.now = 100.0
        append(cache, "red", 1, (2, 0, 1, 1), (3, 0, 20))
        assert set(held_pages(cache)) == {("red", 1), ("red", 2), ("red", 3)}

    def test_the_parent_of_a_fork_stays(self, cache: IndexCache, clock: Clock) -> None:
        self.fill(cache, clock)
        append(cache, "red", 1, (4, 0, 13))
        cache.truncate_sequence("red", 3, 11)
        clock.now = 2.0
        cache.truncate_sequence("red", 2, 11)
        clock.now = 100.0
        cache.fork_sequence("red", 2, 5, 11)
        assert set(held_pages(cache)) == {("red", 1), ("red", 2), ("red", 4), ("red", 5)}

    def test_other_tenants_idle_sequences_go_too(self, cache: IndexCache, clock: Clock) -> None:
        cache.open_sequences("blue", {1: 0})
        append(cache, "blue", 0, (1, 0, 40))
        clock.now = 10.0
        append(cache, "red", 0, (1, 0, 1))
        with pytest.raises(BlockdexError, match="sequence 1: unknown"):
            cache.get_sequence("blue", 1)

    def test_who_shares_all_with_the_living_stays(self, cache: IndexCache, clock: Clock) -> None:
        append(cache, "red", 0, (1, 0, 16))
        cache.open_sequences("red", {2: 0})
        append(cache, "red", 0, (2, 0, 24))
        clock.now = 5.0
        cache.fork_sequence("red", 1, 3, 16)
        clock.now = 6.0
        cache.get_sequence("red", 2)
        cache.open_sequences("red", {4: 0})
        clock.now = 16.0
        cache.get_sequence("red", 3)
        append(cache, "red", 0, (4, 0, 4))
        assert set(held_pages(cache)) == {("red", 1), ("red", 3), ("red", 4)}

    def test_who_shares_with_the_idle_goes_with_them(self, cache: IndexCache, clock: Clock) -> None:
        append(cache, "red", 0, (1, 0, 40))
        cache.fork_sequence("red", 1, 2, 40)
        cache.open_sequences("red", {3: 0})
        clock.now = 10.0
        append(cache, "red", 0, (3, 0, 4))
        assert set(held_pages(cache)) == {("red", 3)}
        assert cache.usage().evictions == 2

    def test_an_eviction_can_spare_a_copy(self, cache: IndexCache, clock: Clock) -> None:
        append(cache, "red", 0, (1, 0, 40))
        cache.fork_sequence("red", 1, 2, 40)
        clock.now = 10.0
        assert append(cache, "red", 1, (1, 0, 8)) == []
        assert set(held_pages(cache)) == {("red", 1)}


class TestTheLastPage:
    def test_can_be_taken(self, cache: IndexCache) -> None:
        append(cache, "red", 0, (1, 0, 40))
        assert cache.usage().pages_used == 10
        with pytest.raises(ResourceExhaustedError):
            append(cache, "red", 0, (1, 40, 1))

    def test_two_writers_of_one_page_need_one_more(self, cache: IndexCache) -> None:
        append(cache, "red", 0, (1, 0, 36))
        cache.fork_sequence("red", 1, 2, 36)
        assert len(append(cache, "red", 1, (1, 0, 4), (2, 0, 4))) == 1
        assert cache.usage().pages_used == 10

    def test_a_reader_beside_two_writers_needs_another(self, cache: IndexCache) -> None:
        append(cache, "red", 0, (1, 0, 36))
        cache.fork_sequence("red", 1, 2, 36)
        cache.fork_sequence("red", 1, 3, 36)
        before = snapshot(cache)
        with pytest.raises(ResourceExhaustedError, match="2 needed, 1 free"):
            append(cache, "red", 1, (1, 0, 4), (2, 0, 4))
        assert snapshot(cache) == before


def test_a_cache_that_is_always_nearly_full() -> None:
    """Thousands of requests: what finds its pages happens, and nothing is lost."""
    draw = random.Random(7)
    clock = Clock()
    cache = IndexCache(SPEC, 24, default_lease_seconds=30, clock=clock)
    seen = Counter[str]()
    for fresh in range(4000):
        clock.now += draw.choice((0.1, 1.0, 5.0))
        open_ids = [sequence_id for _, sequence_id in held_pages(cache)]
        try:
            if len(open_ids) < 2:
                cache.open_sequences("red", {fresh: 0})
            elif len(open_ids) < 9 and draw.random() < 0.3:
                cache.fork_sequence("red", draw.choice(open_ids), fresh, draw.randrange(40))
            else:
                layer = draw.randrange(SPEC.num_layers)
                chosen = draw.sample(open_ids, min(draw.randrange(1, 4), len(open_ids)))
                rows = [random_row(draw, cache, layer, sequence_id) for sequence_id in chosen]
                evictions = cache.usage().evictions
                seen["copied"] += len(append(cache, "red", layer, *rows))
                seen["evicted"] += cache.usage().evictions - evictions
                seen["full"] += cache.usage().pages_used == 24
        except ResourceExhaustedError:
            seen["refused"] += 1
            cache.truncate_sequence("red", draw.choice(open_ids), draw.randrange(8))
        check_integrity(cache)
    assert min(seen[outcome] for outcome in ("copied", "evicted", "full", "refused")) > 50, seen


def random_row(draw: random.Random, cache: IndexCache, layer: int, sequence_id: int) -> tuple[int, int, int]:
    length = int(cache._sequences.lengths[layer, cache._sequences.find("red", sequence_id)])
    return sequence_id, max(length - draw.choice((0, 0, 1, 8)), 0), draw.choice((1, 1, 2, 9))
