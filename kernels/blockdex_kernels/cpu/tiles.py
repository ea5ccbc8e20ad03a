"""How a selection is cut into pieces of bounded memory on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from blockdex_kernels.spec import IndexSpec
from blockdex_kernels.validate import Run

CHUNK_BYTES = 8 << 20
"""Keys and products of one matrix product: what stays in a shared cache of a core or two."""
MAX_SLICE_ROWS = 2048
"""Rows that share one read of the keys; more gain nothing, the product is bound by arithmetic long before."""
MAX_BATCH_ROWS = 8192
MAX_RANKED = 1 << 19
"""(row, block) pairs ranked at once."""
ROW_QUANTUM = 4
"""Slices are filled up to a multiple of so many rows: the BLAS sums products of fewer rows in another order, and then a
row's answer would depend on the other heads asked for. On some processors it still does, where more rows than these are
summed in another order again; but never on other slices."""


class Slice(NamedTuple):
    """Consecutive rows of a run, which share one read of its keys; a row is a (query, head).

    Attributes:
        num_rows: its rows.
        num_blocks: blocks to score, from `init_blocks` on: those that a row can select and is not forced to.
        run: the run.
        first_row: its first row inside the run.
        packed_row: the same inside the packed queries.
    """

    num_rows: int
    num_blocks: int
    run: int
    first_row: int
    packed_row: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Slices with equally many rows, selected together; G = slices, M = rows, filled up to the quantum.

    Attributes:
        slices: the slices.
        rows: int64 `[G, M]`, row of the packed queries; a slice's last one is repeated to fill up.
        positions: int64 `[G, M]`, position of each row's query.
    """

    slices: list[Slice]
    rows: NDArray[np.int64]
    positions: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Segment:
    """Blocks of the slices of a batch that are ranked at once, and the (slice, block) pairs to score; N = pairs.

    Attributes:
        block_ids: int64 `[W]`, consecutive.
        owners: int64 `[N]`, the slice of each pair, rising.
        blocks: int64 `[N]`, the block id of each pair, rising within a slice.
        cells: int64 `[N]`, where the keys are: page times layers plus layer.
    """

    block_ids: NDArray[np.int64]
    owners: NDArray[np.int64]
    blocks: NDArray[np.int64]
    cells: NDArray[np.int64]


def max_slice_rows(spec: IndexSpec) -> int:
    """Rows of a slice such that its products with one block, and two times its answers, keep the bounds."""
    rows = (CHUNK_BYTES - _keys_bytes(spec)) // _row_bytes(spec)
    rows = min(rows, MAX_SLICE_ROWS, MAX_RANKED // (2 * spec.topk))
    return max(rows // ROW_QUANTUM, 1) * ROW_QUANTUM


def blocks_per_chunk(spec: IndexSpec, num_rows: int) -> int:
    """Blocks whose keys, products and gathered queries keep `CHUNK_BYTES`."""
    return max(1, CHUNK_BYTES // (_keys_bytes(spec) + num_rows * _row_bytes(spec)))


def _keys_bytes(spec: IndexSpec) -> int:
    """Keys of a block, as stored and in fp32."""
    return 6 * spec.block_size * spec.head_dim


def _row_bytes(spec: IndexSpec) -> int:
    """A row's products with a block, and the row itself, in fp32."""
    return 4 * (spec.block_size + spec.head_dim)


def cut(runs: list[Run], spec: IndexSpec, num_heads: int) -> Iterator[Batch]:
    """Cuts the runs into slices and yields those of equal size together, all rows exactly once."""
    max_rows = max_slice_rows(spec)
    forced = spec.init_blocks + spec.local_blocks
    slices = []
    packed_row = 0
    for index, run in enumerate(runs):
        run_rows = run.length * num_heads
        for first in range(0, run_rows, max_rows):
            num_rows = min(run_rows - first, max_rows)
            last_block = (run.start + (first + num_rows - 1) // num_heads) // spec.block_size
            num_blocks = max(last_block + 1 - forced, 0) if forced < spec.topk else 0
            slices.append(Slice(num_rows, num_blocks, index, first, packed_row + first))
        packed_row += run_rows
    for group in _groups(sorted(slices), spec.topk):
        num_rows = group[0].num_rows
        inside = np.minimum(np.arange(_filled_up(num_rows)), num_rows - 1)
        columns = np.array([(piece.packed_row, piece.first_row, runs[piece.run].start) for piece in group])
        packed, first_row, start = columns.T[:, :, None]
        yield Batch(group, rows=packed + inside, positions=start + (first_row + inside) // num_heads)


def _filled_up(num_rows: int) -> int:
    return -(-num_rows // ROW_QUANTUM) * ROW_QUANTUM


def _groups(slices: list[Slice], topk: int) -> Iterator[list[Slice]]:
    """Neighbours that have equally many rows, as many as can be ranked at once."""
    group: list[Slice] = []
    for piece in slices:
        rows = (len(group) + 1) * _filled_up(piece.num_rows)
        full = rows > MAX_BATCH_ROWS or rows * (piece.num_blocks + topk) > MAX_RANKED
        if group and (full or piece.num_rows != group[0].num_rows):
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def segments(
    batch: Batch, runs: list[Run], page_table: NDArray[np.int32], spec: IndexSpec, *, unscored: int
) -> Iterator[Segment]:
    """The blocks of a batch in ranges that can be ranked at once.

    Args:
        batch: the slices.
        runs: all runs.
        page_table: theirs.
        spec: the indexer.
        unscored: slices of at most so many blocks have nothing scored.
    """
    num_blocks = [piece.num_blocks for piece in batch.slices]
    step = max(1, MAX_RANKED // batch.rows.size - spec.topk)
    for begin in range(0, max(num_blocks), step):
        end = min(begin + step, max(num_blocks))
        counts = [max(min(count, end) - begin, 0) if count > unscored else 0 for count in num_blocks]
        owners = np.repeat(np.arange(len(counts)), counts)
        first = spec.init_blocks + begin
        block_ids = np.arange(first, spec.init_blocks + end)
        cells = [
            page_table[piece.run, first : first + count].astype(np.int64) * spec.num_layers + runs[piece.run].layer
            for piece, count in zip(batch.slices, counts, strict=True)
        ]
        blocks = np.concatenate([block_ids[:count] for count in counts])
        yield Segment(block_ids, owners, blocks, np.concatenate(cells))
