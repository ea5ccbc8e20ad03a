"""Mistakes that users of paged engines have reported, each made against a real server: none changes an answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Literal

import numpy as np
import pytest
import torch

import blockdex
from blockdex_kernels import IndexSpec, reference
from examples.paged_engine.attention import selected_tokens
from support.serving import Serving

SPEC = IndexSpec(num_layers=3)
BLOCK, TOPK, HEADS, DIM = SPEC.block_size, SPEC.topk, SPEC.num_index_heads, SPEC.head_dim
PAGES, ROWS, WIDTH = 64, 64, 20

_pool_ids = count(1)


class PagedKeys:
    """A pool, and the same keys in pages of the test's own, which say what the answers are to be."""

    def __init__(self, pool: blockdex.Pool, random: np.random.Generator) -> None:
        self.pool = pool
        self.tables: dict[int, list[int]] = {}
        self._keys = torch.zeros(SPEC.num_layers, PAGES, BLOCK, DIM)
        self._random = random

    def set_table(self, row: int, pages: list[int]) -> None:
        """The row's block table from now on, cells behind it left as they are."""
        self.tables[row] = pages
        self.pool.set_page_tables(row, pages)

    def fill(self, row: int, start: int, length: int) -> None:
        """Appends keys."""
        keys = self._some(length, DIM)
        self.pool.append_keys(0, rows=[row], starts=[start], lengths=[length], keys=keys)
        self._write(0, row, start, keys)

    def step(
        self, rows: Sequence[int], starts: Sequence[int], lengths: Sequence[int], *, layer: int = 0, size: float = 1.0
    ) -> torch.Tensor:
        """Appends keys of some size and selects for as many queries; returns the ids, which are right."""
        tokens = sum(lengths)
        keys, queries = size * self._some(tokens, DIM), self._some(tokens, HEADS, DIM)
        ids, scores = self.pool.append_and_select(
            layer, rows=rows, starts=starts, lengths=lengths, keys=keys, queries=queries, return_scores="raw"
        )
        spans = (rows, starts, lengths, np.cumsum([0, *lengths[:-1]]).tolist())
        for row, start, length, first in zip(*spans, strict=True):
            own = slice(first, first + length)
            self._write(layer, row, start, keys[own])
            self.check(layer, row, start, queries[own], ids[own], scores[own])
        return ids

    def check(
        self, layer: int, row: int, start: int, queries: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor
    ) -> None:
        """Holds a row's answer, raw scores included, against the reference over the row's pages."""
        keys = self._keys[layer, self.tables[row]].flatten(0, 1)
        expected = reference.select(keys, queries, start, SPEC)
        assert reference.count_flips(ids, expected.block_ids, expected) == 0
        best = expected.block_scores.gather(2, ids.long().clamp(min=0)).masked_fill(ids < 0, -torch.inf)
        torch.testing.assert_close(scores, best.float(), rtol=1e-4, atol=1e-3)

    def _some(self, *shape: int) -> torch.Tensor:
        return torch.from_numpy(self._random.standard_normal(shape, np.float32)).bfloat16()

    def _write(self, layer: int, row: int, start: int, keys: torch.Tensor) -> None:
        for position, key in enumerate(keys, start):
            self._keys[layer, self.tables[row][position // BLOCK], position % BLOCK] = key.float()


@pytest.fixture(params=["unary", "stream", "ring"])
def client(server: Serving, request: pytest.FixtureRequest) -> Iterator[blockdex.Client]:
    transport: Literal["unary", "stream", "ring"] = request.param
    with blockdex.Client(server.grpc_address, tenant="reports", transport=transport) as client:
        yield client


@pytest.fixture
def paged(client: blockdex.Client, random: np.random.Generator) -> Iterator[PagedKeys]:
    pool = client.create_pool(next(_pool_ids), num_pages=PAGES, num_rows=ROWS, max_blocks=WIDTH)
    yield PagedKeys(pool, random)
    pool.close()


def test_a_recycled_slot_still_holds_the_old_request_s_keys(paged: PagedKeys) -> None:
    """They are greater than the new ones and lie right behind these, in the same page and in pages behind it."""
    paged.set_table(0, [5, 6, 7])
    paged.step([0], [0], [3 * BLOCK], size=100)
    paged.step([0], [0], [40])
    paged.step([0], [40], [1])
    paged.set_table(1, [6])
    paged.step([1], [0], [1])


def test_rejected_drafts_do_not_feed_later_steps(paged: PagedKeys) -> None:
    """Two of five are rejected, at the end of a block: they are greater than all that comes later."""
    paged.set_table(0, [3, 1, 2])
    paged.step([0], [0], [BLOCK - 3])
    paged.step([0], [BLOCK - 3], [1 + 4], size=100)
    for position in range(BLOCK - 2, BLOCK + 3):
        paged.step([0], [position], [1])


def test_a_row_in_the_middle_is_dropped_between_steps(paged: PagedKeys) -> None:
    """Its neighbours go on; then the last row's request moves into the gap, as engines do that keep rows dense."""
    for row in range(3):
        paged.set_table(row, [10 * row + block for block in range(3)])
    paged.step([0, 1, 2], [0, 0, 0], [300, 200, 260])
    paged.step([0, 2], [300, 260], [1, 1])
    paged.set_table(1, paged.tables[2])
    paged.step([0, 1], [301, 261], [1, 1])


def test_a_batch_shrinks_from_64_to_3(paged: PagedKeys) -> None:
    """The three have other rows, positions and tables than whoever stood first in the batch before."""
    for row in range(64):
        paged.set_table(row, [row])
    paged.step(range(64), [0] * 64, [1] * 64)
    for row, pages, length in ((61, [1, 61], BLOCK), (7, [2], 5), (30, [30], 1)):
        paged.set_table(row, pages)
        paged.fill(row, 0, length)
    paged.step([61, 7, 30], [BLOCK, 5, 1], [1, 1, 1])


def test_layers_are_those_with_an_indexer_and_drafts_layers_besides(paged: PagedKeys) -> None:
    """Each layer's keys are its own; the first number that is refused is that of the layers."""
    paged.set_table(0, [0, 1])
    for layer in range(SPEC.num_layers):
        paged.step([0], [0], [BLOCK + 1], layer=layer, size=1 + layer)
    for layer in reversed(range(SPEC.num_layers)):
        paged.step([0], [BLOCK + 1], [1], layer=layer)
    with pytest.raises(blockdex.InvalidArgumentError, match="layer: 3, there are 3"):
        paged.step([0], [BLOCK + 2], [1], layer=3)


def test_minus_one_is_no_block_and_no_page(paged: PagedKeys) -> None:
    """As an index it would be the last: unused places select nothing, and a padded block table is refused whole."""
    paged.set_table(0, [4, 5])
    ids = paged.step([0], [0], [BLOCK + 1])
    assert (ids[:BLOCK, :, 0] == 0).all()
    assert (ids[:BLOCK, :, 1:] == -1).all()
    read = selected_tokens(ids.transpose(0, 1).long(), num_blocks=4, block_size=BLOCK)
    assert (read.sum(-1) == BLOCK * torch.tensor([1] * BLOCK + [2])).all()

    with pytest.raises(blockdex.InvalidArgumentError, match="-1"):
        paged.pool.set_page_tables(0, [6, -1])
    paged.step([0], [BLOCK + 1], [1])


def test_queries_that_lie_head_by_head_are_not_read_token_by_token(paged: PagedKeys) -> None:
    """With as many tokens as heads no shape tells them apart: what counts is the tensor's strides."""
    paged.set_table(0, list(range(WIDTH)))
    paged.fill(0, 0, WIDTH * BLOCK)
    by_head = torch.randn(HEADS, HEADS, DIM, generator=torch.manual_seed(1)).bfloat16()
    start = WIDTH * BLOCK - HEADS
    answers = []
    for queries in (by_head.transpose(0, 1), by_head):
        ids, scores = paged.pool.select_blocks(
            0, rows=[0], starts=[start], lengths=[HEADS], queries=queries, return_scores="raw"
        )
        paged.check(0, 0, start, queries, ids, scores)
        answers.append(ids)
    assert not torch.equal(*answers)
