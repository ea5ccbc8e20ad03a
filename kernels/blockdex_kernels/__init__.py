"""Tensors in, tensors out: the indexer of block-sparse attention, knowing no sequence and no RPC.

`IndexSpec` is here and needs no torch. What computes lives one module down: `backend` (the entry and the choice of
kernels), `cpu`, and `reference` (the float64 oracle).
"""

from blockdex_kernels.spec import IndexSpec, SpecError

__all__ = ["IndexSpec", "SpecError"]
