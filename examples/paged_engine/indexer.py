"""A sparse layer's indexer over block tables: the model's own, and one that asks a pool."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import nn
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLIndexer

from examples.paged_engine.cache import PagedCache, Pages
from examples.paged_engine.pool import IndexPool
from examples.transformers_engine.indexer import project


class OwnIndexer(nn.Module):
    """The model's own code, request by request, over pages of index keys: what a pool takes off the engine."""

    def __init__(self, own: MiniMaxM3VLIndexer, num_blocks: int) -> None:
        super().__init__()
        self.own = own
        self.pages = Pages(num_blocks, own.block_size, (own.head_dim,), own.k_proj.weight)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: PagedCache,
        position_ids: torch.Tensor,
    ) -> torch.Tensor:
        """The blocks that attention reads, int64 `[1, heads, T, topk]`, -1 in unused places."""
        answers = []
        for span, table, length in past_key_values.batch:
            rotation = (position_embeddings[0][:, span], position_embeddings[1][:, span])
            history = _History(self.pages, past_key_values.batch.slots[span], table, length)
            cache = SimpleNamespace(layers={self.own.layer_idx: history})
            block_ids = self.own(hidden_states[:, span], rotation, cache, position_ids[:, span])
            answers.append(nn.functional.pad(block_ids, (0, self.own.topk_blocks - block_ids.shape[-1]), value=-1))
        return torch.cat(answers, dim=2)


class _History:
    """What the model's own indexer asks for one request's keys."""

    def __init__(self, pages: Pages, slots: torch.Tensor, table: list[int], length: int) -> None:
        self._pages, self._slots, self._table, self._length = pages, slots, table, length

    def update_index(self, keys: torch.Tensor) -> torch.Tensor:
        """Takes the new tokens' keys, `[1, 1, tokens, head_dim]`, returns those of all tokens so far."""
        self._pages.write(self._slots, keys[0, 0])
        return self._pages.read(self._table, self._length)[None, None]


class PoolIndexer(nn.Module):
    """Keeps the model's projections; the keys and the scoring are the server's."""

    def __init__(self, own: MiniMaxM3VLIndexer, pool: IndexPool, layer: int) -> None:
        """Takes over from `own` in the sparse layer of ordinal `layer`."""
        super().__init__()
        self.own = own
        self.pool = pool
        self.layer = layer

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: PagedCache,
        position_ids: torch.Tensor,  # noqa: ARG002 - the model names it
    ) -> torch.Tensor:
        """The blocks that attention reads, int64 `[1, heads, T, topk]`, -1 in unused places."""
        projected = list(self.project(hidden_states, position_embeddings, past_key_values))
        queries, keys = (torch.cat(parts) for parts in zip(*projected, strict=True))
        block_ids = self.pool.append_and_select(self.layer, past_key_values.batch, keys, queries)
        return block_ids.transpose(0, 1)[None].long()

    def project(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: PagedCache,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Index queries `[tokens, heads, head_dim]` and keys `[tokens, head_dim]` of each request.

        An engine projects the whole step at once. Request by request rounds as the model's own indexer does beside it.
        """
        for span, _, _ in past_key_values.batch:
            rotation = (position_embeddings[0][:, span], position_embeddings[1][:, span])
            queries, keys = project(self.own, hidden_states[:, span], rotation)
            yield queries[0], keys[0, :, 0]
