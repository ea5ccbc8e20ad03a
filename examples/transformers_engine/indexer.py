"""All that changes in an engine on blockdex: the indexer of a sparse layer, and three calls about sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers.models.minimax_m3_vl import MiniMaxM3VLForCausalLM
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLIndexer, apply_rotary_pos_emb

import blockdex
from examples.transformers_engine.engine import BatchCache, Engine
from examples.transformers_engine.model import sparse_attentions


class BlockdexIndexer(nn.Module):
    """In the place of a `MiniMaxM3VLIndexer`: keeps its projections; its keys and its scoring are the server's."""

    def __init__(self, own: MiniMaxM3VLIndexer, client: blockdex.Client, layer: int) -> None:
        """Takes over from `own` in the sparse layer of ordinal `layer`."""
        super().__init__()
        self.own = own
        self.build_block_mask = own.build_block_mask
        self.client = client
        self.layer = layer

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: BatchCache,
        position_ids: torch.Tensor,
    ) -> torch.Tensor:
        """The blocks that attention reads, int64 `[batch, heads, tokens, topk]`, -1 in unused places."""
        batch, num_tokens, _ = hidden_states.shape
        queries, keys = project(self.own, hidden_states, position_embeddings)
        block_ids = self.select(
            sequences=past_key_values.sequences,
            starts=position_ids[:, 0].tolist(),
            lengths=[num_tokens] * batch,
            keys=keys.flatten(0, 2),
            queries=queries.flatten(0, 1),
        )
        return block_ids.view(batch, num_tokens, *block_ids.shape[1:]).transpose(1, 2).long()

    def select(
        self,
        sequences: Sequence[int],
        starts: Sequence[int],
        lengths: Sequence[int],
        keys: torch.Tensor,
        queries: torch.Tensor,
    ) -> torch.Tensor:
        """Sends keys `[T, head_dim]` and queries `[T, heads, head_dim]` of a step; answers int32 `[T, heads, topk]`."""
        block_ids: torch.Tensor = self.client.append_and_select(
            self.layer,
            sequences=sequences,
            starts=starts,
            lengths=lengths,
            keys=keys,
            queries=queries,
            rollback=True,  # Drafts that were rejected are written over.
        )
        return block_ids


def project(
    indexer: MiniMaxM3VLIndexer, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Index queries `[batch, tokens, heads, head_dim]` and index keys `[batch, tokens, 1, head_dim]`."""
    shape = (*hidden_states.shape[:2], -1, indexer.head_dim)
    queries = indexer.q_norm(indexer.q_proj(hidden_states).view(shape))
    keys = indexer.k_norm(indexer.k_proj(hidden_states).view(shape))
    cosine, sine = (part[..., : indexer.head_dim] for part in position_embeddings)
    rotate: Callable[..., tuple[torch.Tensor, torch.Tensor]] = apply_rotary_pos_emb
    return rotate(queries, keys, cosine, sine, unsqueeze_dim=2)


def replace_indexers(
    model: MiniMaxM3VLForCausalLM, replacement: Callable[[MiniMaxM3VLIndexer, int], nn.Module]
) -> None:
    """Puts `replacement(own, layer)` in the place of every sparse layer's indexer; layers count from 0."""
    for layer, attention in enumerate(sparse_attentions(model)):
        own = attention.indexer.own if isinstance(attention.indexer, BlockdexIndexer) else attention.indexer
        assert own is not None
        attention.register_module("indexer", replacement(own, layer))


class BlockdexEngine(Engine):
    """An engine that tells the server where a sequence begins and ends; rolling back needs no call of its own."""

    def __init__(self, model: MiniMaxM3VLForCausalLM, cache: BatchCache, client: blockdex.Client) -> None:
        super().__init__(model, cache)
        self._client = client

    def open(self, sequence: int) -> None:
        """Begins an empty sequence."""
        self._client.open_sequence(sequence)
        super().open(sequence)

    def fork(self, parent: int, child: int, length: int) -> None:
        """Begins a sequence as the first `length` tokens of another."""
        self._client.fork_sequence(parent, child, length)
        super().fork(parent, child, length)

    def close(self, sequence: int) -> None:
        """Ends a sequence."""
        self._client.close_sequence(sequence)
        super().close(sequence)
