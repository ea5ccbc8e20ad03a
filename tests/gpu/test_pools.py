"""Pools of a real server on the device: steps out of graphs, and slices of prefill, over tables that change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pytest

from blockdex import Client
from blockdex_kernels import IndexSpec
from support.pool_model import PoolModel
from support.serving import Serving, serve

SPEC = IndexSpec(num_layers=3)
PAGES, ROWS, BLOCKS = 400, 6, 100
CHECKED = 40  # of the queries of a run, the last ones


@pytest.fixture(scope="module")
def serving() -> Iterator[Serving]:
    with serve("--device=cuda", "--num-layers=3", "--cache-bytes=1GiB") as serving:
        yield serving


@pytest.mark.parametrize("transport", ["stream", "ring"])
def test_rows_are_answered_as_the_reference_says(serving: Serving, transport: Literal["stream", "ring"]) -> None:
    random = np.random.default_rng(5)
    model = PoolModel(SPEC, PAGES, ROWS, BLOCKS)
    with Client(serving.grpc_address, transport=transport) as client:
        pool = client.create_pool(1 + (transport == "ring"), num_pages=PAGES, num_rows=ROWS, max_blocks=BLOCKS)
        free = random.permutation(PAGES).tolist()
        lengths = [0] * ROWS

        def grow(row: int, length: int) -> None:
            """Gives a row pages for so many tokens."""
            first, wanted = -(-lengths[row] // SPEC.block_size), -(-length // SPEC.block_size)
            fresh = [free.pop() for _ in range(first, wanted)]
            if fresh:
                pool.set_page_tables(row, fresh, first_blocks=first)
                model.set_cells(row, first, fresh)

        def step(layer: int, rows: list[int], counts: list[int], ids: Any, revision: int) -> None:
            keys = random.standard_normal((sum(counts), SPEC.head_dim), np.float32)
            queries = random.standard_normal((sum(counts), SPEC.num_index_heads, SPEC.head_dim), np.float32)
            starts = [lengths[row] for row in rows]
            got = pool.append_and_select(
                layer,
                rows=rows,
                starts=starts,
                lengths=counts,
                keys=keys,
                queries=queries,
                ids=ids,
                revision=revision,
                timeout=60,
            )
            at = 0
            for row, start, count in zip(rows, starts, counts, strict=True):
                model.append(layer, row, start, keys[at : at + count])
                at, skipped = at + count, max(count - CHECKED, 0)
                own = slice(at - count + skipped, at)
                model.check(layer, row, start + skipped, queries[own], got[own], pages=ids == "pages")

        def forward(rows: list[int], counts: list[int], ids: Any, revision: int) -> None:
            for row, count in zip(rows, counts, strict=True):
                grow(row, lengths[row] + count)
            for layer in range(SPEC.num_layers):
                step(layer, rows, counts, ids, revision)
            for row, count in zip(rows, counts, strict=True):
                lengths[row] += count

        forward([0, 3], [5000, 700], "blocks", 1)
        for number in range(12):
            forward(
                [0, 3, 5][: 2 + number % 2], [1, 3, 130][: 2 + number % 2], ("blocks", "pages")[number % 2], 2 + number
            )
        # Row 0 is another request now: its pages go back and come again in another order.
        free += model.cells[0][: -(-lengths[0] // SPEC.block_size)].tolist()
        lengths[0] = 0
        forward([0, 5], [300, 1], "pages", 20)
        # Row 1 shares the first blocks of row 3.
        shared = model.cells[3, :5].tolist()
        pool.set_page_tables(1, shared)
        model.set_cells(1, 0, shared)
        lengths[1] = 5 * SPEC.block_size
        forward([1, 3], [4, 1], "blocks", 21)
        pool.close()
        assert client.info().cache.pools == 0
