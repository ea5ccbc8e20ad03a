"""The check: every selection of the pool is held against the model's own indexer over the same block tables."""

from __future__ import annotations

from collections import Counter

import torch
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLIndexer

from blockdex_kernels import IndexSpec, reference
from examples.paged_engine.cache import PagedCache
from examples.paged_engine.indexer import OwnIndexer, PoolIndexer
from examples.paged_engine.pool import IndexPool


class CheckedIndexer(PoolIndexer):
    """A `PoolIndexer` with the indexer that it replaces beside it; no engine needs it."""

    def __init__(
        self,
        own: MiniMaxM3VLIndexer,
        pool: IndexPool,
        layer: int,
        *,
        num_blocks: int,
        spec: IndexSpec,
        counts: Counter[str],
    ) -> None:
        """Counts what it compares in `counts`."""
        super().__init__(own, pool, layer)
        self.beside = OwnIndexer(own, num_blocks)
        self.spec = spec
        self.counts = counts

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: PagedCache,
        position_ids: torch.Tensor,
    ) -> torch.Tensor:
        """The answer of the pool, compared.

        Raises:
            SelectionMismatchError: names layer, row, query, blocks and their scores.
        """
        arguments = (hidden_states, position_embeddings, past_key_values, position_ids)
        block_ids, own = super().forward(*arguments), self.beside(*arguments)
        self.counts["selections compared"] += block_ids[..., 0].numel()
        more_blocks_than_topk = position_ids >= self.spec.topk * self.spec.block_size
        self.counts["selections that leave blocks out"] += int(more_blocks_than_topk.sum()) * block_ids.shape[1]
        if not torch.equal(block_ids.sort().values, own.sort().values):
            self._judge(block_ids[0].transpose(0, 1).cpu(), own[0].transpose(0, 1).cpu(), *arguments[:3])
        return block_ids

    def _judge(
        self,
        block_ids: torch.Tensor,
        own: torch.Tensor,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        cache: PagedCache,
    ) -> None:
        """Counts the blocks that rounding may have exchanged, by what the reference says of their scores."""
        projected = self.project(hidden_states, position_embeddings, cache)
        for row, start, (queries, _), (span, table, length) in zip(
            cache.batch.rows, cache.batch.starts, projected, cache.batch, strict=True
        ):
            keys = self.beside.pages.read(table, length)
            try:
                judge = reference.select(keys.cpu(), queries.cpu(), start, self.spec)
                self.counts["blocks exchanged by rounding"] += reference.count_flips(block_ids[span], own[span], judge)
            except reference.SelectionMismatchError as error:
                place = f"layer {self.layer}, row {row}, positions from {start}"
                raise reference.SelectionMismatchError(f"{place}: {error}") from error
