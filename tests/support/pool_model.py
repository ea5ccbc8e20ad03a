"""What a pool holds, told from what was sent to it; and whether answers are those of the float64 reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from blockdex_kernels import IndexSpec
from blockdex_kernels.reference import count_flips
from support import vectorised_reference
from support.kernel_cases import TALLY


class PoolModel:
    """Pages by the pool's numbers, `[num_pages, L, block_size, D]`, and cells, -1 where none was set."""

    def __init__(self, spec: IndexSpec, num_pages: int, num_rows: int, max_blocks: int) -> None:
        self.spec = spec
        self.pages: NDArray[np.float32] = np.zeros(
            (num_pages, spec.num_layers, spec.block_size, spec.head_dim), np.float32
        )
        self.cells: NDArray[np.int64] = np.full((num_rows, max_blocks), -1)

    def set_cells(self, row: int, first_block: int, page_ids: Any) -> None:
        """One run of cells."""
        self.cells[row, first_block : first_block + len(page_ids)] = page_ids

    def has_pages(self, row: int, start: int, length: int) -> bool:
        """Whether every block of such positions has a page."""
        size = self.spec.block_size
        return bool((self.cells[row, start // size : -(-(start + length) // size)] >= 0).all())

    def append(self, layer: int, row: int, start: int, keys: NDArray[Any]) -> None:
        """Keys `[length, D]` go where the cells say."""
        blocks, slots = np.divmod(np.arange(start, start + len(keys)), self.spec.block_size)
        self.pages[self.cells[row, blocks], layer, slots] = keys.astype(np.float32)

    def keys(self, layer: int, row: int, end: int) -> NDArray[np.float32]:
        """`[end, D]`, as a row reads them."""
        blocks = math.ceil(end / self.spec.block_size)
        read: NDArray[np.float32] = self.pages[self.cells[row, :blocks], layer].reshape(-1, self.spec.head_dim)[:end]
        return read

    def check(self, layer: int, row: int, start: int, queries: NDArray[Any], ids: Any, *, pages: bool = False) -> None:
        """Holds an answer `[T, H, topk]` to the reference; with `pages` it holds page numbers, no two rows' alike."""
        sent = torch.from_numpy(np.ascontiguousarray(queries.astype(np.float32)))
        keys = torch.from_numpy(self.keys(layer, row, start + len(queries)))
        expected = vectorised_reference.select(keys, sent, start, self.spec)
        got = np.array(ids, np.int64)
        if pages:
            # What lies behind the last query's block may be left over from another request.
            read = self.cells[row, : math.ceil((start + len(queries)) / self.spec.block_size)]
            blocks = {int(page): block for block, page in enumerate(read)}
            assert len(blocks) == len(read), "a row with a page in two cells has no inverse"
            got = np.vectorize(lambda page: blocks[page] if page >= 0 else -1)(got)
        flips = count_flips(torch.from_numpy(got), expected.block_ids, expected)
        TALLY.flips += flips
        TALLY.rows += expected.block_ids.shape[0] * expected.block_ids.shape[1]
