"""A MiniMax-M3 text model small enough for two CPU cores: the real code with random weights from a seed."""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.minimax_m3_vl import MiniMaxM3VLForCausalLM, MiniMaxM3VLTextConfig
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLAttention

LAYER_TYPES = ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse", "minimax_m3_sparse"]


def build_model(device: str, *, block_size: int = 128, topk: int = 16) -> MiniMaxM3VLForCausalLM:
    """The model in bf16: bytes are its tokens, its three sparse layers have MiniMax-M3's indexer.

    Args:
        device: where it is to run.
        block_size: tokens of a block.
        topk: blocks that a query reads.
    """
    config = MiniMaxM3VLTextConfig(
        vocab_size=256,
        bos_token_id=None,
        eos_token_id=None,
        hidden_size=256,
        num_hidden_layers=len(LAYER_TYPES),
        layer_types=LAYER_TYPES,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        rope_parameters={"rope_type": "default", "rope_theta": 5_000_000.0, "partial_rotary_factor": 0.5},
        max_position_embeddings=16_384,
        mlp_layer_types=["dense"] + ["sparse"] * (len(LAYER_TYPES) - 1),
        dense_intermediate_size=512,
        num_local_experts=4,
        num_experts_per_tok=2,
        intermediate_size=256,
        shared_intermediate_size=256,
        index_n_heads=4,
        index_head_dim=128,
        index_block_size=block_size,
        index_topk_blocks=topk,
        index_local_blocks=1,
        initializer_range=0.08,
    )
    torch.manual_seed(0)
    model = MiniMaxM3VLForCausalLM(config)
    for layer in model.model.layers:
        # Random weights alone attend almost evenly; sharper attention makes the tokens hang on which blocks are read.
        torch.nn.init.constant_(layer.self_attn.q_norm.weight, 3.0)
    model.set_attn_implementation("sdpa")
    # By way of `Module`, whose methods have types; those of transformers that wrap them have none.
    return nn.Module.eval(nn.Module.to(model, device=device, dtype=torch.bfloat16))


def sparse_attentions(model: MiniMaxM3VLForCausalLM) -> list[MiniMaxM3VLAttention]:
    """The attention modules that have an indexer, in order: a place in this list is what blockdex calls a layer."""
    return [layer.self_attn for layer in model.model.layers if layer.self_attn.indexer is not None]
