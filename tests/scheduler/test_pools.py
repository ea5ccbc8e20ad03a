"""Pools in the engine: everything in flight at once takes effect as if one request came after the other had ended."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import given, settings
from numpy.typing import NDArray

from benchmarks.ring_messages import Request
from blockdex.contract.errors import BlockdexError, Reason
from blockdex_kernels.reference import select as reference_select
from support.pool_model import PoolModel
from support.running_engine import (
    SPEC,
    block_ids,
    create_pool,
    keys_of,
    queries_of,
    running,
    set_cells,
    tokens,
)

PAGES, ROWS, BLOCKS, POOL = 12, 3, 8, 7
TENANTS = ("red", "blue")
Ids = NDArray[np.int32]


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
        st.sampled_from((None, None, 0, 1, 1, 2)),
        st.booleans(),
    ),
    st.just(("settle",)),
)


@settings(max_examples=8)
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
            sizes = {"num_pages": PAGES, "num_rows": ROWS, "max_blocks": BLOCKS}
            send(Expected(create_pool(POOL, **sizes, tenant=model.tenant)))
            # All rows have pages at first, most of them the same, so that calls meet on them.
            send(model.set([(row, 0, random.integers(0, PAGES, BLOCKS - row).tolist()) for row in range(ROWS)]))
        for number, (name, *what) in steps:
            model = models[number]
            if name == "settle":
                await asyncio.gather(*(sent for _, sent in in_flight[-3:]), return_exceptions=True)
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
    keys = None if name == "select" else keys_of(random, count)
    queries = None if name == "append" else queries_of(random, count)
    revision = 0 if ahead is None else model.revisions[layer] + ahead
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
