"""From scores to block ids: exact top-k in the total order of the contract."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from blockdex_kernels.interface import Order
from blockdex_kernels.spec import IndexSpec
from blockdex_kernels.triton.launch import pdl_launch
from blockdex_kernels.triton.numbers import ordered

LEAST = tl.constexpr(-(2**31))
GREATEST = tl.constexpr(2**31 - 1)

_FEW_ROWS = 1024
"""Rows that fit on the chip beside the programs of another kernel: what counts is how long one row takes."""
_AT_ONCE = 64
"""Blocks of one of few rows that are looked into at once, without groups: more take longer than groups do."""
_DEPENDENT_ROWS = 8192
"""With more rows, waiting inside the kernel costs a large grid more than what is gained at its start."""


@triton.jit
def _middle(low, high):
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _halved(low, high, count, middle, reached, fewest: tl.constexpr):
    enough = reached >= fewest
    return tl.where(enough, middle, low), tl.where(enough, high, middle), tl.where(enough, reached, count)


@triton.jit
def _reached(keys, bound):
    return tl.sum((keys >= bound).to(tl.int32), 0)


@triton.jit
def _least(keys, eligible, K: tl.constexpr, KEYS: tl.constexpr):
    """A bound that at least K of the eligible keys reach; the others are `LEAST`."""
    low = tl.full([], LEAST, tl.int32)
    if K <= 32:
        # The least of 32 maxima of as many keys each, if each of these holds any: 32 keys reach it.
        low = tl.min(tl.max(tl.reshape(keys, [KEYS // 32, 32]), 0), 0)
    if low == LEAST:
        low = tl.min(tl.where(eligible, keys, GREATEST), 0)
    return low


@triton.jit
def _bound(keys, low, fewest: tl.constexpr, most: tl.constexpr, FEW: tl.constexpr):
    """A bound that at least `fewest` keys reach and, but for equal ones, at most `most`; and how many do.

    Halves the interval between `low`, which at least `fewest` keys must reach, and the greatest key; for few rows twice
    at once, since counts that need not wait for each other take hardly more time than one.
    """
    high = tl.max(keys, 0) + 1
    count = _reached(keys, low)
    while (count > most) & (low + 1 != high):
        middle = _middle(low, high)
        reached = _reached(keys, middle)
        if FEW:
            lower, upper = _middle(low, middle), _middle(middle, high)
            reached_lower, reached_upper = _reached(keys, lower), _reached(keys, upper)
            enough = reached >= fewest
            quarter = tl.where(enough, upper, lower)
            reached_quarter = tl.where(enough, reached_upper, reached_lower)
            low, high, count = _halved(low, high, count, middle, reached, fewest)
            low, high, count = _halved(low, high, count, quarter, reached_quarter, fewest)
        else:
            low, high, count = _halved(low, high, count, middle, reached, fewest)
    return low, count


@triton.jit
def _write_best(out, keys, items, low, count, fewest: tl.constexpr, most: tl.constexpr):
    """Writes the items whose keys reach a bound, in their order; returns how many.

    Where more than `most` do, all that are not above the bound equal it: then the `fewest` greatest, equal ones from
    the left.
    """
    reach = keys >= low
    if count > most:
        # Two counts in one scan: keys above in the upper half, equal ones in the lower.
        above = keys > low
        weight = tl.where(above, 1 << 16, reach.to(tl.int32))
        before = tl.cumsum(weight, 0) - weight
        room = fewest - tl.sum(above.to(tl.int32), 0)
        equal_before = before & 0xFFFF
        place = (before >> 16) + tl.minimum(equal_before, room)
        tl.store(out + place, items, mask=above | (reach & (equal_before < room)))
        count = tl.minimum(count, fewest)
    else:
        weight = reach.to(tl.int32)
        tl.store(out + tl.cumsum(weight, 0) - weight, items, mask=reach)
    return count


@triton.jit
def _best_groups(
    scores,
    end,
    out,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    MOST: tl.constexpr,
    INIT: tl.constexpr,
    FEW: tl.constexpr,
):
    """Writes the groups of blocks in which the K best must be, ascending; returns a bound these reach, and how many.

    A block outside the K groups with the greatest maxima, equal ones from the left, has K blocks before it. Up to MOST
    groups are as good, and found sooner.
    """
    WIDE: tl.constexpr = 4 if GROUP % 4 == 0 else 2
    group = tl.arange(0, GROUPS)
    maxima = tl.full([GROUPS], float("-inf"), tl.float32)
    for first in tl.static_range(0, GROUP, WIDE):
        # A few blocks are one load of one thread; masked as one, so that it stays one.
        block = group[:, None] * GROUP + first + tl.arange(0, WIDE)[None, :]
        value = tl.load(scores + block, mask=(group * GROUP + first < end)[:, None])
        inside = block < end
        if INIT > 0:
            inside = inside & (block >= INIT)
        maxima = tl.maximum(maxima, tl.max(tl.where(inside, value, float("-inf")), 1))
    filled = group * GROUP < end
    if INIT > 0:
        filled = filled & (group * GROUP + GROUP > INIT)
    keys = tl.where(filled, ordered(maxima), LEAST)
    low = _least(keys, filled, K, GROUPS)
    low, count = _bound(keys, low, K, MOST, FEW)
    return low, _write_best(out, keys, group, low, count, K, MOST)


@triton.jit
def _best_blocks(
    scores,
    end,
    out,
    scratch,
    one,
    K: tl.constexpr,
    CANDIDATES: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    INIT: tl.constexpr,
    FEW: tl.constexpr,
):
    """Writes the K best of the blocks from `INIT` to `end`, ascending; there are more than K of them.

    `one` is 1, which the compiler does not know: seeing that neighbours are read together, it would give each thread
    several, and exchange them all between threads for the scattered writes.
    """
    MOST: tl.constexpr = CANDIDATES // GROUP
    candidate = tl.arange(0, CANDIDATES) * one
    slot = candidate // GROUP
    num_groups = (end + GROUP - 1) // GROUP - INIT // GROUP
    group = INIT // GROUP + slot
    low = tl.full([], LEAST, tl.int32)
    if MOST < GROUPS:
        if num_groups > MOST:
            low, num_groups = _best_groups(scores, end, scratch, K, GROUPS, GROUP, MOST, INIT, FEW)
            tl.debug_barrier()
            group = tl.load(scratch + slot, mask=slot < num_groups, other=0)
    block = group * GROUP + candidate % GROUP
    eligible = (slot < num_groups) & (block >= INIT) & (block < end)
    value = tl.load(scores + block, mask=eligible, other=float("-inf"))
    keys = tl.where(eligible, ordered(value), LEAST)
    if low == LEAST:
        low = _least(keys, eligible, K, CANDIDATES)
    low, count = _bound(keys, low, K, K, FEW)
    _write_best(out, keys, block, low, count, K, K)


@triton.jit
def _write_raw(
    scores,
    out,
    block,
    is_chosen,
    ranked,
    values,
    wants,
    heads,
    unscale,
    slot,
    width,
    TOPK: tl.constexpr,
    UNSCALE: tl.constexpr,
):
    """Writes the scores of a row's blocks as they rank, if it wants them; those that were ranked are read back."""
    if wants is not None:
        if tl.load(wants + tl.program_id(0) // heads) != 0:
            if ranked:
                tl.debug_barrier()
            there = tl.where(is_chosen, ranked, False)
            block = tl.where(there, tl.load(out + slot, mask=there, other=0), block)
            # Whoever shares a target may have written there meanwhile.
            raw = tl.load(scores + block, mask=(block >= 0) & (block < width), other=float("-inf"))
            raw = tl.where(raw == raw, raw, float("-inf"))
            if UNSCALE:
                raw = raw * tl.load(unscale)
            tl.store(values + slot, raw, mask=slot < TOPK)


@triton.jit
def _target_of(block_ids, targets, row, TOPK: tl.constexpr):
    """Where a row's block ids go: to its target, if it has one."""
    out = block_ids + row * TOPK
    if targets is not None:
        target = tl.load(targets + row)
        out = tl.where(target != 0, target, out.to(tl.int64)).to(tl.pointer_type(tl.int32))
    return out


@triton.jit
def _tell_host(block_ids, targets, row, slot, TOPK: tl.constexpr, FENCE: tl.constexpr):
    """Writes -1 for a row with a target: what was written there is to be seen by then, for every processor."""
    if targets is not None:
        if tl.load(targets + row) != 0:
            tl.debug_barrier()
            told = slot * 0 - 1
            if FENCE:
                told = tl.inline_asm_elementwise(
                    "fence.acq_rel.sys; mov.u32 $0, $1;", "=r,r", [told], dtype=tl.int32, is_pure=False, pack=1
                )
            tl.store(block_ids + row * TOPK + slot, told, mask=slot < TOPK)


@triton.jit
def _signal(address, number, arrived, FENCE: tl.constexpr):
    """The last program writes the numbers, for every processor to see behind all block ids."""
    if tl.max((address != 0).to(tl.int32), 0) > 0:
        tl.debug_barrier()
        before = tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu")
        if before == tl.num_programs(0) - 1:
            tl.store(arrived, 0)
            if FENCE:
                tl.inline_asm_elementwise(
                    """{
                    .reg .pred there;
                    setp.ne.u64 there, $1, 0;
                    @there st.release.sys.global.u64 [$1], $2;
                    mov.u32 $0, 0;
                    }""",
                    "=r,l,l",
                    [address, number],
                    dtype=tl.int32,
                    is_pure=False,
                    pack=1,
                )
            else:
                tl.store(address.to(tl.pointer_type(tl.int64)), number, mask=address != 0)


@triton.jit(
    do_not_specialize=["heads", "one"], do_not_specialize_on_alignment=["positions", "wants", "targets", "signals"]
)
def _rank_kernel(
    scores,
    positions,
    wants,
    unscales,
    block_ids,
    targets,
    signals,
    arrived,
    values,
    scratch,
    width,
    scale,
    one,
    heads,
    BLOCK: tl.constexpr,
    TOPK: tl.constexpr,
    TOPK_PADDED: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
    CANDIDATES: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BY_SCORE: tl.constexpr,
    VALUES: tl.constexpr,
    UNSCALE: tl.constexpr,
    FEW: tl.constexpr,
    PDL: tl.constexpr,
    FENCE: tl.constexpr,
    SIGNALS: tl.constexpr,
):
    """Each program ranks a row: see `rank`."""
    K: tl.constexpr = TOPK - INIT - LOCAL
    if PDL:
        # The next kernel's programs may come before anything is ranked, and find their first data meanwhile; not beside
        # many rows, whose programs take the L1 cache for themselves where the next one needs it as shared memory, and
        # would keep some of its programs waiting for others of it.
        if FEW:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    visible = (tl.load(positions + tl.program_id(0) // heads) + BLOCK) // BLOCK
    scores += row * width
    out = _target_of(block_ids, targets, row, TOPK)
    if SIGNALS:
        address = tl.load(signals + tl.arange(0, SIGNALS))
        number = tl.load(signals + SIGNALS + tl.arange(0, SIGNALS))
    num_init = tl.minimum(visible, INIT)
    end = tl.maximum(visible - LOCAL, num_init)
    num_chosen = tl.minimum(end - num_init, K)
    num_local = visible - end
    slot = tl.arange(0, TOPK_PADDED)
    block = slot
    ranked = end - INIT > K
    if K > 0:
        if ranked:
            own_scratch = scratch + row * (CANDIDATES // GROUP)
            _best_blocks(scores, end, out + INIT, own_scratch, one, K, CANDIDATES, GROUPS, GROUP, INIT, FEW)
            if BY_SCORE or VALUES:
                tl.debug_barrier()
                block = tl.load(out + slot, mask=(slot >= INIT) & (slot < INIT + K), other=0)
                tl.debug_barrier()
    is_init = slot < num_init
    is_chosen = (slot >= num_init) & (slot < num_init + num_chosen)
    is_local = (slot >= num_init + num_chosen) & (slot < num_init + num_chosen + num_local)
    block = tl.where(is_init, slot, tl.where(is_chosen, block, slot - num_init - num_chosen + end))
    block = tl.where(is_init | is_chosen | is_local, block, -1)
    written = slot < TOPK
    place = slot
    if BY_SCORE or VALUES:
        value = tl.load(scores + block, mask=is_chosen, other=float("-inf"))
        value = tl.where(value == value, value, float("-inf"))
    if BY_SCORE:
        key = tl.where(is_chosen, ordered(value), LEAST)
        before = (key[None, :] > key[:, None]) | ((key[None, :] == key[:, None]) & (slot[None, :] < slot[:, None]))
        falling = tl.sum((before & is_chosen[None, :]).to(tl.int32), 1)
        place = tl.where(is_chosen, num_init + num_local + falling, tl.where(is_local, slot - num_chosen, slot))
    if BY_SCORE or VALUES:
        tl.store(out + place, block, mask=written)
    else:
        # What was ranked is there already.
        there = tl.where(is_chosen, ranked, False)
        tl.store(out + slot, block, mask=written & (there == 0))
    _write_raw(
        scores,
        out,
        block,
        is_chosen,
        ranked,
        values + row * TOPK,
        wants,
        heads,
        unscales + row,
        slot,
        width,
        TOPK,
        UNSCALE,
    )
    _tell_host(block_ids, targets, row, slot, TOPK, FENCE)
    if SIGNALS:
        _signal(address, number, arrived, FENCE)
    if VALUES:
        if UNSCALE:
            # Written only where something was scored.
            value = tl.where(is_chosen, value * tl.load(unscales + row), value)
        value = tl.where(is_init | is_local, float("inf"), value * scale)
        tl.store(values + row * TOPK + place, value, mask=written)


@cache
def grouping(width: int, k: int, few: bool) -> tuple[int, int, int]:
    """How rows of a width are ranked: groups of blocks, blocks of a group, and how many blocks are looked into.

    For few rows these are all, or twice as many as they have to be: then hardly any bound has to be looked for among
    groups.
    A thread's share of the blocks, of the groups and of the candidates cost about as 5 to 27 to 35, since groups and
    candidates are compared with one bound after another.
    """
    if few and width <= _AT_ONCE:
        candidates = max(triton.next_power_of_2(width), 32)
        return candidates // 4, 4, candidates
    shapes = []
    for groups in (32, 64, 128, 256, 512, 1024):
        group = next(size for size in (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 2**20) if groups * size >= width)
        candidates = max(triton.next_power_of_2(k * group), 32)
        shapes.append((5 * groups * group + 27 * groups + 35 * candidates, groups, group, candidates))
    _, groups, group, candidates = min(shapes)
    return groups, group, 2 * candidates if few else candidates


class Signals(NamedTuple):
    """Numbers that whoever waits for block ids sees behind them, on whatever processor.

    Attributes:
        numbers: int64 `[2 * N]`, N a power of two: addresses, 0 for none, and what is written there.
        arrived: int32 `[1]`, 0 between launches.
    """

    numbers: torch.Tensor
    arrived: torch.Tensor


def rank(
    scores: torch.Tensor,
    positions: torch.Tensor,
    wants: torch.Tensor | None,
    unscales: torch.Tensor | None,
    block_ids: torch.Tensor,
    values: torch.Tensor | None,
    spec: IndexSpec,
    *,
    order: Order,
    pdl: bool,
    targets: torch.Tensor | None = None,
    signals: Signals | None = None,
) -> None:
    """Selects the blocks of every row from their scores, in one launch.

    Args:
        scores: float32 `[rows, width]`; of a row, only the visible blocks that are not forced are read, and none where
            all of them find a place, unless the order or `values` asks for it. The width is a multiple of 32.
        positions: int32 `[rows / n]`, position of each n rows: of a token's, or of each alone; below 0 for padding,
            which gets -1 throughout.
        wants: int32 beside `positions`; where it is not 0, `values` gets the scores as they rank, of forced blocks too,
            -inf beside -1, and only there. The order is ascending then. None: `values` is for all rows, scaled, with
            +inf for forced blocks.
        unscales: float32 `[rows]`, what returned scores are multiplied by besides the spec's scale; or None.
        block_ids: int32 `[..., topk]` of so many rows, written.
        values: float32 like `block_ids`, written; or None.
        spec: the indexer.
        order: of each row.
        pdl: whether to launch as a programmatic dependent.
        targets: int64 `[rows]`, addresses of int32 `[topk]`: where one is not 0, the row's block ids go there, and then
            -1 throughout to `block_ids`; or None.
        signals: numbers to be written when all block ids are; or None.
    """
    rows, width = scores.shape
    few = rows <= _FEW_ROWS
    groups, group, candidates = grouping(width, max(spec.topk - spec.init_blocks - spec.local_blocks, 1), few)
    scratch = torch.empty((rows, candidates // group), dtype=torch.int32, device=scores.device)
    pdl = pdl and rows <= _DEPENDENT_ROWS
    _rank_kernel[(rows,)](
        scores,
        positions,
        wants,
        unscales if unscales is not None else scores,
        block_ids,
        targets,
        None if signals is None else signals.numbers,
        None if signals is None else signals.arrived,
        values if values is not None else scores,
        scratch,
        width,
        spec.score_scale,
        1,
        rows // len(positions),
        BLOCK=spec.block_size,
        TOPK=spec.topk,
        TOPK_PADDED=triton.next_power_of_2(spec.topk),
        INIT=spec.init_blocks,
        LOCAL=spec.local_blocks,
        CANDIDATES=candidates,
        GROUPS=groups,
        GROUP=group,
        BY_SCORE=order == "score",
        VALUES=values is not None and wants is None,
        UNSCALE=unscales is not None,
        FEW=few,
        PDL=pdl,
        FENCE=scores.device.type == "cuda",
        SIGNALS=0 if signals is None else len(signals.numbers) // 2,
        num_warps=min(max(triton.next_power_of_2(groups * group) // 2048, 1), 8),
        **pdl_launch(pdl),
    )
