"""Pages of index keys as kernels read them: whole blocks, through the copy engine where the chip has one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from blockdex_kernels.triton.numbers import e4m3_to_float

_TRITON_TYPES = {torch.bfloat16: tl.bfloat16, torch.float8_e4m3fn: tl.float8e4nv}


@triton.jit
def load_block(
    pages,
    page,
    layer,
    num_layers,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    UPCAST: tl.constexpr,
    TMA: tl.constexpr,
):
    """`[BLOCK, DIM]`: the keys of one block, in bf16 where they are upcast."""
    if TMA:
        keys = pages.load([(page * num_layers + layer) * BLOCK, 0])
    else:
        cell = page.to(tl.int64) * num_layers + layer
        inside = tl.arange(0, BLOCK)[:, None] * DIM + tl.arange(0, DIM)[None, :]
        keys = tl.load(pages + cell * (BLOCK * DIM) + inside)
    if UPCAST:
        keys = e4m3_to_float(keys).to(tl.bfloat16)
    return keys


@dataclass(frozen=True, slots=True)
class Pages:
    """What a kernel is handed to read keys.

    Attributes:
        argument: a descriptor of `[num_pages * L * block_size, D]` with boxes of one block, or the tensor; bytes
            where keys are upcast.
        scored: Triton's type of keys and queries when they are multiplied.
        upcast: whether keys are e4m3 that become bf16 before they are scored.
        tma: whether the argument is a descriptor.
    """

    argument: Any
    scored: tl.dtype
    upcast: bool
    tma: bool

    @classmethod
    def of(cls, pages: torch.Tensor, *, upcast: bool, tma: bool) -> Pages:
        """Describes `[num_pages, L, block_size, D]`.

        Raises:
            ValueError: more keys than a descriptor can count.
        """
        rows = pages.view(-1, pages.shape[-1])
        if len(rows) >= 2**31:
            raise ValueError(f"num_pages: the cache must hold fewer than {2**31} keys in all layers, got {len(rows)}")
        scored = tl.bfloat16 if upcast else _TRITON_TYPES[pages.dtype]
        if upcast:
            rows = rows.view(torch.uint8)
        argument = TensorDescriptor.from_tensor(rows, list(pages.shape[2:])) if tma else rows
        return cls(argument, scored, upcast, tma)
