"""The candidates of several servers merged in the total order of a selection."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from blockdex.contract.messages import Order
from blockdex_kernels import IndexSpec


def merge(
    block_ids: NDArray[np.int32],
    scores: NDArray[np.float32],
    positions: NDArray[np.int64],
    spec: IndexSpec,
    order: Order = "ascending",
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The selection of the whole sequence.

    Args:
        block_ids: `[K, T, H, topk]`, ids in the whole sequence that each of K servers answered; -1 in unused places. A
            block that the query does not see, padding say, is dropped.
        scores: of that shape, raw.
        positions: `[T]`, of the queries in the whole sequence.
        spec: the indexer.
        order: of a row of the answer.

    Returns:
        Block ids and raw scores, both `[T, H, topk]`.
    """
    ids = np.concatenate(list(block_ids), axis=-1)
    raw = np.concatenate(list(scores), axis=-1) + np.float32(0)  # -0 equals +0
    last = (positions // spec.block_size)[:, None, None]
    seen = (ids >= 0) & (ids <= last)
    # Forced blocks first: init blocks, then local ones, each by rising id; then by falling score, then by rising id.
    rank = np.where(ids < spec.init_blocks, 0, np.where(ids > last - spec.local_blocks, 1, 2))
    rank = np.where(seen, rank, 3)
    falling = np.where(rank == 2, -np.where(np.isnan(raw), -np.inf, raw), 0)
    chosen = np.lexsort((ids, falling, rank), axis=-1)[..., : spec.topk]
    kept = np.take_along_axis(seen, chosen, -1)
    ids = np.where(kept, np.take_along_axis(ids, chosen, -1), -1).astype(np.int32)
    raw = np.where(kept, np.take_along_axis(raw, chosen, -1), -np.inf).astype(np.float32)
    if order == "ascending":
        rising = np.argsort(np.where(ids < 0, np.iinfo(np.int32).max, ids), axis=-1, kind="stable")
        ids, raw = np.take_along_axis(ids, rising, -1), np.take_along_axis(raw, rising, -1)
    return ids, raw
