"""Indexers that the Triton kernels are made for."""

from __future__ import annotations

from blockdex_kernels.spec import IndexSpec

HEAD_DIMS = (16, 32, 64, 128, 256)
BLOCK_SIZES = (16, 32, 64, 128)
MAX_BLOCKS = 131_072
"""Of a sequence: what one program ranks."""
MAX_TOPK = 64
"""Places of a row: what they were run with; they are compared with each other, each with each."""
LEAST_FP8_HEAD_DIM = 32
"""Elements that one e4m3 instruction of the tensor cores takes of each row."""


def unfit(spec: IndexSpec) -> str | None:
    """Why the kernels cannot serve an indexer; None where they can."""
    if spec.head_dim not in HEAD_DIMS:
        return f"kernels are for head_dim {_list(HEAD_DIMS)}, got {spec.head_dim}"
    if spec.key_dtype == "fp8_e4m3" and spec.head_dim < LEAST_FP8_HEAD_DIM:
        return f"kernels for an fp8 cache are for head_dim {LEAST_FP8_HEAD_DIM} and more, got {spec.head_dim}"
    if spec.block_size not in BLOCK_SIZES:
        return f"kernels are for block_size {_list(BLOCK_SIZES)}, got {spec.block_size}"
    if spec.max_blocks > MAX_BLOCKS:
        return f"kernels are for sequences of at most {MAX_BLOCKS} blocks, got {spec.max_blocks}"
    if spec.topk > MAX_TOPK:
        return f"kernels are for topk of at most {MAX_TOPK}, got {spec.topk}"
    return None


def _list(sizes: tuple[int, ...]) -> str:
    return ", ".join(map(str, sizes))
