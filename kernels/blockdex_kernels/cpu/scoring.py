"""Scores of blocks on the CPU: pages to fp32, one batched product and its maxima, a chunk at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from blockdex_kernels.cpu.tiles import CHUNK_BYTES, ROW_QUANTUM, Batch, Segment, blocks_per_chunk, max_slice_rows
from blockdex_kernels.spec import IndexSpec

# From so many rows on a product is made by `_convolve`.
_CONVOLVED_ROWS = 16
# What the bits of an e4m3 number, shifted into a float16's places, have to be multiplied by.
_FP8_UNIT = np.float32(2.0**8)


class BlockScorer:
    """Scores blocks of one cache. Its buffers live as long as it does: fresh memory costs more than the product.

    Args:
        cells: the cache, `[pages * layers, block_size * D]`, bfloat16, or uint8 where it is fp8.
        spec: the indexer.
    """

    def __init__(self, cells: torch.Tensor, spec: IndexSpec) -> None:
        chunk = blocks_per_chunk(spec, ROW_QUANTUM)
        self._spec = spec
        self._cells = cells
        self._fp8 = cells.dtype == torch.uint8
        self._stored = torch.empty(chunk, cells.shape[1], dtype=cells.dtype)
        self._widened = torch.empty(chunk if self._fp8 else 0, cells.shape[1], dtype=torch.int16)
        self._keys = torch.empty(chunk, spec.block_size, spec.head_dim)
        self._products = torch.empty(max(CHUNK_BYTES // 4, max_slice_rows(spec) * spec.block_size))

    def maxima(self, queries: torch.Tensor, batch: Batch, segment: Segment) -> NDArray[np.float32]:
        """The greatest product of each row with the keys of each block; a NaN product counts as -inf.

        A block that a row sees in part is right for the row only where `local_blocks` is 0; elsewhere the row is
        forced to take the block, or does not see it at all, and keys beyond the row's position need no mask.

        Args:
            queries: float32 `[G, M, D]`.
            batch: their slices.
            segment: the blocks.

        Returns:
            float32 `[G, W, M]`, 0 for pairs that are not in the segment.
        """
        num_slices, num_rows, _ = queries.shape
        cells = torch.from_numpy(segment.cells)
        maxima = np.empty((len(cells), num_rows), np.float32)
        for part in _chunks(segment.owners, blocks_per_chunk(self._spec, num_rows), apart=num_rows >= _CONVOLVED_ROWS):
            keys = self._read(cells[part])
            owners = segment.owners[part]
            if owners[0] != owners[-1]:
                products = self._multiply(queries[torch.from_numpy(owners)], keys)
            elif num_rows < _CONVOLVED_ROWS:
                products = self._multiply(queries[owners[0]].expand(len(keys), -1, -1), keys)
            else:
                products = _convolve(queries[owners[0]], keys)
            if not self._spec.local_blocks:
                _hide_later_keys(products, segment.blocks[part], batch.positions[owners])
            maxima[part] = _amax(products).numpy()
        if self._fp8:
            maxima *= _FP8_UNIT
        width = len(segment.block_ids)
        if len(maxima) == num_slices * width:
            return maxima.reshape(num_slices, width, num_rows)
        rectangle = np.zeros((num_slices, width, num_rows), np.float32)
        rectangle[segment.owners, segment.blocks - segment.block_ids[0]] = maxima
        return rectangle

    def _multiply(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """`[N, M, block_size]`, from queries of each block, `[N, M, D]`; good until the next call."""
        shape = (len(keys), queries.shape[1], keys.shape[1])
        return torch.bmm(queries, keys.mT, out=self._products[: math.prod(shape)].view(shape))

    def _read(self, cell_ids: torch.Tensor) -> torch.Tensor:
        """Keys in fp32, `[N, block_size, D]`, in units of `_FP8_UNIT` for an fp8 cache; good until the next call."""
        count = len(cell_ids)
        stored = torch.index_select(self._cells, 0, cell_ids, out=self._stored[:count])
        keys = self._keys[:count]
        rows = keys.view(count, -1)
        if not self._fp8:
            rows.copy_(stored)
            return keys
        # Sign to bit 15, exponent and mantissa to bits 7 to 13: several times faster than torch's own cast.
        bits = self._widened[:count].copy_(stored.view(torch.int8)).mul_(128).bitwise_and_(-0x4080)
        rows.copy_(bits.view(torch.float16))
        if stored.amax() == 0xFF or stored.view(torch.int8).amax() == 0x7F:
            rows.masked_fill_(stored.view(torch.float8_e4m3fn).isnan(), math.nan)
        return keys


def _chunks(owners: NDArray[np.int64], chunk: int, *, apart: bool) -> Iterator[slice]:
    """Pairs to score at once, so many at most; where slices are to be kept apart, of one slice each."""
    edges = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist(), len(owners)] if apart else [0, len(owners)]
    for first, last in pairwise(edges):
        for begin in range(first, last, chunk):
            yield slice(begin, min(begin + chunk, last))


def _convolve(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """`[N, M, block_size]` from one set of queries, `[M, D]`.

    The keys as an image of N x block_size pixels with D channels, the queries as filters of one pixel: the same
    product, but made by oneDNN, which can be twice as fast as the BLAS behind `bmm` (`benchmarks/NOTES.md`).
    """
    image = keys[None].permute(0, 3, 1, 2)  # In the strides of channels-last memory, which oneDNN takes as it is.
    return functional.conv2d(image, queries[:, :, None, None])[0].transpose(0, 1)


def _hide_later_keys(products: torch.Tensor, blocks: NDArray[np.int64], positions: NDArray[np.int64]) -> None:
    """Sets the products `[N, M, block_size]` with keys behind a row's position (`[N, M]`) to -inf."""
    block_size = products.shape[2]
    partial = np.flatnonzero((blocks + 1) * block_size > positions[:, 0] + 1)
    if not len(partial):
        return
    key_positions = blocks[partial, None] * block_size + np.arange(block_size)
    hidden = key_positions[:, None, :] > positions[partial, :, None]
    index = torch.from_numpy(partial)
    products[index] = products[index].masked_fill_(torch.from_numpy(hidden), -math.inf)


def _amax(products: torch.Tensor) -> torch.Tensor:
    """The greatest product of each row, NaN counting as -inf; `products` may be overwritten."""
    maxima = products.amax(dim=-1)
    if not math.isnan(maxima.amax()):
        return maxima
    return products.masked_fill_(products.isnan(), -math.inf).amax(dim=-1)
