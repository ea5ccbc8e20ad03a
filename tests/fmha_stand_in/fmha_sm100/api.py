"""Plan and run of score-only attention, as strict as the kernels are not.

Where the real ones would read or write foreign memory, this one fails. Where they answer wrongly without a word, it
answers wrongly too: it misreads pages of another dtype, drops the scores of a plan that is too large, leaves alone what
they leave alone, and writes -inf one block behind a run where they do.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch

from . import jit

MAX_ELEMENTS = 2**31
MAX_WORK_ITEMS = 131_072
PACK_FACTORS = (16, 8, 6, 4, 2)

_busy = threading.Lock()


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """The staging buffers and workspaces are the process's: a second caller would overwrite them."""
    assert _busy.acquire(blocking=False), "two threads are in the package at once"
    try:
        yield
    finally:
        _busy.release()


def pack_factor_of(longest: int, num_qo_heads: int, num_kv_heads: int) -> int:
    """Heads of a query that share a tile."""
    if num_kv_heads == -1 or longest > 32:
        return 1
    ratio = num_qo_heads // num_kv_heads
    return next((factor for factor in PACK_FACTORS if factor * longest <= 128 and ratio % factor == 0), 1)


def _fmha_sm100_plan(
    qo_segment_lens: torch.Tensor,
    kv_segment_lens: torch.Tensor,
    num_qo_heads: int,
    num_kv_heads: int = -1,
    qo_offset: torch.Tensor | None = None,
    num_kv_splits: int = -1,
    page_size: int = -1,
    output_maxscore: bool = False,
    kv_block_num: int = -1,
    usable_SM_count: int = -1,  # noqa: N803 - its name
    causal: bool = True,
    sparse_kernel_mode: str = "auto",
    use_fp8_kvcache: bool = False,
    device: Any = None,
    stream: Any = None,
) -> dict[str, Any]:
    assert qo_offset is not None, "the planner reads the offsets of a causal mask"
    for name, tensor in (("qo", qo_segment_lens), ("kv", kv_segment_lens), ("offset", qo_offset)):
        assert tensor.device.type == "cpu" and tensor.dtype == torch.int32, f"{name}: int32 on the host"
        assert tensor.shape == qo_segment_lens.shape == (len(tensor),) and len(tensor), f"{name}: {tensor.shape}"
    assert (num_kv_heads, num_kv_splits, page_size, kv_block_num) == (1, 1, 128, -1)
    assert output_maxscore and causal
    assert usable_SM_count == -1 and sparse_kernel_mode == "auto" and not use_fp8_kvcache
    queries, keys, offsets = qo_segment_lens.tolist(), kv_segment_lens.tolist(), qo_offset.tolist()
    assert min(queries) >= 1 and min(offsets) >= 0
    assert all(offset + count == key for count, key, offset in zip(queries, keys, offsets, strict=True))
    assert sum(keys) < 2**31, "sums of keys have 32 bits"
    pack = pack_factor_of(max(queries), num_qo_heads, num_kv_heads)
    tile = 128 if max(queries) * pack <= 128 else 256
    items = sum(-(-count * pack // tile) for count in queries) * num_qo_heads // pack
    assert len(queries) <= 65_536 and items <= MAX_WORK_ITEMS, f"{items} work items are written behind their buffer"
    with _alone():
        time.sleep(0.0005)
        max_k_tiles = math.ceil(math.ceil(max(keys) / 128) / 128) * 128
        if num_qo_heads * max_k_tiles * sum(queries) > MAX_ELEMENTS:
            print("Too huge setting to output maxscore!")
            max_k_tiles = -1
    return {
        "max_k_tiles": max_k_tiles,
        "queries": queries,
        "keys": keys,
        "offsets": offsets,
        "num_heads": num_qo_heads,
        "pack": pack,
        "tile": tile,
    }


def _fmha_sm100(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan_info: dict[str, Any],
    kv_indices: torch.Tensor | None = None,
    kv_block_indexes: torch.Tensor | None = None,
    q_offset_override: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    max_score: torch.Tensor | None = None,
    sm_scale: float | None = None,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    o_scale: float | None = None,
    output_maxscore: bool = True,
    output_o: bool = True,
    check_input_valid: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    assert output_maxscore and not output_o and kv_block_indexes is q_offset_override is out is None
    assert kv_indices is not None and max_score is not None
    assert q.shape == (sum(plan_info["queries"]), plan_info["num_heads"], 128) and q.is_contiguous(), q.shape
    assert k.shape == v.shape == (len(k), 1, 128, 128) and k.is_contiguous(), k.shape
    assert len({tensor.device for tensor in (q, k, v, kv_indices, max_score)}) == 1
    assert kv_indices.dtype == torch.int32
    assert kv_indices.shape == (sum(-(-keys // 128) for keys in plan_info["keys"]),), "one id a block, no more, no less"
    width = plan_info["max_k_tiles"]
    if width == -1:
        return torch.zeros_like(q, dtype=torch.bfloat16), None
    assert max_score.dtype == torch.float32 and max_score.is_contiguous()
    assert max_score.shape == (len(q), q.shape[1], width), f"max_score: {list(max_score.shape)}, planned {width}"
    assert max_score.numel() < MAX_ELEMENTS, "offsets have 32 bits"
    jit.get_fmha_variant(q.dtype, plan_info["tile"], plan_info["tile"] == 128 and _rows(plan_info) <= 64, plan_info)
    with _alone():
        if not q.is_meta:  # Where only shapes are known, only they are checked.
            assert kv_indices.min() >= 0 and kv_indices.max() < len(k), "an id that the cache does not have"
            _score(q, _as_read(k, q.dtype), plan_info, kv_indices, max_score)
    return None, max_score


def _rows(plan: dict[str, Any]) -> int:
    return int(max(plan["queries"]) * plan["pack"])


def _as_read(k: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The keys of each page, as kernels for queries of a dtype read them: its bits are not asked what they are."""
    if dtype == k.dtype:
        return k[:, 0]
    raw = k.reshape(-1).view(torch.uint8).view(dtype)
    return raw.repeat(-(-k.numel() // len(raw)))[: k.numel()].view(len(k), 128, 128)


def _score(q: torch.Tensor, pages: torch.Tensor, plan: dict[str, Any], ids: torch.Tensor, buffer: torch.Tensor) -> None:
    page_ids = torch.split(ids.long(), [-(-keys // 128) for keys in plan["keys"]])
    first = 0
    for count, keys, offset, mine in zip(plan["queries"], plan["keys"], plan["offsets"], page_ids, strict=True):
        bits = pages.view(torch.uint8)[mine]  # Not every torch build gathers fp8.
        scores = _block_scores(q[first : first + count], bits.view(pages.dtype).flatten(0, 1), keys, offset)
        for row in range(count):
            blocks = _written(row, keys, offset, plan)
            inside = min(blocks, len(mine))
            assert blocks <= buffer.shape[2], "scores are written into the next row"
            buffer[first + row, :, :inside] = scores[row, :, :inside]
            buffer[first + row, :, inside:blocks] = -math.inf
        first += count


def _written(row: int, keys: int, offset: int, plan: dict[str, int]) -> int:
    """Blocks that are written for a row: those that any row of its tile sees; in pairs where tiles are narrow."""
    tile_rows = plan["tile"] // plan["pack"]
    seen = min(keys, offset + (row // tile_rows + 1) * tile_rows)
    return -(-seen // 128) if plan["tile"] == 256 else -(-seen // 256) * 2


def _block_scores(q: torch.Tensor, keys: torch.Tensor, num_keys: int, offset: int) -> torch.Tensor:
    """float32 `[T, H, blocks]`: the greatest product that is a number and not masked, else -inf."""
    products = q.float() @ keys.float().T
    places = torch.arange(len(keys), device=q.device)
    later = places > torch.arange(offset, offset + len(q), device=q.device)[:, None]
    products.masked_fill_((later | (places >= num_keys))[:, None], -math.inf)
    products.masked_fill_(products.isnan(), -math.inf)
    return products.view(*products.shape[:2], -1, 128).amax(3)
