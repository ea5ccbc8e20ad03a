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


_Slice = tuple[int, int, int, int, int, int]
"""Rows, blocks to score, run, the run's start, first row inside the run, the run's first row among all."""


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
    slices: list[_Slice] = []
    packed_row = 0
    for run, (start, length) in enumerate(zip(runs.starts.tolist(), runs.lengths.tolist(), strict=True)):
        for first in range(0, length * num_heads, max_rows):
            rows = min(length * num_heads - first, max_rows)
            last_block = (start + (first + rows - 1) // num_heads) // spec.block_size
            blocks = max(last_block + 1 - spec.local_blocks - spec.init_blocks, 0)
            slices.append((rows, blocks, run, start, first, packed_row))
        packed_row += length * num_heads
    for group in _groups(sorted(slices), spec.topk):
        _, num_blocks, run, start, first, packed = np.array(group).T
        rows = group[0][0]
        inside = first[:, None] + np.minimum(np.arange(-(-rows // ROW_QUANTUM) * ROW_QUANTUM), rows - 1)
        yield Tiles(
            runs=run,
            rows=packed[:, None] + inside,
            positions=start[:, None] + inside // num_heads,
            num_blocks=num_blocks,
        )


def _groups(slices: list[_Slice], topk: int) -> Iterator[list[_Slice]]:
    """Neighbours that have equally many rows, as many as can be ranked at once."""
    group: list[_Slice] = []
    for piece in slices:
        rows, blocks = piece[:2]
        all_rows = (len(group) + 1) * rows
        full = all_rows > MAX_BATCH_ROWS or all_rows * (blocks + topk) > MAX_RANKED
        if group and (full or rows != group[0][0]):
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def segments(tiles: Tiles, spec: IndexSpec, *, unscored: int) -> Iterator[tuple[NDArray[np.int64], Items]]:
    """The block ids of the slices in ranges that can be ranked at once, with the pairs to score in each.

    Args:
        tiles: the slices.
        spec: the indexer.
        unscored: slices of at most so many blocks have nothing scored.
    """
    num_blocks = int(tiles.num_blocks.max())
    scored = tiles.num_blocks * (tiles.num_blocks > unscored)
    step = max(1, MAX_RANKED // tiles.rows.size - spec.topk)
    for begin in range(0, num_blocks, step):
        block_ids = np.arange(begin, min(begin + step, num_blocks))
        places = np.flatnonzero(block_ids < scored[:, None])
        owners, inside = np.divmod(places, len(block_ids))
        block_ids += spec.init_blocks
        yield block_ids, Items(tiles=owners, blocks=block_ids[inside], places=places)
