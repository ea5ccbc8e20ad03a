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
from support import vectorised_reference
from support.pool_model import PoolModel
from support.serving import Serving

SPEC = IndexSpec(num_layers=3)
BLOCK, TOPK, HEADS, DIM = SPEC.block_size, SPEC.topk, SPEC.num_index_heads, SPEC.head_dim
PAGES, ROWS, WIDTH = 64, 64, 20

_pool_ids = count(1)


class Twin:
    """A pool, and what it should hold: keys in bf16, so that scores are the reference's too."""

    def __init__(self, pool: blockdex.Pool, random: np.random.Generator) -> None:
        self.pool = pool
        self._model = PoolModel(SPEC, PAGES, ROWS, WIDTH)
        self._random = random

    def set_table(self, row: int, pages: list[int]) -> None:
        """The row's block table from now on, cells behind it left as they are."""
        self.pool.set_page_tables(row, pages)
        self._model.set_cells(row, 0, pages)

    def fill(self, row: int, start: int, length: int) -> None:
        """Appends keys."""
        keys = self._some(length, DIM)
        self.pool.append_keys(0, rows=row, starts=start, keys=keys)
        self._model.append(0, row, start, keys.float().numpy())

    def step(
        self, rows: Sequence[int], starts: Sequence[int], lengths: Sequence[int], *, layer: int = 0, size: float = 1.0
    ) -> torch.Tensor:
        """Appends keys of some size and selects for as many queries; returns the ids, which are right."""
        tokens = sum(lengths)
        keys, queries = size * self._some(tokens, DIM), self._some(tokens, HEADS, DIM)
        ids, scores = self.pool.append_and_select(
            layer, rows=rows, starts=starts, lengths=lengths, keys=keys, queries=queries, return_scores="raw"
        )
        first = 0
        for row, start, length in zip(rows, starts, lengths, strict=True):
            own = slice(first, first + length)
            self._model.append(layer, row, start, keys[own].float().numpy())
            self.check(layer, row, start, queries[own], ids[own], scores[own])
            first += length
        return ids

    def check(
        self, layer: int, row: int, start: int, queries: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor
    ) -> None:
        """Holds a row's answer to the reference: its blocks, and raw scores, which tell of every key that was read."""
        keys = torch.from_numpy(self._model.keys(layer, row, start + len(queries)))
        expected = vectorised_reference.select(keys, queries, start, SPEC)
        assert reference.count_flips(ids, expected.block_ids, expected) == 0
        best = expected.block_scores.gather(2, ids.long().clamp(min=0)).masked_fill(ids < 0, -torch.inf)
        torch.testing.assert_close(scores, best.float(), rtol=1e-4, atol=1e-3)

    def _some(self, *shape: int) -> torch.Tensor:
        return torch.from_numpy(self._random.standard_normal(shape, np.float32)).bfloat16()


@pytest.fixture(params=["unary", "stream", "ring"])
def client(server: Serving, request: pytest.FixtureRequest) -> Iterator[blockdex.Client]:
    transport: Literal["unary", "stream", "ring"] = request.param
    with blockdex.Client(server.grpc_address, tenant="reports", transport=transport) as client:
        yield client


@pytest.fixture
def twin(client: blockdex.Client, random: np.random.Generator) -> Iterator[Twin]:
    pool = client.create_pool(next(_pool_ids), num_pages=PAGES, num_rows=ROWS, max_blocks=WIDTH)
    yield Twin(pool, random)
    pool.close()


def test_a_recycled_slot_still_holds_the_old_request_s_keys(twin: Twin) -> None:
    """They are greater than the new ones and lie right behind these, in the same page and in pages behind it."""
    twin.set_table(0, [5, 6, 7])
    twin.step([0], [0], [3 * BLOCK], size=100)
    twin.step([0], [0], [40])
    twin.step([0], [40], [1])
    twin.set_table(1, [6])
    twin.step([1], [0], [1])


def test_rejected_drafts_do_not_feed_later_steps(twin: Twin) -> None:
    """Two of five are rejected, at the end of a block: they are greater than all that comes later."""
    twin.set_table(0, [3, 1, 2])
    twin.step([0], [0], [BLOCK - 3])
    twin.step([0], [BLOCK - 3], [1 + 4], size=100)
    for position in range(BLOCK - 2, BLOCK + 3):
        twin.step([0], [position], [1])


def test_a_row_in_the_middle_is_dropped_between_steps(twin: Twin) -> None:
    """Its neighbours go on; then the last row's request moves into the gap, as engines do that keep rows dense."""
    for row in range(3):
        twin.set_table(row, [10 * row + block for block in range(3)])
    twin.step([0, 1, 2], [0, 0, 0], [300, 200, 260])
    twin.step([0, 2], [300, 260], [1, 1])
    twin.set_table(1, [20, 21, 22])
    twin.step([0, 1], [301, 261], [1, 1])


def test_a_batch_shrinks_from_64_to_3(twin: Twin) -> None:
    """The three have other rows, positions and tables than whoever stood first in the batch before."""
    for row in range(64):
        twin.set_table(row, [row])
    twin.step(range(64), [0] * 64, [1] * 64)
    for row, pages, length in ((61, [1, 61], BLOCK), (7, [2], 5), (30, [30], 1)):
        twin.set_table(row, pages)
        twin.fill(row, 0, length)
    twin.step([61, 7, 30], [BLOCK, 5, 1], [1, 1, 1])


def test_layers_are_those_with_an_indexer_and_drafts_layers_besides(twin: Twin) -> None:
    """Each layer's keys are its own; the first number that is refused is that of the layers."""
    twin.set_table(0, [0, 1])
    for layer in range(SPEC.num_layers):
        twin.step([0], [0], [BLOCK + 1], layer=layer, size=1 + layer)
    for layer in reversed(range(SPEC.num_layers)):
        twin.step([0], [BLOCK + 1], [1], layer=layer)
    with pytest.raises(blockdex.InvalidArgumentError, match="layer must be below 3, got 3"):
        twin.step([0], [BLOCK + 2], [1], layer=SPEC.num_layers)


def test_minus_one_is_no_block_and_no_page(twin: Twin) -> None:
    """As an index it would be the last: unused places select nothing, and a padded block table is refused whole."""
    twin.set_table(0, [4, 5])
    ids = twin.step([0], [0], [BLOCK + 1])
    assert (ids[:BLOCK, :, 0] == 0).all()
    assert (ids[:BLOCK, :, 1:] == -1).all()
    read = selected_tokens(ids.transpose(0, 1).long(), num_blocks=4, block_size=BLOCK)
    assert (read.sum(-1) == BLOCK * torch.tensor([1] * BLOCK + [2])).all()

    with pytest.raises(blockdex.InvalidArgumentError, match="-1"):
        twin.pool.set_page_tables(0, [6, -1])
    twin.step([0], [BLOCK + 1], [1])


def test_queries_that_lie_head_by_head_are_not_read_token_by_token(twin: Twin) -> None:
    """With as many tokens as heads no shape tells them apart: what counts is the tensor's strides."""
    twin.set_table(0, list(range(WIDTH)))
    twin.fill(0, 0, WIDTH * BLOCK)
    by_head = torch.randn(HEADS, HEADS, DIM, generator=torch.manual_seed(1)).bfloat16()
    start = WIDTH * BLOCK - HEADS
    answers = []
    for queries in (by_head.transpose(0, 1), by_head):
        ids, scores = twin.pool.select_blocks(
            0, rows=[0], starts=[start], lengths=[HEADS], queries=queries, return_scores="raw"
        )
        twin.check(0, 0, start, queries, ids, scores)
        answers.append(ids)
    assert not torch.equal(*answers)
