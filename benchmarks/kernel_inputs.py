"""The same random keys in the cache of every version, and batches of queries over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.kernel_shapes import BLOCK_SIZE, HEAD_DIM, HEADS, Shape
from blockdex_kernels.interface import Spans

LAYERS, LAYER = 3, 1
"""Layers of the cache, and the one that is measured: its blocks lie as far apart as in a real cache of three layers."""

_PAGES_AT_ONCE = 4096
_MOST_BATCHES = 256


@dataclass(frozen=True)
class Batch:
    """The arguments of one call.

    Attributes:
        queries: bf16 `[T, H, D]`.
        spans: one run a sequence, all of the same length, at its end.
        ends: int32 `[R]`, tokens of each sequence.
        offsets: int32 `[R + 1]`, row of each run's first query, and T.
        longest: tokens of the longest sequence.
    """

    queries: torch.Tensor
    spans: Spans
    ends: torch.Tensor
    offsets: torch.Tensor
    longest: int


def fill(pages: int, device: torch.device, write: Callable[[torch.Tensor, Spans], None]) -> None:
    """Has normally distributed keys written to the pages 0 to `pages` of the layer, the same for every caller."""
    generator = torch.Generator(device).manual_seed(0)
    for first in range(0, pages, _PAGES_AT_ONCE):
        page_table = torch.arange(first, min(first + _PAGES_AT_ONCE, pages), dtype=torch.int32, device=device)[None]
        tokens = page_table.shape[1] * BLOCK_SIZE
        keys = torch.randn(tokens, HEAD_DIM, dtype=torch.bfloat16, device=device, generator=generator)
        write(keys, _spans([0], [tokens], page_table))


def batches(shape: Shape, pages: int, device: torch.device, rotated_bytes: int, touched_bytes: int) -> list[Batch]:
    """Batches of one shape, each with queries and pages of its own as far as the cache reaches.

    Args:
        shape: the shape.
        pages: of the cache.
        device: where the batches are.
        rotated_bytes: what all of them are to touch together.
        touched_bytes: what a call touches at least.
    """
    count = min(max(2, -(-rotated_bytes // touched_bytes)), _MOST_BATCHES)
    generator = torch.Generator(device).manual_seed(1)
    shuffled = torch.randperm(pages, device=device, generator=generator, dtype=torch.int32)
    starts = [length - shape.queries for length in shape.lengths]
    ends = torch.tensor(shape.lengths, dtype=torch.int32, device=device)
    offsets = torch.arange(len(starts) + 1, dtype=torch.int32, device=device) * shape.queries
    tables = _page_tables(shape, shuffled)
    tokens = len(starts) * shape.queries
    return [
        Batch(
            torch.randn(tokens, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device, generator=generator),
            _spans(starts, [shape.queries] * len(starts), next(tables)),
            ends,
            offsets,
            max(shape.lengths),
        )
        for _ in range(count)
    ]


def _page_tables(shape: Shape, shuffled: torch.Tensor) -> Iterator[torch.Tensor]:
    """Page tables `[sequences, most blocks]`, one after another going on through the shuffled pages."""
    blocks = torch.tensor([-(-length // BLOCK_SIZE) for length in shape.lengths], device=shuffled.device)
    used = torch.arange(int(blocks.max()), device=shuffled.device) < blocks[:, None]
    places = torch.arange(shape.blocks, device=shuffled.device)
    while True:
        page_table = torch.zeros(used.shape, dtype=torch.int32, device=shuffled.device)
        page_table[used] = shuffled[places % len(shuffled)]
        yield page_table
        places += shape.blocks


def _spans(starts: list[int], lengths: list[int], page_table: torch.Tensor) -> Spans:
    columns = np.array([[LAYER] * len(starts), starts, lengths], np.int32)
    on_device = torch.from_numpy(columns).to(page_table.device)
    return Spans(on_device[0], on_device[1], on_device[2], page_table, columns, max(lengths))
