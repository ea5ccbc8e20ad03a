"""The total order of blocks as integers, and the rows that callers get."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from blockdex_kernels.backend import Order
from blockdex_kernels.spec import IndexSpec

EMPTY = np.iinfo(np.int64).min
"""A candidate that ranks below every block: its block id is `NONE`."""

_LOW = 0xFFFFFFFF
NONE = _LOW
"""No block: -1 once it is cast to int32, and behind every block when sorted before that."""


def merge(
    best: NDArray[np.int64], scores: NDArray[np.float32], block_ids: NDArray[np.int64], limits: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The best candidates of each row, of those so far and of new blocks.

    A candidate is score and block id as one integer, which rises with the score and, at equal scores, with a falling
    block id: no two are equal, so whatever picks the largest picks the same.

    Args:
        best: int64 `[G, M, K]`, candidates so far, K at least 1.
        scores: float32 `[G, W, M]`, no NaN; -0 ranks as +0.
        block_ids: int64 `[W]`, rising.
        limits: int64 `[G, M]`; a row is not offered blocks from its limit on.

    Returns:
        int64 `[G, M, K]`, in no order.
    """
    places = best.shape[-1]
    candidates = np.empty((*limits.shape, places + len(block_ids)), np.int64)
    candidates[..., :places] = best
    fresh = candidates[..., places:]
    fresh[...] = _ordered((scores + np.float32(0.0)).view(np.int32)).swapaxes(1, 2)
    fresh <<= 32
    fresh |= _LOW - block_ids
    if limits.min() <= block_ids[-1]:
        np.copyto(fresh, EMPTY, where=block_ids >= limits[..., None])
    candidates.partition(len(block_ids), axis=-1)
    return candidates[..., len(block_ids) :]


def arrange(
    best: NDArray[np.int64], last_blocks: NDArray[np.int64], spec: IndexSpec, order: Order, *, return_scores: bool
) -> tuple[NDArray[np.int64], NDArray[np.float32] | None]:
    """The forced blocks of each row and its candidates in the order asked for, and `NONE` at the end.

    Args:
        best: int64 `[rows, topk - init_blocks - local_blocks]`, candidates in any order; gets sorted.
        last_blocks: int64 `[rows, 1]`, the last block that each row sees.
        spec: the indexer.
        order: of the answer.
        return_scores: whether scores are wanted.

    Returns:
        int64 block ids `[rows, topk]`, and float32 unscaled scores of that shape or None; +inf for forced blocks, -inf
        beside `NONE`.
    """
    block_ids = np.empty((len(best), spec.topk), np.int64)
    forced = spec.init_blocks + spec.local_blocks
    init = np.arange(spec.init_blocks)
    block_ids[:, : spec.init_blocks] = np.where(init > last_blocks, NONE, init)
    local = last_blocks + np.arange(1 - spec.local_blocks, 1)
    block_ids[:, spec.init_blocks : forced] = np.where(local < spec.init_blocks, NONE, local)
    if order == "ascending" and not return_scores:
        block_ids[:, forced:] = _LOW - (best & _LOW)
        block_ids.sort(axis=1)
        return block_ids, None
    best.sort(axis=1)
    ranked = best[:, ::-1]
    block_ids[:, forced:] = _LOW - (ranked & _LOW)
    scores = np.full(block_ids.shape, np.inf, np.float32)
    scores[:, forced:] = _ordered((ranked >> 32).astype(np.int32)).view(np.float32)
    scores[block_ids == NONE] = -np.inf
    keys = block_ids if order == "ascending" else np.where(block_ids == NONE, NONE, np.arange(spec.topk))
    places = keys.argsort(axis=1)
    return np.take_along_axis(block_ids, places, axis=1), np.take_along_axis(scores, places, axis=1)


def _ordered(bits: NDArray[np.int32]) -> NDArray[np.int32]:
    """Bits of float32 as integers that compare as the floats do; its own inverse."""
    return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
