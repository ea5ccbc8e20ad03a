"""Attention over the pages: each request reads its own block table, in sparse layers only the blocks it was told."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.models.minimax_m3_vl import MiniMaxM3VLForCausalLM
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLAttention

from examples.paged_engine.cache import PagedCache


def use_paged_attention(model: MiniMaxM3VLForCausalLM) -> None:
    """Lets the model's layers call `paged_attention`."""
    AttentionInterface.register("paged_blocks", paged_attention)
    model.set_attn_implementation("paged_blocks")


def paged_attention(
    module: MiniMaxM3VLAttention,
    query: torch.Tensor,
    *_: torch.Tensor | None,
    scaling: float,
    block_indices: torch.Tensor | None,
    paged_cache: PagedCache,
    **__: object,
) -> tuple[torch.Tensor, None]:
    """What the model's layers call with a step's packed tokens.

    Args:
        module: the layer's attention.
        query: `[1, heads, T, head_dim]`.
        _: keys and values of the step's tokens, which the pages have already, and no mask.
        scaling: of the scores.
        block_indices: the selected blocks, int64 `[1, index heads, T, topk]`, -1 in unused places; None: all are read.
        paged_cache: the pages, and the step's block tables.

    Returns:
        `[1, T, heads, head_dim]`, and no weights.
    """
    outputs = []
    for span, table, length in paged_cache.batch:
        keys = paged_cache.keys[module.layer_idx].read(table, length).transpose(0, 1)
        values = paged_cache.values[module.layer_idx].read(table, length).transpose(0, 1)
        visible = torch.arange(length, device=query.device) <= paged_cache.batch.positions[span, None]
        if block_indices is not None:
            # A kernel reads the selected blocks alone; here the others are masked.
            selected = selected_tokens(block_indices[0, :, span], len(table), module.config.index_block_size)[
                ..., :length
            ]
            visible = (visible & selected).repeat_interleave(query.shape[1] // selected.shape[0], dim=0)
        outputs.append(
            nn.functional.scaled_dot_product_attention(
                query[0, :, span], keys, values, attn_mask=visible, scale=scaling, enable_gqa=True
            )
        )
    return torch.cat(outputs, dim=1).transpose(0, 1)[None], None


def selected_tokens(block_ids: torch.Tensor, num_blocks: int, block_size: int) -> torch.Tensor:
    """Which tokens lie in the blocks: bool `[heads, queries, num_blocks * block_size]` of `[heads, queries, topk]`."""
    selected = torch.zeros(*block_ids.shape[:2], num_blocks + 1, dtype=torch.bool, device=block_ids.device)
    # Unused places go to a column of their own, which is dropped.
    selected.scatter_(-1, block_ids.masked_fill(block_ids < 0, num_blocks), value=True)
    return selected[..., :num_blocks].repeat_interleave(block_size, dim=-1)
