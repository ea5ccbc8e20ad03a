"""How a selection is cut into pieces of bounded memory on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blockdex_kernels.door import Runs
from blockdex_kernels.spec import IndexSpec

CHUNK_BYTES = 8 << 20
"""Keys and products of one matrix product: what stays in a shared cache of a core or two."""
MAX_TILE_ROWS = 2048
"""Rows that share one read of the keys; more gain nothing, the product is bound by arithmetic long before."""
MAX_BATCH_ROWS = 8192
MAX_RANKED = 1 << 19
"""(row, block) pairs ranked at once."""
ROW_QUANTUM = 4
"""Slices are filled up to a multiple of so many rows: products of fewer rows are summed in another order, and a row's
answer would depend on its company."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Slices of runs with equally many rows, selected together; G = slices, M = rows, a row is a (query, head).

    Attributes:
        runs: int64 `[G]`, the run of each slice.
        rows: int64 `[G, M]`, row of the packed queries; the last one repeated up to a multiple of `ROW_QUANTUM`.
        positions: int64 `[G, M]`, position of each row's query.
        num_blocks: int64 `[G]`, blocks to score: those that a row of the slice can select and is not forced to.
    """

    runs: NDArray[np.int64]
    rows: NDArray[np.int64]
    positions: NDArray[np.int64]
    num_blocks: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Items:
    """The (slice, block) pairs of a segment, slice after slice; N = pairs.

    Attributes:
        tiles: int64 `[N]`, the slice.
        blocks: int64 `[N]`, the block id.
        places: int64 `[N]`, where the pair stands in a rectangle of slices and blocks.
    """

    tiles: NDArray[np.int64]
    blocks: NDArray[np.int64]
    places: NDArray[np.int64]


def max_tile_rows(spec: IndexSpec) -> int:
    """Rows of a slice such that its products with one block, and two times its answers, keep the bounds."""
    row_bytes = 4 * (spec.block_size + spec.head_dim)
    page_bytes = 6 * spec.block_size * spec.head_dim
    return max(4, min(MAX_TILE_ROWS, (CHUNK_BYTES - page_bytes) // row_bytes, MAX_RANKED // (2 * spec.topk)) // 4 * 4)


def blocks_per_chunk(spec: IndexSpec, num_rows: int) -> int:
    """Blocks whose keys (as stored, widened, in fp32), products and gathered queries keep `CHUNK_BYTES`."""
    page_bytes = 6 * spec.block_size * spec.head_dim
    row_bytes = 4 * (spec.block_size + spec.head_dim)
    return max(1, CHUNK_BYTES // (page_bytes + num_rows * row_bytes))


def cut(runs: Runs, spec: IndexSpec, num_heads: int) -> Iterator[Tiles]:
    """Cuts the runs into slices and yields those of equal size together, all rows exactly once."""
    max_rows = max_tile_rows(spec)
    run_rows = runs.lengths * num_heads
    num_slices = -(-run_rows // max_rows)
    run = np.repeat(np.arange(len(run_rows)), num_slices)
    first = (np.arange(len(run)) - np.repeat(np.cumsum(num_slices) - num_slices, num_slices)) * max_rows
    num_rows = np.minimum(run_rows[run] - first, max_rows)
    last_position = runs.starts[run] + (first + num_rows - 1) // num_heads
    num_blocks = np.maximum(last_position // spec.block_size + 1 - spec.local_blocks - spec.init_blocks, 0)
    order = np.lexsort((num_blocks, num_rows))
    offset = np.cumsum(run_rows) - run_rows
    for group in _groups(order, num_rows, num_blocks + spec.topk):
        last_row = num_rows[group[0]] - 1
        padded = np.arange(last_row // ROW_QUANTUM * ROW_QUANTUM + ROW_QUANTUM)
        inside = first[group, None] + np.minimum(padded, last_row)
        yield Tiles(
            runs=run[group],
            rows=offset[run[group], None] + inside,
            positions=runs.starts[run[group], None] + inside // num_heads,
            num_blocks=num_blocks[group],
        )


def segments(tiles: Tiles, spec: IndexSpec, *, unscored: int) -> Iterator[tuple[NDArray[np.int64], Items]]:
    """The block ids of the slices in ranges that can be ranked at once, with the pairs to score in each.

    Args:
        tiles: the slices.
        spec: the indexer.
        unscored: slices of at most so many blocks have nothing scored.
    """
    num_blocks = int(tiles.num_blocks.max())
    scored = np.where(tiles.num_blocks > unscored, tiles.num_blocks, 0)
    step = max(1, MAX_RANKED // tiles.rows.size - spec.topk)
    for begin in range(0, num_blocks, step):
        end = min(begin + step, num_blocks)
        counts = np.clip(scored, begin, end) - begin
        owners = np.repeat(np.arange(len(counts)), counts)
        inside = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
        first = spec.init_blocks + begin
        items = Items(tiles=owners, blocks=first + inside, places=owners * (end - begin) + inside)
        yield np.arange(first, spec.init_blocks + end), items


def _groups(
    order: NDArray[np.int64], num_rows: NDArray[np.int64], width: NDArray[np.int64]
) -> Iterator[NDArray[np.int64]]:
    """Neighbours in the order that have equally many rows, as many as can be ranked at once."""
    group: list[int] = []
    for index in order.tolist():
        rows = (len(group) + 1) * int(num_rows[index])
        full = rows > MAX_BATCH_ROWS or rows * int(width[index]) > MAX_RANKED
        if group and (full or num_rows[index] != num_rows[group[0]]):
            yield np.array(group)
            group = []
        group.append(index)
    if group:
        yield np.array(group)
