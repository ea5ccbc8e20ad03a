"""Pools in the engine: everything in flight at once takes effect as if one request came after the other had ended."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from numpy.typing import NDArray

from benchmarks.ring_messages import Request, TokenAnswer
from blockdex.contract.errors import BlockdexError, Reason
from blockdex.contract.messages import SetPageTables
from blockdex.executor.cpu import CpuExecutor
from blockdex_kernels.reference import select as reference_select
from support.pool_model import PoolModel
from support.running_engine import (
    SPEC,
    TENANT,
    Running,
    block_ids,
    close,
    close_pool,
    create_pool,
    get,
    keys_of,
    open_sequence,
    queries_of,
    running,
    set_cells,
    tokens,
)

PAGES, ROWS, BLOCKS, POOL = 12, 3, 8, 7
SIZES = (PAGES, ROWS, BLOCKS)
TENANTS = ("red", "blue")
Ids = NDArray[np.int32]


@pytest.fixture(autouse=True, scope="module")
def tables_of_its_own() -> Iterator[None]:
    """Has the CPU read a copy of the page tables that knows of changes alone, as a GPU does."""

    def write_tables(self: CpuExecutor, cells: NDArray[np.int32], changes: NDArray[np.intp]) -> None:
        before = self._cells
        self._cells = np.zeros(len(cells), np.int32)
        self._cells[: len(before)] = before
        self._cells[changes] = cells[changes]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuExecutor, "write_tables", write_tables)
        yield


@dataclass
class Expected:
    """What one request may be answered: a reason it is refused with, or block ids; None: merely done."""

    request: Request
    reason: Reason | None = None
    candidates: list[Ids] = field(default_factory=list)
    waits_for: int = 0
    where: tuple[Any, ...] = ()


class Model:
    """One tenant's pool: the pages, the cells, and the revisions, as requests change them one after another."""

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.pages = PoolModel(SPEC, PAGES, ROWS, BLOCKS)
        self.revisions = [0] * SPEC.num_layers
        self.waiting: list[Expected] = []

    def set(self, runs: Sequence[tuple[int, int, Sequence[int]]]) -> Expected:
        for row, first_block, page_ids in runs:
            self.pages.set_cells(row, first_block, page_ids)
        return Expected(set_cells(POOL, *runs, tenant=self.tenant))

    def selected(self, layer: int, rows: Sequence[tuple[int, int, int]], queries: NDArray[Any], pages: bool) -> Ids:
        made, at = [], 0
        for row, start, length in rows:
            own = torch.from_numpy(queries[at : at + length])
            keys = torch.from_numpy(self.pages.keys(layer, row, start + length))
            ids = reference_select(keys, own, start, SPEC).block_ids.numpy()
            made.append(np.where(ids >= 0, self.pages.cells[row][ids], -1).astype(np.int32) if pages else ids)
            at += length
        return np.concatenate(made)

    def tokens(
        self,
        layer: int,
        rows: Sequence[tuple[int, int, int]],
        revision: int,
        keys: NDArray[np.float32] | None,
        queries: NDArray[np.float32] | None,
        pages: bool,
    ) -> Expected:
        spans = [(*row, revision) for row in rows]
        request = tokens(layer, spans, keys=keys, queries=queries, pages=pages, pool=POOL, tenant=self.tenant)
        expected, known = Expected(request), self.revisions[layer]
        applies = keys is not None and (not revision or revision > known)
        if keys is not None and 0 < revision < known:
            expected.reason = Reason.STALE_REVISION
        elif keys is None and revision > known:
            expected.waits_for, expected.where = revision, (layer, rows, queries, pages)
            self.waiting.append(expected)
        elif (applies or queries is not None) and not self._has_pages(rows, everything=queries is not None):
            expected.reason = Reason.PAGE_NOT_SET
        else:
            at = 0
            for row, start, length in rows:
                if applies and keys is not None:
                    self.pages.append(layer, row, start, keys[at : at + length])
                at += length
            if applies and revision:
                self.revisions[layer] = revision
            if queries is not None:
                expected.candidates.append(self.selected(layer, rows, queries, pages))
        self._serve_waiting()
        return expected

    def writes_twice(self, rows: Sequence[tuple[int, int, int]]) -> bool:
        """Whether an append of these has two keys for one place of a page."""
        size = SPEC.block_size
        positions = [(row, *divmod(at, size)) for row, start, length in rows for at in range(start, start + length)]
        places = [(self.pages.cells[row, block], slot) for row, block, slot in positions]
        return len(set(places)) < len(places)

    def _has_pages(self, rows: Sequence[tuple[int, int, int]], *, everything: bool) -> bool:
        reached = [(row, 0, start + length) if everything else (row, start, length) for row, start, length in rows]
        return all(self.pages.has_pages(*each) for each in reached)

    def _serve_waiting(self) -> None:
        """One whose revision is there is answered with what there is then, or a little later."""
        for expected in self.waiting:
            layer, rows, queries, pages = expected.where
            if self.revisions[layer] < expected.waits_for:
                continue
            if self._has_pages(rows, everything=True):
                expected.candidates.append(self.selected(layer, rows, queries, pages))
            else:
                expected.reason = Reason.PAGE_NOT_SET


# Row, start, tokens: short ones, and some that are prefills of several slices.
SPAN = st.tuples(
    st.integers(0, ROWS - 1), st.integers(0, 24), st.sampled_from((1, 1, 2, 4, 5, 40)) | st.integers(1, 40)
)
SPANS = st.lists(SPAN, min_size=1, max_size=3, unique_by=lambda span: span[0])
RUN = st.integers(0, BLOCKS - 1).flatmap(
    lambda first: st.tuples(
        st.integers(0, ROWS - 1),
        st.just(first),
        st.lists(st.integers(0, PAGES - 1), min_size=1, max_size=BLOCKS - first),
    )
)
STEP = st.one_of(
    st.tuples(st.just("set"), st.lists(RUN, min_size=1, max_size=3)),
    st.tuples(
        st.sampled_from(("append", "select", "select", "both")),
        st.integers(0, 1),
        SPANS,
        st.sampled_from((None, None, -1, 0, 1, 1, 2)),
        st.booleans(),
    ),
    st.just(("settle",)),
)


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 1), STEP), min_size=5, max_size=40), st.integers(0, 2**32 - 1))
def test_what_is_in_flight_takes_effect_in_the_order_of_arrival(steps: list[Any], seed: int) -> None:
    asyncio.run(follow(steps, np.random.default_rng(seed)))


async def follow(steps: list[Any], random: np.random.Generator) -> None:
    models = [Model(tenant) for tenant in TENANTS]
    async with running(num_pages=2 * PAGES) as engine:
        in_flight: list[tuple[Expected, Any]] = []

        def send(expected: Expected) -> None:
            in_flight.append((expected, engine.submit(expected.request)))

        for model in models:
            send(Expected(create_pool(POOL, *SIZES, tenant=model.tenant)))
            # All rows have pages at first, most of them the same, so that calls meet on them.
            send(model.set([(row, 0, random.integers(0, PAGES, BLOCKS - row).tolist()) for row in range(ROWS)]))
        for number, (name, *what) in steps:
            model = models[number]
            if name == "settle":
                ended = (sent for expected, sent in in_flight[-3:] if not expected.waits_for)
                await asyncio.gather(*ended, return_exceptions=True)
            elif name == "set":
                send(model.set(*what))
            else:
                send(ask(model, random, name, *what))
        for model in models:  # Nothing waits for ever.
            for layer in (0, 1):
                last = model.revisions[layer] + 3
                send(model.tokens(layer, [(0, 0, 1)], last, keys_of(random, 1), None, False))
        for expected, sent in in_flight:
            await check(expected, sent)
        await engine.settled()
        stats = engine.engine.stats()
        assert stats.integrity_faults == 0


def ask(
    model: Model, random: np.random.Generator, name: str, layer: int, spans: Any, ahead: int | None, pages: bool
) -> Expected:
    fits = [(row, start, min(length, BLOCKS * SPEC.block_size - start)) for row, start, length in spans]
    count = sum(length for _, _, length in fits)
    if model.writes_twice(fits):
        name = "select"  # of two keys in one place nobody knows which stays
    keys = None if name == "select" else keys_of(random, count)
    queries = None if name == "append" else queries_of(random, count)
    revision = 0 if ahead is None else max(model.revisions[layer] + ahead, 0)
    return model.tokens(layer, fits, revision, keys, queries, pages and queries is not None)


async def check(expected: Expected, sent: Any) -> None:
    try:
        answer = await sent
    except BlockdexError as error:
        assert error.reason == expected.reason, (expected, error)
        return
    if not expected.candidates:
        assert expected.reason is None, (expected, answer)
        return
    got = block_ids(answer)
    assert any(np.array_equal(got, ids) for ids in expected.candidates), expected


async def new_pool(engine: Running, random: np.random.Generator) -> PoolModel:
    """A pool whose row 0 has 40 keys in all of its first blocks, of which row 1 shares the first."""
    model = PoolModel(SPEC, PAGES, ROWS, BLOCKS)
    await engine.ask(create_pool(POOL, *SIZES))
    await engine.ask(set_cells(POOL, (0, 0, [5, 4, 3, 2, 1]), (1, 0, [5, 8])))
    model.set_cells(0, 0, [5, 4, 3, 2, 1])
    model.set_cells(1, 0, [5, 8])
    keys = keys_of(random, 40)
    await engine.ask(tokens(0, [(0, 0, 40)], keys=keys, pool=POOL))
    model.append(0, 0, 0, keys)
    return model


def change(name: str, random: np.random.Generator) -> Request:
    """What a prefill of row 0 must not see."""
    match name:
        case "cells":
            return set_cells(POOL, (0, 1, [9, 10, 11]))
        case "closing":
            return close_pool(POOL)
    return tokens(0, [(1, 0, 8)], keys=keys_of(random, 8), pool=POOL)  # into the page that both rows have


@pytest.mark.parametrize("pages", [False, True])
@pytest.mark.parametrize("name", ["cells", "closing", "keys in a page that is shared"])
async def test_what_a_prefill_reads_stays_until_it_is_done(random: np.random.Generator, name: str, pages: bool) -> None:
    async with running() as engine:
        model = await new_pool(engine, random)
        queries = queries_of(random, 36)
        with engine.backend.held("prefill") as entered:
            asked = engine.submit(tokens(0, [(0, 4, 36)], queries=queries, pages=pages, pool=POOL))
            await engine.reached(entered)
            changed = engine.submit(change(name, random))
            cells = model.cells.copy()
        assert not changed.done()
        got = block_ids(await asked)
        expected = reference_select(torch.from_numpy(model.keys(0, 0, 40)), torch.from_numpy(queries), 4, SPEC)
        ids = expected.block_ids.numpy()
        np.testing.assert_array_equal(got, np.where(ids >= 0, cells[0][ids], -1) if pages else ids)
        await changed
        assert engine.engine.info().cache.pools == (0 if name == "closing" else 1)


async def test_what_comes_after_cells_that_wait_waits_too(random: np.random.Generator) -> None:
    async with running() as engine:
        await new_pool(engine, random)
        await engine.ask(tokens(0, [(1, 0, 16)], keys=keys_of(random, 16), pool=POOL))
        answered: list[str] = []

        def note(name: str, sent: Any) -> Any:
            sent.add_done_callback(lambda _: answered.append(name))
            return sent

        with engine.backend.held("prefill") as entered:
            first = note("prefill", engine.submit(tokens(0, [(0, 4, 36)], queries=queries_of(random, 36), pool=POOL)))
            await engine.reached(entered)
            later = note("cells", engine.submit(set_cells(POOL, (0, 0, [9]))))
            last = note("select", engine.submit(tokens(1, [(0, 0, 1)], keys=keys_of(random, 1), pool=POOL)))
            other = engine.submit(create_pool(POOL + 1, *SIZES))  # of another pool: it waits for nothing
        await asyncio.gather(first, later, last, other)
        assert answered == ["prefill", "cells", "select"]


async def test_pages_of_a_pool_are_taken_from_idle_sequences_and_given_to_none(random: np.random.Generator) -> None:
    async with running(num_pages=PAGES + 2, lease_seconds=0.001) as engine:
        await engine.ask(open_sequence(1))
        await engine.ask(tokens(0, [(1, 0, 3 * SPEC.block_size)], keys=keys_of(random, 3 * SPEC.block_size)))
        await asyncio.sleep(0.01)
        await engine.ask(create_pool(POOL, *SIZES))
        assert (await engine.refusal(get(1))).reason == Reason.UNKNOWN_SEQUENCE
        await engine.ask(open_sequence(2))
        await asyncio.sleep(0.01)
        count = 3 * SPEC.block_size
        error = await engine.refusal(tokens(0, [(2, 0, count)], keys=keys_of(random, count)))
        assert error.reason == Reason.OUT_OF_PAGES
        assert (await engine.refusal(create_pool(POOL + 1, *SIZES))).reason == Reason.OUT_OF_PAGES
        await engine.ask(set_cells(POOL, (0, 0, [0])))
        await engine.ask(close_pool(POOL))
        await engine.ask(tokens(0, [(2, 0, count)], keys=keys_of(random, count)))


async def test_pages_of_a_pool_hold_nothing_of_others(random: np.random.Generator) -> None:
    async with running(num_pages=PAGES) as engine:
        count, layers = PAGES * SPEC.block_size, range(SPEC.num_layers)
        await engine.ask(open_sequence(1, tenant="red"))
        for layer in layers:
            await engine.ask(tokens(layer, [(1, 0, count)], keys=keys_of(random, count), tenant="red"))
        await engine.ask(close(1, tenant="red"))
        await engine.ask(create_pool(POOL, PAGES, 1, PAGES, tenant="blue"))
        await engine.ask(set_cells(POOL, (0, 0, range(PAGES)), tenant="blue"))
        for layer in layers:
            queries = queries_of(random, 1)
            asked = tokens(layer, [(0, count - 1, 1)], queries=queries, scores=True, pool=POOL, tenant="blue")
            answer = await engine.ask(asked)
            assert isinstance(answer, TokenAnswer) and answer.scores is not None
            assert not answer.scores[np.isfinite(answer.scores)].any()


async def test_page_numbers_are_asked_of_pools_alone(random: np.random.Generator) -> None:
    async with running() as engine:
        await engine.ask(open_sequence(1))
        await engine.ask(tokens(0, [(1, 0, 1)], keys=keys_of(random, 1)))
        error = await engine.refusal(tokens(0, [(1, 0, 1)], queries=queries_of(random, 1), pages=True))
        assert (error.reason, error.message) == (
            Reason.INVALID_POOL,
            "ids: pages are a pool's, and the request names none",
        )


async def test_revisions_of_a_request_are_one(random: np.random.Generator) -> None:
    async with running() as engine:
        await new_pool(engine, random)
        error = await engine.refusal(tokens(0, [(0, 0, 1, 3), (1, 0, 1, 4)], keys=keys_of(random, 2), pool=POOL))
        assert error.reason == Reason.INVALID_POOL
        assert "revisions must be the same in all rows, got 3 and 4" in error.message


async def test_a_new_epoch_has_no_pools(random: np.random.Generator) -> None:
    async with running() as engine:
        await new_pool(engine, random)
        engine.backend.fault = "append"
        assert (
            await engine.refusal(tokens(0, [(0, 0, 1)], keys=keys_of(random, 1), pool=POOL))
        ).reason == Reason.INTERNAL
        error = await engine.refusal(set_cells(POOL, (0, 0, [1])))
        assert error.reason == Reason.UNKNOWN_POOL
        await new_pool(engine, random)


async def test_rows_and_pages_are_used_again_as_pools_come_and_go(random: np.random.Generator) -> None:
    async with running(num_pages=2 * PAGES) as engine:
        for number in range(40):
            pages, rows = 1 + number % PAGES, 1 + number * 7 % 90
            await engine.ask(create_pool(100 + number, pages, rows, 1 + number % 200))
            await engine.ask(set_cells(100 + number, (rows - 1, 0, [pages - 1])))
            await engine.ask(tokens(0, [(rows - 1, 0, 1)], keys=keys_of(random, 1), pool=100 + number))
            await engine.ask(open_sequence(number))
            if number:
                await engine.ask(close_pool(99 + number))
        await engine.settled()
        assert engine.engine.stats().integrity_faults == 0
        assert engine.engine.info().cache.pages_used == pages


ROOM = BLOCKS * SPEC.block_size


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (lambda one: set_cells(POOL, (0, 0, [9]), (ROWS, 0, [1])), "row must be below 3, got 3"),
        (lambda one: set_cells(POOL, (0, 0, [9]), (1, BLOCKS - 1, [1, 2])), "must be at most 8, got 7 + 2"),
        (lambda one: set_cells(POOL, (0, 0, [9]), (1, 0, [PAGES])), "page_id must be below 12, got 12"),
        (lambda one: SetPageTables(TENANT, 0, POOL, [0, 1], [0, 0], [1, 0], [9]), "count must be at least 1, got 0"),
        (lambda one: SetPageTables(TENANT, 0, POOL, [0], [0], [1], [9, 9]), "as many as the counts add up to, got 2"),
        (lambda one: tokens(0, [(0, 0, 1), (ROWS, 0, 1)], keys=one, pool=POOL), "row must be below 3, got 3"),
        (lambda one: tokens(0, [(0, 0, 1), (1, ROOM, 1)], keys=one, pool=POOL), "must be at most 64, got 65"),
        (lambda one: tokens(0, [(0, 0, 1), (1, 16, 1)], keys=one, pool=POOL), "row 1, layer 0: block 2 has no page"),
        (lambda one: tokens(0, [(0, 0, 1), (2, 0, 1)], keys=one, pool=POOL), "row 2, layer 0: block 0 has no page"),
        (lambda one: tokens(0, [(0, 0, 1), (0, 3, 1)], keys=one, pool=POOL), "row 0 is named 2 times"),
        (lambda one: tokens(0, [(0, 0, 1)], keys=one[:1], pool=POOL + 1), "pool 8: unknown"),
        (lambda one: tokens(0, [(0, 0, 1)], keys=one[:1], pool=POOL, tenant="other"), "pool 7: unknown"),
        (lambda one: set_cells(POOL, (0, 0, [9]), tenant="other"), "pool 7: unknown"),
    ],
)
async def test_what_is_refused_changes_nothing(random: np.random.Generator, asked: Any, words: str) -> None:
    async with running() as engine:
        model = await new_pool(engine, random)
        error = await engine.refusal(asked(keys_of(random, 2)))
        assert words in error.message
        queries = queries_of(random, 4)
        got = block_ids(await engine.ask(tokens(0, [(0, 36, 4)], queries=queries, pages=True, pool=POOL)))
        np.testing.assert_array_equal(got, select_pages(model, queries))


def select_pages(model: PoolModel, queries: NDArray[np.float32]) -> Ids:
    """The pages that the last queries of row 0 select."""
    ids = reference_select(torch.from_numpy(model.keys(0, 0, 40)), torch.from_numpy(queries), 36, SPEC).block_ids
    return np.where(ids.numpy() >= 0, model.cells[0][ids.numpy()], -1).astype(np.int32)
