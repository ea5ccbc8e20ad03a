"""The total order of blocks as integers, and the rows that callers get."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from blockdex_kernels.interface import Order
from blockdex_kernels.spec import IndexSpec

EMPTY = np.iinfo(np.int64).min
"""A candidate that ranks below every block: its block id is `NONE`."""

_LOW = 0xFFFFFFFF
NONE = _LOW
"""No block: -1 once it is cast to int32, and behind every block when sorted before that."""


def merge(
    best: NDArray[np.int64],
    scores: NDArray[np.float32],
    block_ids: NDArray[np.int64],
    limits: NDArray[np.int64],
    places: int,
) -> NDArray[np.int64]:
    """The best candidates of each row, of those so far and of new blocks.

    A candidate is score and block id as one integer, which rises with the score and, at equal scores, with a falling
    block id: no two are equal, so whatever picks the largest picks the same.

    Args:
        best: int64 `[G, M, any]`, candidates so far.
        scores: float32 `[G, W, M]`, no NaN; -0 ranks as +0.
        block_ids: int64 `[W]`, rising.
        limits: int64 `[G, M]`; a row is not offered blocks from its limit on.
        places: how many to keep.

    Returns:
        int64 `[G, M, at most places]`, in no order; `EMPTY` for a block that the row was not offered.
    """
    candidates = _ordered((scores + np.float32(0.0)).view(np.int32)).swapaxes(1, 2).astype(np.int64, order="C")
    candidates <<= 32
    candidates |= _LOW - block_ids
    if limits.min() <= block_ids[-1]:
        np.copyto(candidates, EMPTY, where=block_ids >= limits[..., None])
    if best.size:
        candidates = np.concatenate((best, candidates), axis=-1)
    surplus = candidates.shape[-1] - places
    if surplus <= 0:
        return candidates
    candidates.partition(surplus, axis=-1)
    return candidates[..., surplus:]


def arrange(
    best: NDArray[np.int64], last_blocks: NDArray[np.int64], spec: IndexSpec, order: Order, *, return_scores: bool
) -> tuple[NDArray[np.int64], NDArray[np.float32] | None]:
    """The forced blocks of each row and its candidates in the order asked for, and `NONE` at the end.

    Args:
        best: int64 `[G, M, at most topk - init_blocks - local_blocks]`, candidates in any order; gets sorted.
        last_blocks: int64 `[G, M]`, the last block that each row sees.
        spec: the indexer.
        order: of the answer.
        return_scores: whether scores are wanted.

    Returns:
        int64 block ids `[G, M, topk]`, and float32 unscaled scores of that shape or None; +inf for forced blocks, -inf
        beside `NONE`.
    """
    block_ids = np.full((*last_blocks.shape, spec.topk), NONE)
    last = last_blocks[..., None]
    if spec.init_blocks:
        init = np.arange(spec.init_blocks)
        block_ids[..., : spec.init_blocks] = np.where(init > last, NONE, init)
    forced = spec.init_blocks + spec.local_blocks
    local = last + np.arange(1 - spec.local_blocks, 1)
    block_ids[..., spec.init_blocks : forced] = np.where(local < spec.init_blocks, NONE, local)
    ranked = slice(forced, forced + best.shape[-1])
    if order == "ascending" and not return_scores:
        block_ids[..., ranked] = _LOW - (best & _LOW)
        block_ids.sort(axis=-1)
        return block_ids, None
    best.sort(axis=-1)
    best = best[..., ::-1]
    block_ids[..., ranked] = _LOW - (best & _LOW)
    scores = np.full(block_ids.shape, np.inf, np.float32)
    scores[..., ranked] = _ordered((best >> 32).astype(np.int32)).view(np.float32)
    scores[block_ids == NONE] = -np.inf
    keys = block_ids if order == "ascending" else np.where(block_ids == NONE, NONE, np.arange(spec.topk))
    sequence = keys.argsort(axis=-1)
    return np.take_along_axis(block_ids, sequence, axis=-1), np.take_along_axis(scores, sequence, axis=-1)


def _ordered(bits: NDArray[np.int32]) -> NDArray[np.int32]:
    """Bits of float32 as integers that compare as the floats do; its own inverse."""
    return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
