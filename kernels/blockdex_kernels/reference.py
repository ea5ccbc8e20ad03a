"""The oracle: block selection in float64, to be checked by eye, and the rule by which others may differ from it.

The selection of one query, in words: its visible keys are those up to its own position; a block's score is the greatest
product with a visible key of the block, a NaN product counting as -inf; the first `init_blocks` and the last
`local_blocks` visible blocks are selected whatever they score; the other places go to the highest scores, equal scores
to the lower block id.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from blockdex_kernels.interface import Fp8Scoring, Order
from blockdex_kernels.spec import IndexSpec

FLIP_TOLERANCE = 2.0**-16
"""Selections may differ between blocks whose scores lie within this times |query| times the greatest |key|."""

_FP8_MAX = 448.0


@dataclass(frozen=True, slots=True)
class Reference:
    """A selection, and what it takes to judge another one; T = queries, H = heads, B = blocks that the last query sees.

    Attributes:
        block_ids: int32 `[T, H, topk]`, as a backend answers.
        scores: float64 `[T, H, topk]`, as a backend answers: scaled, +inf for forced blocks, -inf beside -1.
        block_scores: float64 `[T, H, B]`, the unscaled score of every block, NaN where the query sees none of it.
        forced: bool `[T, B]`, the blocks that a query selects whatever they score.
        tolerance: float64 `[T, H]`, how far apart the scores of two blocks may lie that another selection exchanges.
            Keys that hold an infinity or NaN do not count, and a query that does allows nothing: such products are
            the same in every precision.
    """

    block_ids: torch.Tensor
    scores: torch.Tensor
    block_scores: torch.Tensor
    forced: torch.Tensor
    tolerance: torch.Tensor


class SelectionMismatchError(AssertionError):
    """Two selections differ by more than rounding; the message names the row, the blocks and their scores."""


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
    """Selects blocks for consecutive queries of one sequence and layer.

    Args:
        keys: `[tokens, D]`, any float dtype, from position 0 to the last query's at least; more are ignored.
        queries: `[T, H, D]`, any float dtype.
        start: position of the first query.
        spec: the indexer; `key_dtype` says how keys and queries are cast.
        order: of `block_ids` and `scores`.
        fp8_scoring: how queries meet an fp8 cache.
        flip_tolerance: how far apart scores may lie that another selection exchanges, in |query| times the greatest
            |key|; more than the default for kernels that round more.

    Raises:
        ValueError: there are fewer keys than positions.
    """
    num_queries, num_heads, _ = queries.shape
    if len(keys) < start + num_queries:
        raise ValueError(f"keys: must reach position {start + num_queries - 1}, got {len(keys)} keys")
    keys = cast_keys(keys[: start + num_queries], spec)
    queries = cast_queries(queries, spec, fp8_scoring)
    block_scores = _block_scores(keys, queries, start, spec)
    num_blocks = block_scores.shape[2]
    block_ids = torch.full((num_queries, num_heads, spec.topk), -1, dtype=torch.int32)
    scores = torch.full((num_queries, num_heads, spec.topk), -math.inf, dtype=torch.float64)
    forced = torch.zeros(num_queries, num_blocks, dtype=torch.bool)
    for query in range(num_queries):
        visible = (start + query) // spec.block_size + 1
        forced_blocks = _forced_blocks(visible, spec)
        forced[query, forced_blocks] = True
        for head in range(num_heads):
            row = block_scores[query, head, :visible].tolist()
            chosen = forced_blocks + _best_blocks(row, forced_blocks, spec.topk - len(forced_blocks))
            if order == "ascending":
                chosen.sort()
            block_ids[query, head, : len(chosen)] = torch.tensor(chosen)
            scaled = [math.inf if block in forced_blocks else row[block] * spec.score_scale for block in chosen]
            scores[query, head, : len(chosen)] = torch.tensor(scaled, dtype=torch.float64)
    return Reference(block_ids, scores, block_scores, forced, _tolerance(keys, queries, start, flip_tolerance))


def _forced_blocks(visible: int, spec: IndexSpec) -> list[int]:
    """The init blocks, then those local blocks that are not init blocks."""
    init = [block for block in range(visible) if block < spec.init_blocks]
    local = [block for block in range(visible) if block >= visible - spec.local_blocks]
    return init + [block for block in local if block not in init]


def _best_blocks(scores: list[float], forced_blocks: list[int], places: int) -> list[int]:
    """The blocks that get the places left: by falling score, equal scores by rising block id."""
    candidates = [block for block in range(len(scores)) if block not in forced_blocks]
    return sorted(candidates, key=lambda block: (-scores[block], block))[:places]


def _block_scores(keys: torch.Tensor, queries: torch.Tensor, start: int, spec: IndexSpec) -> torch.Tensor:
    """float64 `[T, H, B]`; NaN where a query sees nothing of a block."""
    num_queries, num_heads, _ = queries.shape
    num_blocks = -(-len(keys) // spec.block_size)
    scores = torch.full((num_queries, num_heads, num_blocks), math.nan, dtype=torch.float64)
    for block in range(num_blocks):
        first_key = block * spec.block_size
        block_keys = keys[first_key : first_key + spec.block_size]
        first_query = max(first_key - start, 0)
        products = queries[first_query:] @ block_keys.T
        products[products.isnan()] = -math.inf
        key_positions = torch.arange(first_key, first_key + len(block_keys))
        query_positions = torch.arange(start + first_query, start + num_queries)
        later = key_positions[None, :] > query_positions[:, None]
        products.masked_fill_(later[:, None, :], -math.inf)
        scores[first_query:, :, block] = products.amax(dim=2)
    return scores


def _tolerance(keys: torch.Tensor, queries: torch.Tensor, start: int, flip_tolerance: float) -> torch.Tensor:
    """float64 `[T, H]`: `flip_tolerance` times |query| times the greatest |key| that the query sees."""
    key_norms = _finite_norms(keys).cummax(dim=0).values[start:]
    return flip_tolerance * _finite_norms(queries) * key_norms[:, None]


def _finite_norms(vectors: torch.Tensor) -> torch.Tensor:
    """The length of each vector; 0 for one that holds an infinity or NaN."""
    return vectors.square().sum(dim=-1).sqrt().nan_to_num(nan=0.0, posinf=0.0)


def cast_keys(keys: torch.Tensor, spec: IndexSpec) -> torch.Tensor:
    """Keys as the cache rounds them, in float64: to bf16, or to e4m3 with everything beyond 448 becoming 448."""
    if spec.key_dtype == "bf16":
        return keys.bfloat16().double()
    return _round_to_fp8(keys.double())


def cast_queries(queries: torch.Tensor, spec: IndexSpec, fp8_scoring: Fp8Scoring) -> torch.Tensor:
    """Queries as they are scored, in float64.

    bf16, but for an fp8 cache scored natively: there each row is multiplied by the power of two that brings its
    greatest finite magnitude into [128, 256) (by 2^126 at most), cast to e4m3 as keys are, and divided again.
    """
    if spec.key_dtype == "bf16" or fp8_scoring == "upcast":
        return queries.bfloat16().double()
    rows = queries.double()
    greatest = rows.abs().nan_to_num(nan=0.0, posinf=0.0).amax(dim=-1, keepdim=True)
    scales = [math.ldexp(1.0, min(8 - math.frexp(value)[1], 126)) for value in greatest.flatten().tolist()]
    scale = torch.tensor(scales, dtype=torch.float64).view(greatest.shape)
    return _round_to_fp8(rows * scale) / scale


def _round_to_fp8(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn).double()


def count_flips(ours: torch.Tensor, theirs: torch.Tensor, reference: Reference) -> int:
    """Compares two selections of the rows of a reference as sets, allowing what rounding may exchange.

    Either may be the reference's own `block_ids`. Order inside a row does not matter; -1 marks unused places.

    Args:
        ours: integers `[T, H, topk]`.
        theirs: integers `[T, H, topk]`.
        reference: of the same rows, in either order.

    Returns:
        Blocks that one selection has in place of another's, all rows together; 0 where all sets are equal.

    Raises:
        SelectionMismatchError: a row differs by more than that.
    """
    if not ours.shape == theirs.shape == reference.block_ids.shape:
        shapes = [list(tensor.shape) for tensor in (ours, theirs, reference.block_ids)]
        raise SelectionMismatchError(f"shapes must be equal, got {shapes[0]} and {shapes[1]}, reference {shapes[2]}")
    different = (ours.long().sort(dim=2).values != theirs.long().sort(dim=2).values).any(dim=2)
    return sum(
        _count_row_flips(ours[query, head].tolist(), theirs[query, head].tolist(), reference, query, head)
        for query, head in different.nonzero().tolist()
    )


def _count_row_flips(ours: list[int], theirs: list[int], reference: Reference, query: int, head: int) -> int:
    added = sorted(set(ours) - set(theirs))
    missing = sorted(set(theirs) - set(ours))
    row = f"query {query}, head {head}: {added} in place of {missing}"
    if any(len(set(blocks)) + max(blocks.count(-1) - 1, 0) != len(blocks) for blocks in (ours, theirs)):
        raise SelectionMismatchError(f"{row}: a block is named twice in {ours} or {theirs}")
    if len(added) != len(missing):
        raise SelectionMismatchError(f"{row}: not equally many")
    num_blocks = reference.forced.shape[1]
    for block in added + missing:
        if not 0 <= block < num_blocks or math.isnan(reference.block_scores[query, head, block]):
            raise SelectionMismatchError(f"{row}: block {block} is not one that the query sees")
        if reference.forced[query, block]:
            raise SelectionMismatchError(f"{row}: block {block} is one that every selection must hold")
    scores = reference.block_scores[query, head]
    tolerance = float(reference.tolerance[query, head])
    for one in added:
        for other in missing:
            first, second = float(scores[one]), float(scores[other])
            if first != second and not abs(first - second) <= tolerance:
                raise SelectionMismatchError(
                    f"{row}: block {one} scores {first}, block {other} {second}; {tolerance} apart is allowed"
                )
    return len(added)
