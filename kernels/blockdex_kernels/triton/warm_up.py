"""Kernels compiled before anyone waits for them: Triton compiles each variant when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from blockdex_kernels.interface import Backend, Order, Spans

NUM_RUNS = (1, 33, 129)
"""Sequences of a call: one for each number of runs that kernels are padded to, up to 512."""
LENGTHS = (1, 2, 4, 8, 16)
"""Queries of a sequence in a decode step; the rows that they make with their heads are padded to powers of two."""
ANSWERS: tuple[tuple[Order, bool], ...] = (("ascending", True), ("score", False), ("score", True))
"""What else may be asked for than block ids in ascending order: an order, and whether scores."""
PREFILL_TOKENS = (64, 1280)
"""Few rows are ranked by other variants than many, whatever the heads."""
LEAST_BLOCKS = 128
KEY_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)


def warm_up(backend: Backend) -> Iterator[tuple[int, int]]:
    """Makes a call of every kind that engines make, through the public methods alone.

    Covered: keys of every dtype; bf16 queries, of all heads or some; runs and lengths up to those above; both orders,
    with scores and without; sequences of every length. What else a caller may ask for (queries of another dtype, more
    runs, scores of many runs) is compiled when it is first asked for.

    Args:
        backend: its pages hold nothing yet; the first one is overwritten.

    Yields:
        Calls made, and calls in all.
    """
    calls = list(_calls(backend))
    for done, call in enumerate(calls, start=1):
        backend.use_device()
        call()
        backend.synchronize()
        yield done, len(calls)


def _calls(backend: Backend) -> Iterator[Callable[[], object]]:
    heads = backend.spec.num_index_heads
    for dtype in KEY_DTYPES:
        yield _append(backend, 1, dtype)
    for num_runs in NUM_RUNS[1:]:
        yield _append(backend, num_runs, torch.bfloat16)
    for num_runs in NUM_RUNS:
        for length in LENGTHS:
            yield _select(backend.decode, backend, heads, num_runs, length)
    for order, return_scores in ANSWERS:
        for length in LENGTHS:
            yield _select(backend.decode, backend, heads, 1, length, order=order, return_scores=return_scores)
    blocks = LEAST_BLOCKS
    while True:
        for tokens in PREFILL_TOKENS:
            start = blocks * backend.spec.block_size - tokens
            yield _select(backend.prefill, backend, heads, 1, tokens, start=start, blocks=blocks)
        if blocks >= backend.spec.max_blocks:
            return
        # A power of two, half as much again, the next power of two: how rankings are shaped.
        blocks += blocks // 2 if blocks & (blocks - 1) == 0 else blocks // 3


def _append(backend: Backend, num_runs: int, dtype: torch.dtype) -> Callable[[], object]:
    keys = torch.zeros(num_runs, backend.spec.head_dim, device=backend.device).to(dtype)
    # All in one page, so at a position each.
    return partial(backend.append, keys, _spans(backend, np.arange(num_runs) % backend.spec.block_size, 1, 1))


def _select(
    phase: Callable[..., object],
    backend: Backend,
    heads: int,
    num_runs: int,
    length: int,
    *,
    start: int = 0,
    blocks: int = LEAST_BLOCKS,
    order: Order = "ascending",
    return_scores: bool = False,
) -> Callable[[], object]:
    """Queries from a position on, in sequences with room for so many blocks."""
    queries = torch.zeros(num_runs * length, heads, backend.spec.head_dim, dtype=torch.bfloat16, device=backend.device)
    spans = _spans(backend, np.full(num_runs, start), length, blocks)
    return partial(phase, queries, spans, order=order, return_scores=return_scores)


def _spans(backend: Backend, starts: NDArray[np.int64], length: int, blocks: int) -> Spans:
    """Runs in sequences whose every block is the first page."""
    columns = np.stack([np.zeros_like(starts), starts, np.full_like(starts, length)]).astype(np.int32)
    page_table = torch.zeros(len(starts), blocks, dtype=torch.int32, device=backend.device)
    layers, firsts, lengths = torch.from_numpy(columns).to(backend.device)
    return Spans(layers, firsts, lengths, page_table, columns, length)
