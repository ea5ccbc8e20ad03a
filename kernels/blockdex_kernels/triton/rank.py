"""From scores to block ids: exact top-k in the total order of the contract."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from blockdex_kernels.backend import Order
from blockdex_kernels.spec import IndexSpec
from blockdex_kernels.triton.launch import pdl_launch, wait_for_previous
from blockdex_kernels.triton.numbers import ordered

LEAST = tl.constexpr(-(2**31))


@triton.jit
def _kth_largest(keys, k, low):
    """The greatest t that at least k of the keys reach; `low` must be a number that k keys reach.

    Halves the interval between `low` and the greatest key, and stops early where exactly k reach t.
    """
    high = tl.max(keys, 0) + 1
    count = tl.sum((keys >= low).to(tl.int32), 0)
    while (count != k) & (low + 1 != high):
        middle = (low & high) + ((low ^ high) >> 1)
        reached = tl.sum((keys >= middle).to(tl.int32), 0)
        enough = reached >= k
        low = tl.where(enough, middle, low)
        count = tl.where(enough, reached, count)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def _places(keys, k, threshold):
    """Which keys are the k greatest, equal ones from the left, and the place of each among them from the left."""
    above = keys > threshold
    equal = keys == threshold
    # Two counts in one scan: keys above in the upper half, equal ones in the lower.
    weight = tl.where(above, 1 << 16, equal.to(tl.int32))
    before = tl.cumsum(weight, 0) - weight
    room = k - tl.sum(above.to(tl.int32), 0)
    equal_before = before & 0xFFFF
    chosen = above | (equal & (equal_before < room))
    return chosen, (before >> 16) + tl.minimum(equal_before, room)


@triton.jit
def _best_groups(
    scores, begin, end, scratch, K: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, INIT: tl.constexpr
):
    """Writes the K groups of blocks in which the K best blocks must be, ascending; returns a bound they reach.

    A block outside the K groups with the greatest maxima, equal ones from the left, has K blocks before it.
    """
    group = tl.arange(0, GROUPS)
    maxima = tl.full([GROUPS], float("-inf"), tl.float32)
    for first in tl.static_range(0, GROUP, 4):
        # Four blocks are one load of one thread; masked as one, so that it stays one.
        block = group[:, None] * GROUP + first + tl.arange(0, 4)[None, :]
        value = tl.load(scores + block, mask=(group * GROUP + first < end)[:, None], other=float("-inf"))
        inside = block < end
        if INIT > 0:
            inside = inside & (block >= begin)
        maxima = tl.maximum(maxima, tl.max(tl.where(inside, value, float("-inf")), 1))
    filled = group * GROUP < end
    if INIT > 0:
        filled = filled & (group * GROUP + GROUP > begin)
    keys = tl.where(filled, ordered(maxima), LEAST)
    # The least of 32 maxima of as many groups each is a bound that 32 groups reach; the least of all is a worse one.
    low = tl.full([], LEAST, tl.int32)
    if K <= 32:
        low = tl.min(tl.max(tl.reshape(keys, [GROUPS // 32, 32]), 0), 0)
    if low == LEAST:
        low = tl.min(tl.where(filled, keys, 2147483647), 0)
    threshold = _kth_largest(keys, K, low)
    chosen, place = _places(keys, K, threshold)
    tl.store(scratch + place, group, mask=chosen)
    return threshold


@triton.jit
def _best_blocks(
    scores,
    begin,
    end,
    out,
    one,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    INIT: tl.constexpr,
):
    """Writes the K best of the blocks `begin` to `end`, ascending; there are more than K of them.

    `one` is 1, which the compiler does not know: seeing that neighbours are read together, it would give each thread
    several, and exchange them all between threads for the scattered writes.
    """
    candidate = tl.arange(0, K_PADDED * GROUP) * one
    slot = candidate // GROUP
    first_group = begin // GROUP
    many = (end + GROUP - 1) // GROUP - first_group > K
    low = tl.full([], LEAST, tl.int32)
    group = first_group + slot
    if many:
        low = _best_groups(scores, begin, end, out, K, GROUPS, GROUP, INIT)
        tl.debug_barrier()
        group = tl.load(out + slot, mask=slot < K, other=0)
        tl.debug_barrier()
    block = group * GROUP + candidate % GROUP
    eligible = (slot < K) & (block >= begin) & (block < end)
    value = tl.load(scores + block, mask=eligible, other=float("-inf"))
    keys = tl.where(eligible, ordered(value), LEAST)
    if not many:
        low = tl.min(tl.where(eligible, keys, 2147483647), 0)
    chosen, place = _places(keys, K, _kth_largest(keys, K, low))
    tl.store(out + place, block, mask=chosen)


@triton.jit(do_not_specialize=["one"])
def _rank_kernel(
    scores,
    positions,
    unscales,
    block_ids,
    values,
    width,
    scale,
    one,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOPK: tl.constexpr,
    TOPK_PADDED: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
    K_PADDED: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BY_SCORE: tl.constexpr,
    VALUES: tl.constexpr,
    UNSCALE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program ranks one row: see `rank`."""
    K: tl.constexpr = TOPK - INIT - LOCAL
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    visible = (tl.load(positions + row // HEADS) + BLOCK) // BLOCK
    scores += row * width
    out = block_ids + row * TOPK
    num_init = tl.minimum(visible, INIT)
    end = tl.maximum(visible - LOCAL, num_init)
    num_chosen = tl.minimum(end - num_init, K)
    slot = tl.arange(0, TOPK_PADDED)
    block = slot
    if K > 0:
        if end - INIT > K:
            _best_blocks(scores, INIT, end, out + INIT, one, K, K_PADDED, GROUPS, GROUP, INIT)
            if BY_SCORE or VALUES:
                tl.debug_barrier()
                block = tl.load(out + slot, mask=(slot >= INIT) & (slot < INIT + K), other=0)
                tl.debug_barrier()
    is_init = slot < num_init
    is_chosen = (slot >= num_init) & (slot < num_init + num_chosen)
    is_local = (slot >= num_init + num_chosen) & (slot < num_init + num_chosen + visible - end)
    block = tl.where(is_init, slot, tl.where(is_chosen, block, slot - num_init - num_chosen + end))
    block = tl.where(is_init | is_chosen | is_local, block, -1)
    if BY_SCORE or VALUES:
        value = tl.load(scores + block, mask=is_chosen, other=float("-inf"))
        value = tl.where(value == value, value, float("-inf"))
    place = slot
    if BY_SCORE:
        key = tl.where(is_chosen, ordered(value), LEAST)
        before = (key[None, :] > key[:, None]) | ((key[None, :] == key[:, None]) & (slot[None, :] < slot[:, None]))
        falling = tl.sum((before & is_chosen[None, :]).to(tl.int32), 1)
        place = tl.where(is_chosen, num_init + (visible - end) + falling, tl.where(is_local, slot - num_chosen, slot))
    written = slot < TOPK
    if BY_SCORE or VALUES:
        tl.store(out + place, block, mask=written)
    else:
        # What was ranked is there already, unless all candidates found a place.
        ranked = tl.where(is_chosen, end - INIT > K, False)
        tl.store(out + slot, block, mask=written & (ranked == 0))
    if VALUES:
        if UNSCALE:
            # Written only where something was scored.
            value = tl.where(is_chosen, value * tl.load(unscales + row), value)
        value = tl.where(is_init | is_local, float("inf"), value * scale)
        tl.store(values + row * TOPK + place, value, mask=written)


def _grouping(width: int) -> tuple[int, int]:
    """Groups of blocks, and blocks of each: about as many groups as blocks of the K groups that are looked into."""
    blocks = triton.next_power_of_2(max(width, 128))
    group = 4
    while blocks // group > 16 * group:
        group *= 2
    return blocks // group, group


def rank(
    scores: torch.Tensor,
    positions: torch.Tensor,
    unscales: torch.Tensor | None,
    block_ids: torch.Tensor,
    values: torch.Tensor | None,
    spec: IndexSpec,
    *,
    order: Order,
    pdl: bool,
) -> None:
    """Selects the blocks of every row from their scores, in one launch.

    Args:
        scores: float32 `[rows, width]`; of a row, only the visible blocks that are not forced are read, and none where
            all of them find a place, unless the order or `values` asks for it. The width is a multiple of 32.
        positions: int32 `[rows / heads]`, position of each token; below 0 for a padded one, which gets -1 throughout.
        unscales: float32 `[rows]`, what returned scores are multiplied by besides the spec's scale; or None.
        block_ids: int32 `[tokens, heads, topk]`, written.
        values: float32 like `block_ids`, written; or None.
        spec: the indexer.
        order: of each row.
        pdl: whether to launch as a programmatic dependent.
    """
    rows, width = scores.shape
    groups, group = _grouping(width)
    _rank_kernel[(rows,)](
        scores,
        positions,
        unscales if unscales is not None else scores,
        block_ids,
        values if values is not None else scores,
        width,
        spec.score_scale,
        1,
        HEADS=block_ids.shape[1],
        BLOCK=spec.block_size,
        TOPK=spec.topk,
        TOPK_PADDED=triton.next_power_of_2(spec.topk),
        INIT=spec.init_blocks,
        LOCAL=spec.local_blocks,
        K_PADDED=triton.next_power_of_2(max(spec.topk - spec.init_blocks - spec.local_blocks, 1)),
        GROUPS=groups,
        GROUP=group,
        BY_SCORE=order == "score",
        VALUES=values is not None,
        UNSCALE=unscales is not None,
        PDL=pdl,
        num_warps=min(max(groups // 256, 1), 8),
        **pdl_launch(pdl),
    )
