"""Pages of index keys as kernels read them: whole blocks, through the copy engine where the chip has one."""

from __future__ import annotations

import math
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
    page_stride,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    UPCAST: tl.constexpr,
    TMA: tl.constexpr,
):
    """`[BLOCK, DIM]`: the keys of one block, in bf16 where they are upcast."""
    if TMA:
        keys = pages.load([page * (page_stride // DIM) + layer * BLOCK, 0])
    else:
        cell = page.to(tl.int64) * page_stride + layer * (BLOCK * DIM)
        inside = tl.arange(0, BLOCK)[:, None] * DIM + tl.arange(0, DIM)[None, :]
        keys = tl.load(pages + cell + inside)
    if UPCAST:
        keys = e4m3_to_float(keys).to(tl.bfloat16)
    return keys


@dataclass(frozen=True, slots=True)
class Pages:
    """What a kernel is handed to read keys.

    Attributes:
        argument: a descriptor of rows of D elements with boxes of one block, or the elements; bytes where keys are
            upcast.
        elements: all from the first page's first to the last page's last, those between pages too.
        page_stride: elements from one page to the next.
        scored: Triton's type of keys and queries when they are multiplied.
        upcast: whether keys are e4m3 that become bf16 before they are scored.
        tma: whether the argument is a descriptor.
    """

    argument: Any
    elements: torch.Tensor
    page_stride: int
    scored: tl.dtype
    upcast: bool
    tma: bool

    @classmethod
    def of(cls, pages: torch.Tensor, *, upcast: bool, tma: bool) -> Pages:
        """Describes `[num_pages, L, block_size, D]`, each page dense, at any distance of each other.

        The copy engine counts rows, from an address that 16 divides: pages that do not lie like that are read without.

        Raises:
            ValueError: the keys of a page do not follow each other, or there are more rows than a descriptor can count.
        """
        num_pages, *shape = pages.shape
        if num_pages and not pages[0].is_contiguous():
            raise ValueError(f"pages: each must be dense, got strides {pages.stride()} of shape {list(pages.shape)}")
        dim = shape[-1]
        page_stride = pages.stride(0)
        end = max(num_pages - 1, 0) * page_stride + math.prod(shape)
        scored = tl.bfloat16 if upcast else _TRITON_TYPES[pages.dtype]
        elements = pages.as_strided((end,), (1,))
        if upcast:
            elements = elements.view(torch.uint8)
        tma = tma and page_stride % dim == 0 and elements.data_ptr() % 16 == 0
        if not tma:
            return cls(elements, elements, page_stride, scored, upcast, tma)
        rows = elements.view(-1, dim)
        if len(rows) >= 2**31:
            raise ValueError(f"num_pages: the cache must hold fewer than {2**31} keys in all layers, got {len(rows)}")
        return cls(TensorDescriptor.from_tensor(rows, shape[1:]), elements, page_stride, scored, upcast, tma)
