"""The reference of `blockdex_kernels.reference` for long sequences: no loops over rows, on any device."""

from __future__ import annotations

import math

import torch

from blockdex_kernels.casts import cast_keys, scale_to_fp8
from blockdex_kernels.interface import Fp8Scoring, Order
from blockdex_kernels.reference import FLIP_TOLERANCE, Reference
from blockdex_kernels.spec import IndexSpec

_PRODUCTS = 1 << 26
"""Most products that are held at once."""


def select(
    keys: torch.Tensor,
    queries: torch.Tensor,
    start: int,
    spec: IndexSpec,
    *,
    order: Order = "ascending",
    fp8_scoring: Fp8Scoring = "native",
    flip_tolerance: float = FLIP_TOLERANCE,
) -> Reference:
    """As `reference.select`, on the device of the keys; the answer is on the host."""
    keys = cast_keys(keys[: start + len(queries)], spec.key_dtype).double()
    if spec.key_dtype == "bf16" or fp8_scoring == "upcast":
        queries = queries.bfloat16().double()
    else:
        scaled, undo = scale_to_fp8(queries)
        queries = scaled.double() * undo.double()
    block_scores = _block_scores(keys, queries, start, spec)
    num_blocks = block_scores.shape[2]
    block = torch.arange(num_blocks, device=keys.device)
    visible = torch.arange(start, start + len(queries), device=keys.device) // spec.block_size + 1
    init = (block < spec.init_blocks) & (block < visible[:, None])
    local = (block >= visible[:, None] - spec.local_blocks) & (block < visible[:, None]) & ~init
    forced = init | local

    # By falling score, equal ones (and forced blocks, which have none here) by block; then what is forced to the front
    # and what is not visible to the end.
    ranked = (block_scores.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf) + 0.0).masked_fill(
        forced[:, None], 0.0
    )
    by_score = ranked.sort(dim=2, descending=True, stable=True).indices
    kind = torch.where(init, 0, torch.where(local, 1, torch.where(block < visible[:, None], 2, 3)))
    kind = kind[:, None].expand_as(ranked).gather(2, by_score)
    kind, to_front = kind.sort(dim=2, stable=True)
    block_ids = by_score.gather(2, to_front).masked_fill(kind == 3, -1)[..., : spec.topk]
    block_ids = torch.nn.functional.pad(block_ids, (0, spec.topk - block_ids.shape[2]), value=-1)
    if order == "ascending":
        block_ids = block_ids.masked_fill(block_ids < 0, num_blocks).sort(dim=2).values
        block_ids = block_ids.masked_fill(block_ids == num_blocks, -1)
    used = block_ids.clamp(min=0)
    scores = block_scores.gather(2, used) * spec.score_scale
    scores = scores.masked_fill(forced[:, None].expand_as(ranked).gather(2, used), math.inf)
    scores = scores.masked_fill(block_ids < 0, -math.inf)
    tolerance = flip_tolerance * _finite_norms(queries) * _finite_norms(keys).cummax(0).values[start:, None]
    tensors = (block_ids.int(), scores, block_scores, forced, tolerance)
    return Reference(*(tensor.cpu() for tensor in tensors))


def _block_scores(keys: torch.Tensor, queries: torch.Tensor, start: int, spec: IndexSpec) -> torch.Tensor:
    """float64 `[T, H, B]`; NaN where a query sees nothing of a block."""
    num_queries, num_heads, dim = queries.shape
    size, num_blocks = spec.block_size, -(-len(keys) // spec.block_size)
    scores = torch.empty(num_queries, num_heads, num_blocks, dtype=torch.float64, device=keys.device)
    query_positions = torch.arange(start, start + num_queries, device=keys.device)
    step = max(_PRODUCTS // (num_queries * num_heads * size), 1)
    for first in range(0, num_blocks, step):
        part = keys[first * size : (first + step) * size]
        whole = torch.nn.functional.pad(part, (0, 0, 0, -len(part) % size))
        products = queries.reshape(-1, dim) @ whole.T
        products = products.masked_fill(products.isnan(), -math.inf).view(num_queries, num_heads, -1)
        key_positions = first * size + torch.arange(len(whole), device=keys.device)
        products = products.masked_fill((key_positions > query_positions[:, None])[:, None], -math.inf)
        scores[..., first : first + step] = products.view(num_queries, num_heads, -1, size).amax(dim=3)
    first_keys = torch.arange(num_blocks, device=keys.device) * size
    return scores.masked_fill((first_keys > query_positions[:, None])[:, None], math.nan)


def _finite_norms(vectors: torch.Tensor) -> torch.Tensor:
    return vectors.square().sum(dim=-1).sqrt().nan_to_num(nan=0.0, posinf=0.0)
