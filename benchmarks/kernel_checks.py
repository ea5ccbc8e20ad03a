"""That what is timed is a selection: a sample of each answer held against the reference in float64."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.kernel_inputs import Batch
from benchmarks.kernel_shapes import BLOCK_SIZE
from benchmarks.kernel_versions import Version
from blockdex_kernels.reference import FLIP_TOLERANCE, SelectionMismatchError, count_flips, select

_ROWS = 4
_MOST_APART = 0.01


def flips(version: Version, block_ids: torch.Tensor, batch: Batch) -> int:
    """Blocks that rounding exchanged in the last queries of the last sequence, of all their heads.

    Raises:
        SelectionMismatchError: they differ from the reference by more than rounding.
    """
    end = int(batch.ends[-1])
    rows = min(_ROWS, int(batch.spans.lengths[-1]))
    page_ids = batch.spans.page_table[-1, : -(-end // BLOCK_SIZE)].long()
    # Not every torch build indexes fp8.
    keys = version.pages.view(torch.uint8)[page_ids].view(version.pages.dtype).flatten(0, 1)[:end]
    queries = batch.queries[-rows:].cpu()
    reference = select(keys.cpu(), queries, end - rows, version.spec, fp8_scoring=version.fp8_scoring)
    tolerance = reference.tolerance * (version.flip_tolerance / FLIP_TOLERANCE)
    return count_flips(block_ids[-rows:].cpu(), reference.block_ids, replace(reference, tolerance=tolerance))


def rows_apart(ours: torch.Tensor, theirs: torch.Tensor) -> int:
    """Rows of two selections `[T, H, topk]` that hold different blocks, in whichever order.

    Raises:
        SelectionMismatchError: they are more than rounding leaves.
    """
    different = (ours.sort(dim=2).values != theirs.sort(dim=2).values).any(dim=2)
    apart, rows = int(different.sum()), different.numel()
    if apart > max(rows * _MOST_APART, 1):
        raise SelectionMismatchError(f"{apart} of {rows} rows select other blocks than the peer's")
    return apart
