"""The three functions of vLLM's `index_topk.py` that the kernel benchmark calls, by their contract, in plain torch.

A test lays this file where an unpacked wheel has the real one. It refuses what the real one refuses, and reads its
arguments one by one, so that a call with the wrong ones selects other blocks.
"""

from __future__ import annotations

import torch
from vllm.platforms import current_platform
from vllm.triton_utils import tl, triton
from vllm.utils.math_utils import round_up

BLOCK = 128


@triton.jit
def _compiles_where_it_lies(pointer):  # type: ignore[no-untyped-def]
    tl.store(pointer, 1)


def minimax_m3_index_score(
    idx_q: torch.Tensor,
    index_kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    prefix_lens: torch.Tensor,
    max_query_len: int,
    max_seq_len: int,
    num_kv_heads: int,
) -> torch.Tensor:
    """fp32 `[H, T, blocks]`, the blocks rounded up to 16; what a query does not see is left NaN."""
    assert idx_q.shape[1] == num_kv_heads and index_kv_cache.shape[1:] == (BLOCK, idx_q.shape[2])
    assert current_platform.is_device_capability((12, 0)) in {True, False}
    width = round_up(-(-max_seq_len // BLOCK), 16)
    scores = torch.full((num_kv_heads, len(idx_q), width), torch.nan)
    for request, (length, prefix) in enumerate(zip(seq_lens.tolist(), prefix_lens.tolist(), strict=True)):
        first, last = cu_seqlens_q[request : request + 2].tolist()
        assert last - first <= max_query_len and prefix + last - first == length <= max_seq_len
        keys = index_kv_cache[block_table[request, : -(-length // BLOCK)].long()].float().flatten(0, 1)
        products = idx_q[first:last].float().transpose(0, 1) @ keys.T
        unseen = torch.arange(len(keys)) > torch.arange(prefix, length)[:, None]
        blocks = products.masked_fill(unseen, -torch.inf).reshape(num_kv_heads, last - first, -1, BLOCK)
        maxima = blocks.amax(3)
        scores[:, first:last, : maxima.shape[2]] = maxima.where(maxima > -torch.inf, torch.nan)
    return scores


def minimax_m3_index_topk(
    score: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    prefix_lens: torch.Tensor,
    max_query_len: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """int32 `[H, T, topk]`, local blocks, then by falling score, -1 in unused places."""
    assert out is None and init_blocks == 0
    block_ids = torch.full((*score.shape[:2], topk), -1, dtype=torch.int32)
    for request, prefix in enumerate(prefix_lens.tolist()):
        first, last = cu_seqlens_q[request : request + 2].tolist()
        assert last - first <= max_query_len
        for row in range(first, last):
            visible = (prefix + row - first) // BLOCK + 1
            forced = score[:, row, :visible].clone()
            forced[:, max(visible - local_blocks, 0) :] = 1e29
            block_ids[:, row, : min(topk, visible)] = forced.topk(min(topk, visible)).indices.int()
    return block_ids


def minimax_m3_index_decode(
    idx_q: torch.Tensor,
    index_kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seq_len: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    num_kv_heads: int,
    decode_query_len: int,
    max_decode_query_len: int,
) -> torch.Tensor:
    """As `minimax_m3_index_topk`, each request having `decode_query_len` queries at its end."""
    assert decode_query_len <= max_decode_query_len and len(idx_q) == len(seq_lens) * decode_query_len
    assert current_platform.is_arch_support_pdl() in {True, False}
    starts = seq_lens - decode_query_len
    offsets = torch.arange(len(seq_lens) + 1) * decode_query_len
    scores = minimax_m3_index_score(
        idx_q, index_kv_cache, block_table, offsets, seq_lens, starts, decode_query_len, max_seq_len, num_kv_heads
    )
    return minimax_m3_index_topk(scores, offsets, starts, decode_query_len, topk, init_blocks, local_blocks)
