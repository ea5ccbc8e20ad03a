"""Pools over every transport: rows of an engine's own page tables, whose answers are those of the reference."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

import blockdex
from blockdex_kernels import IndexSpec
from support.clients import new_sequence
from support.pool_model import PoolModel
from support.serving import Serving

SPEC = IndexSpec(num_layers=3)
PAGES, ROWS, BLOCKS = 40, 4, 24
SIZE = SPEC.block_size

Call = Callable[[], object]


class Twin(NamedTuple):
    """A pool, and what it should hold."""

    pool: blockdex.Pool
    model: PoolModel

    def set(self, row: int, pages: list[int], first_block: int = 0) -> None:
        self.pool.set_page_tables(row, pages, first_blocks=first_block)
        self.model.set_cells(row, first_block, pages)

    def append(self, random: np.random.Generator, row: int, start: int, length: int, layer: int = 0) -> None:
        keys = random.standard_normal((length, SPEC.head_dim), np.float32)
        self.pool.append_keys(layer, rows=row, starts=start, keys=keys)
        self.model.append(layer, row, start, keys)

    def check(self, random: np.random.Generator, row: int, start: int, length: int = 1, layer: int = 0) -> None:
        queries = asked(random, length)
        ids = self.pool.select_blocks(layer, rows=row, starts=start, queries=queries)
        self.model.check(layer, row, start, queries, ids)


def asked(random: np.random.Generator, length: int) -> Any:
    return random.standard_normal((length, SPEC.num_index_heads, SPEC.head_dim), np.float32)


@pytest.fixture
def twin(client: blockdex.Client) -> Iterator[Twin]:
    pool = client.create_pool(new_sequence(), num_pages=PAGES, num_rows=ROWS, max_blocks=BLOCKS)
    yield Twin(pool, PoolModel(SPEC, PAGES, ROWS, BLOCKS))
    pool.close()


def test_rows_are_answered_as_the_reference_says(twin: Twin, random: np.random.Generator) -> None:
    long, short = list(range(39, 17, -1)), [2, 0, 1]
    twin.pool.set_page_tables([1, 3], long + short, first_blocks=0, counts=[22, 3])
    twin.model.set_cells(1, 0, long)
    twin.model.set_cells(3, 0, short)
    for layer in (0, 2):
        # A prefill, then both rows side by side, one query and five.
        twin.append(random, 1, 0, 22 * SIZE - 40, layer)
        twin.append(random, 3, 0, 260, layer)
        twin.check(random, 1, 20 * SIZE, 90, layer)
        keys, queries = random.standard_normal((6, SPEC.head_dim), np.float32), asked(random, 6)
        starts = [22 * SIZE - 40, 260]
        for ids in ("blocks", "pages"):
            got = twin.pool.append_and_select(
                layer, rows=[1, 3], starts=starts, lengths=[1, 5], keys=keys, queries=queries, ids=ids
            )
            twin.model.append(layer, 1, starts[0], keys[:1])
            twin.model.append(layer, 3, starts[1], keys[1:])
            twin.model.check(layer, 1, starts[0], queries[:1], got[:1], pages=ids == "pages")
            twin.model.check(layer, 3, starts[1], queries[1:], got[1:], pages=ids == "pages")


def test_page_numbers_stand_where_block_ids_would(twin: Twin, random: np.random.Generator) -> None:
    pages = random.permutation(PAGES)[:20].tolist()
    twin.set(0, pages)
    twin.append(random, 0, 0, 20 * SIZE)
    numbers = np.array([*pages, -1])  # the last one for -1
    for length in (2, 100):  # a step, and a prefill
        queries = asked(random, length)
        where = {"rows": 0, "starts": 20 * SIZE - length, "queries": queries}
        for order in ("ascending", "score"):
            ids, scores = twin.pool.select_blocks(0, **where, order=order, return_scores=True)
            named, same = twin.pool.select_blocks(0, **where, order=order, return_scores=True, ids="pages")
            np.testing.assert_array_equal(named, numbers[ids])
            np.testing.assert_array_equal(scores, same)
        part = twin.pool.select_blocks(
            0, **where | {"queries": queries[:, 1:3]}, first_head=1, num_heads=2, ids="pages"
        )
        whole = twin.pool.select_blocks(0, **where, ids="pages")
        np.testing.assert_array_equal(part, whole[:, 1:3])


def test_prefixes_are_shared_by_naming_their_pages(twin: Twin, random: np.random.Generator) -> None:
    twin.set(0, list(range(18)))
    twin.append(random, 0, 0, 18 * SIZE)
    # Another row has the first 17 blocks from the other one, and goes on by itself.
    twin.set(2, [*range(17), 30])
    twin.append(random, 2, 17 * SIZE, 3)
    twin.check(random, 2, 17 * SIZE + 2)
    twin.check(random, 0, 18 * SIZE - 1)


def test_a_row_that_is_used_again_sees_nothing_of_the_one_before(twin: Twin, random: np.random.Generator) -> None:
    twin.set(0, list(range(20)))
    twin.append(random, 0, 0, 20 * SIZE)
    # The same slot and the same pages, whose old keys lie behind the few new ones.
    twin.append(random, 0, 0, 5)
    for start in range(5):
        queries = asked(random, 1)
        ids = twin.pool.select_blocks(0, rows=0, starts=start, queries=queries)
        assert ids[0, 0].tolist() == [0] + [-1] * (SPEC.topk - 1)
        twin.model.check(0, 0, start, queries, ids)
    twin.set(0, [25, 26])
    twin.append(random, 0, 0, 200)
    twin.check(random, 0, 199)


def test_rejected_drafts_are_written_over(twin: Twin, random: np.random.Generator) -> None:
    twin.set(1, list(range(18)))
    twin.append(random, 1, 0, 17 * SIZE + 100)
    for accepted in (1, 0, 4):  # of four drafts each
        start = 17 * SIZE + 100 + accepted
        keys, queries = random.standard_normal((5, SPEC.head_dim), np.float32), asked(random, 5)
        ids = twin.pool.append_and_select(0, rows=1, starts=start, keys=keys, queries=queries)
        twin.model.append(0, 1, start, keys)
        twin.model.check(0, 1, start, queries, ids)


def test_a_row_in_the_middle_may_be_left_out(twin: Twin, random: np.random.Generator) -> None:
    for row in range(3):
        twin.set(row, [10 * row, 10 * row + 1])
        twin.append(random, row, 0, 130 + row)
    for rows in ([0, 1, 2], [0, 2], [2], [2, 0]):
        queries, starts = asked(random, len(rows)), [129 + row for row in rows]
        ids = twin.pool.select_blocks(0, rows=rows, starts=starts, lengths=[1] * len(rows), queries=queries)
        for at, row in enumerate(rows):
            twin.model.check(0, row, starts[at], queries[at : at + 1], ids[at : at + 1])


def test_a_gap_is_the_engines_business(twin: Twin, random: np.random.Generator) -> None:
    twin.set(0, [5], first_block=3)
    twin.append(random, 0, 3 * SIZE + 7, 10)  # before any block in front has a page
    twin.set(0, [6, 7, 8])
    for block in range(3):
        twin.append(random, 0, block * SIZE, SIZE)
    twin.append(random, 0, 3 * SIZE, 7)
    twin.check(random, 0, 3 * SIZE + 16)


def test_revisions_of_pool_and_layer_order_ranks(
    client: blockdex.Client, twin: Twin, other: blockdex.Client, random: np.random.Generator
) -> None:
    rank = other.pool(twin.pool.pool_id)
    shape: dict[str, Any] = {"rows": [0, 1], "starts": [0, 0], "lengths": [3, 3]}
    twin.pool.set_page_tables([0, 1], [3, 4], counts=[1, 1])
    twin.model.set_cells(0, 0, [3])
    twin.model.set_cells(1, 0, [4])
    keys, queries = random.standard_normal((6, SPEC.head_dim), np.float32), asked(random, 6)
    answers: list[Any] = []
    waits = threading.Thread(target=lambda: answers.append(rank.select_blocks(1, **shape, queries=queries, revision=5)))
    waits.start()
    twin.pool.append_keys(1, **shape, keys=keys, revision=4)
    waits.join(0.1)
    assert waits.is_alive()
    first = twin.pool.append_and_select(1, **shape, keys=keys, queries=queries, revision=5)
    waits.join(30)
    # Every rank may send it: the first was written, others find it done, whatever they carry.
    second = rank.append_and_select(1, **shape, keys=keys + 1, queries=queries, revision=5)
    rank.append_keys(1, **shape, keys=keys - 1, revision=5)
    third = rank.select_blocks(1, **shape, queries=queries, revision=2)
    for row in (0, 1):
        twin.model.append(1, row, 0, keys[3 * row : 3 * row + 3])
        for answer in (*answers, first, second, third):
            own = slice(3 * row, 3 * row + 3)
            twin.model.check(1, row, 0, queries[own], answer[own])
    assert len(answers) == 1
    with pytest.raises(blockdex.AbortedError, match="row 0, layer 1: append has revision 4, the layer is at 5"):
        twin.pool.append_keys(1, **shape, keys=keys, revision=4)
    with pytest.raises(blockdex.DeadlineExceededError):
        twin.pool.select_blocks(1, **shape, queries=queries, revision=6, timeout=0.2)
    twin.pool.append_keys(0, **shape, keys=keys, revision=1)  # another layer counts for itself


def bad(call: Callable[[Any], object], code: type[blockdex.BlockdexError], reason: str, words: str) -> Any:
    return pytest.param(call, code, reason, words, id=f"{reason}: {words}")


KEY, QUERY = np.ones((1, SPEC.head_dim), np.float32), np.ones((1, SPEC.num_index_heads, SPEC.head_dim), np.float32)
INVALID, MISSING, UNSET = blockdex.InvalidArgumentError, blockdex.NotFoundError, blockdex.FailedPreconditionError


@pytest.mark.parametrize(
    ("call", "code", "reason", "words"),
    [
        bad(lambda pool: pool.set_page_tables(ROWS, [0]), INVALID, "INVALID_POOL", "row must be below 4, got 4"),
        bad(
            lambda pool: pool.set_page_tables(0, [1, 2], first_blocks=BLOCKS - 1),
            INVALID,
            "INVALID_POOL",
            "row 0: first_block + count must be at most 24, got 23 + 2",
        ),
        bad(
            lambda pool: pool.set_page_tables(0, [1], first_blocks=2**32 - 1),
            INVALID,
            "INVALID_POOL",
            "must be at most 24, got 4294967295 + 1",
        ),
        bad(
            lambda pool: pool.set_page_tables([0, 1], [7, PAGES], counts=[1, 1]),
            INVALID,
            "INVALID_POOL",
            "page_id must be below 40, got 40",
        ),
        bad(lambda pool: pool.set_page_tables(0, [-1]), INVALID, "INVALID_POOL", "page_ids must be 0 to"),
        bad(
            lambda pool: pool.set_page_tables([0, 1], [1, 2], counts=[2, 0]),
            INVALID,
            "INVALID_POOL",
            "row 1: count must be at least 1, got 0",
        ),
        bad(
            lambda pool: pool.set_page_tables([0, 1], [1, 2, 3], counts=[1, 1]),
            INVALID,
            "INVALID_POOL",
            "as many as the counts add up to, got 3",
        ),
        bad(
            lambda pool: pool.set_page_tables([0, 1], [1, 2, 3], counts=[1]),
            INVALID,
            "INVALID_POOL",
            "got 2 rows, 2 first_blocks, 1 counts",
        ),
        bad(lambda pool: pool.set_page_tables([], []), INVALID, "INVALID_POOL", "got 0 page_ids for 0 rows"),
        bad(lambda pool: pool.set_page_tables([], [], counts=[]), INVALID, "INVALID_SPANS", "rows: must be 1 to"),
        bad(
            lambda pool: pool.append_keys(0, rows=ROWS, starts=0, keys=KEY),
            INVALID,
            "INVALID_POOL",
            "row must be below 4, got 4",
        ),
        bad(
            lambda pool: pool.append_keys(0, rows=[1, 1], starts=[0, 1], lengths=[1, 1], keys=np.repeat(KEY, 2, 0)),
            INVALID,
            "DUPLICATE_SEQUENCE",
            "row 1 is named 2 times",
        ),
        bad(
            lambda pool: pool.append_keys(0, rows=0, starts=BLOCKS * SIZE, keys=KEY),
            INVALID,
            "INVALID_POOL",
            "row 0: start + length must be at most 3072, got 3073",
        ),
        bad(
            lambda pool: pool.append_keys(0, rows=[0, 1], starts=[0, 0], lengths=[1, 1], keys=np.repeat(KEY, 2, 0)),
            UNSET,
            "PAGE_NOT_SET",
            "row 1, layer 0: block 0 has no page, the span ends at 1",
        ),
        bad(
            lambda pool: pool.append_and_select(0, rows=0, starts=6 * SIZE, keys=KEY, queries=QUERY),
            UNSET,
            "PAGE_NOT_SET",
            "row 0, layer 0: block 2 has no page, the span ends at 769",
        ),
        bad(
            lambda pool: pool.select_blocks(0, rows=2, starts=0, queries=QUERY),
            UNSET,
            "PAGE_NOT_SET",
            "row 2, layer 0: block 0 has no page",
        ),
        bad(
            lambda pool: pool.select_blocks(3, rows=0, starts=0, queries=QUERY),
            INVALID,
            "INVALID_LAYER",
            "layer must be below 3, got 3",
        ),
        bad(
            lambda pool: pool.select_blocks(0, rows=0, starts=0, queries=QUERY, ids="page"),
            INVALID,
            "INVALID_POOL",
            "ids",
        ),
        bad(
            lambda pool: pool.select_blocks(0, rows=0, starts=0, queries=QUERY, epoch=77),
            UNSET,
            "EPOCH_MISMATCH",
            "request names 77",
        ),
        bad(lambda pool: pool.close(epoch=77), UNSET, "EPOCH_MISMATCH", "request names 77"),
        bad(lambda pool: pool.set_page_tables(0, [5], epoch=77), UNSET, "EPOCH_MISMATCH", "request names 77"),
    ],
)
def test_what_is_refused_changes_nothing(
    twin: Twin,
    random: np.random.Generator,
    call: Callable[[Any], object],
    code: type[blockdex.BlockdexError],
    reason: str,
    words: str,
) -> None:
    twin.set(0, [20, 21])
    twin.set(0, [22], first_block=6)
    twin.append(random, 0, 0, 130)
    with pytest.raises(code) as refused:
        call(twin.pool)
    assert refused.value.reason == reason
    assert words in refused.value.message
    twin.check(random, 0, 129)  # neither keys nor cells
    with pytest.raises(UNSET, match="row 1, layer 0: block 0 has no page"):
        twin.pool.select_blocks(0, rows=1, starts=0, queries=QUERY)


@pytest.mark.parametrize(
    ("sizes", "code", "words"),
    [
        ({"num_pages": 0}, INVALID, "num_pages must be at least 1, got 0"),
        ({"num_rows": 0}, INVALID, "num_rows must be at least 1, got 0"),
        ({"max_blocks": 0}, INVALID, "max_blocks must be at least 1, got 0"),
        ({"max_blocks": 8193}, INVALID, "max_blocks must be at most 8192, got 8193"),
        ({"num_pages": 10**6}, blockdex.ResourceExhaustedError, "is out of pages: 1000000 needed"),
        ({"num_rows": 2**17}, blockdex.ResourceExhaustedError, "may have 65536 rows"),
        ({"num_rows": 2**14, "max_blocks": 8192}, blockdex.ResourceExhaustedError, "may have 67108864 cells"),
    ],
)
def test_sizes_that_no_pool_has(
    client: blockdex.Client, sizes: dict[str, int], code: type[blockdex.BlockdexError], words: str
) -> None:
    used = client.info().cache.pages_used
    with pytest.raises(code, match=words):
        client.create_pool(new_sequence(), **{"num_pages": 2, "num_rows": 2, "max_blocks": 2} | sizes)
    assert client.info().cache.pages_used == used


def test_a_pool_is_created_once_and_closed_as_often_as_one_likes(client: blockdex.Client) -> None:
    pool_id, sizes = new_sequence(), {"num_pages": 3, "num_rows": 2, "max_blocks": 2}
    before = client.info().cache
    pool = client.create_pool(pool_id, **sizes)
    client.create_pool(pool_id, **sizes)  # a lost answer may be asked for again
    client.open_sequence(pool_id)  # sequences have ids of their own
    cache = client.info().cache
    assert (cache.pages_used - before.pages_used, cache.pools - before.pools) == (3, 1)
    assert cache.sequences == before.sequences + 1
    client.close_sequence(pool_id)
    with pytest.raises(blockdex.AlreadyExistsError, match="there already, with 3 pages, 2 rows of 2 blocks"):
        client.create_pool(pool_id, **sizes | {"num_rows": 1})
    pool.set_page_tables(1, [0])
    with pytest.raises(blockdex.AlreadyExistsError):
        client.create_pool(pool_id, **sizes)
    pool.close()
    pool.close()
    assert client.info().cache.pages_used == before.pages_used
    calls: tuple[Call, ...] = (
        lambda: pool.set_page_tables(0, [0]),
        lambda: pool.append_keys(0, rows=0, starts=0, keys=KEY),
    )
    for call in calls:
        with pytest.raises(MISSING, match=f"pool {pool_id}: unknown") as refused:
            call()
        assert refused.value.reason == "UNKNOWN_POOL"
    again = client.create_pool(pool_id, **sizes)
    with pytest.raises(UNSET, match="block 0 has no page"):  # of the one before nothing is left
        again.select_blocks(0, rows=1, starts=0, queries=QUERY)
    again.close()


def test_pools_of_other_tenants_are_unknown(client: blockdex.Client, server: Serving, twin: Twin) -> None:
    with blockdex.Client(server.grpc_address, tenant="someone-else") as stranger:
        pool = stranger.pool(twin.pool.pool_id)
        calls: tuple[Call, ...] = (
            lambda: pool.set_page_tables(0, [0]),
            lambda: pool.append_keys(0, rows=0, starts=0, keys=KEY),
            lambda: pool.select_blocks(0, rows=0, starts=0, queries=QUERY),
        )
        for call in calls:
            with pytest.raises(MISSING, match="unknown"):
                call()
        pool.close()  # its own, of which there is none
        own = stranger.create_pool(twin.pool.pool_id, num_pages=1, num_rows=1, max_blocks=1)
        own.set_page_tables(0, [0])
        own.close()
    with pytest.raises(UNSET, match="block 0 has no page"):
        twin.pool.select_blocks(0, rows=0, starts=0, queries=QUERY)


def test_0_is_no_pool(client: blockdex.Client) -> None:
    calls: tuple[Call, ...] = (
        lambda: client.pool(0),
        lambda: client.create_pool(0, num_pages=1, num_rows=1, max_blocks=1),
    )
    for call in calls:
        with pytest.raises(INVALID, match="pool_id must be at least 1, got 0"):
            call()
