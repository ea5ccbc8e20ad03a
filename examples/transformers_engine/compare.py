"""The check: every selection of blockdex is held against the model's own indexer on the same hidden states."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.models.minimax_m3_vl import MiniMaxM3VLForCausalLM
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLIndexer

import blockdex
from blockdex_kernels import reference
from blockdex_kernels.interface import FP8_FLIP_TOLERANCE
from examples.transformers_engine.engine import BatchCache, History
from examples.transformers_engine.indexer import BlockdexIndexer, project, replace_indexers
from examples.transformers_engine.model import sparse_attentions

MAX_DECODE_TOKENS = 16


class LayerIndexKeys(History):
    """Index keys of one layer."""

    def __init__(self, cache: BatchCache) -> None:
        super().__init__()
        self._cache = cache

    def update_index(self, index_keys: torch.Tensor) -> torch.Tensor:
        """What the model's own indexer calls: takes the new tokens' keys, returns those of all tokens so far."""
        return self.append(self._cache.sequences, self._cache.starts, index_keys)


class OwnIndexCache(BatchCache):
    """Index keys beside keys and values: what the model's own indexer asks of an engine, and blockdex takes off it."""

    def __init__(self, model: MiniMaxM3VLForCausalLM) -> None:
        super().__init__(len(model.model.layers))
        self.layers = {attention.layer_idx: LayerIndexKeys(self) for attention in sparse_attentions(model)}
        self.histories += self.layers.values()


@dataclass
class Tally:
    """What was counted over a run.

    Attributes:
        selections: rows compared, one for every layer, query and head.
        flips: rows that differ between blocks whose scores lie within the bound.
        flips_until: sequence and position of every token that went in, to the flips counted until it came out.
        call_seconds: how long each call took, by phase (`decode`: a few tokens a sequence, `prefill`: a chunk).
    """

    selections: int = 0
    flips: int = 0
    flips_until: dict[tuple[int, int], int] = field(default_factory=dict)
    call_seconds: dict[str, list[float]] = field(default_factory=lambda: {"decode": [], "prefill": []})


def flip_tolerance(info: blockdex.Info) -> float:
    """How far apart the scores of exchanged blocks may be, by what the server says of its kernels.

    Times |query| times the greatest |key|. Tensor cores that multiply e4m3 sum with fewer bits than float32 has.
    """
    native_fp8 = any(kernel.endswith("-fp8") for kernel, _ in info.kernels.values())
    return FP8_FLIP_TOLERANCE if native_fp8 else reference.FLIP_TOLERANCE


class CheckedIndexer(BlockdexIndexer):
    """A `BlockdexIndexer` that times its calls and holds the answers against the indexer that it replaces."""

    def __init__(
        self, own: MiniMaxM3VLIndexer, client: blockdex.Client, layer: int, info: blockdex.Info, tally: Tally
    ) -> None:
        super().__init__(own, client, layer)
        self.spec = info.spec
        self.tolerance = flip_tolerance(info)
        self.tally = tally

    def select(
        self,
        sequences: Sequence[int],
        starts: Sequence[int],
        lengths: Sequence[int],
        keys: torch.Tensor,
        queries: torch.Tensor,
    ) -> torch.Tensor:
        """The answer of blockdex, timed."""
        start = time.perf_counter()
        block_ids = super().select(sequences, starts, lengths, keys, queries)
        phase = "decode" if max(lengths) <= MAX_DECODE_TOKENS else "prefill"
        self.tally.call_seconds[phase].append(time.perf_counter() - start)
        return block_ids

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: BatchCache,
        position_ids: torch.Tensor,
    ) -> torch.Tensor:
        """The answer of blockdex, compared.

        Raises:
            SelectionMismatchError: names layer, sequence, positions, blocks and their scores.
        """
        assert isinstance(past_key_values, OwnIndexCache)
        block_ids = super().forward(hidden_states, position_embeddings, past_key_values, position_ids)
        own = self.own(hidden_states, position_embeddings, past_key_values, position_ids)
        own = nn.functional.pad(own, (0, self.spec.topk - own.shape[-1]), value=-1)
        queries, _ = project(self.own, hidden_states, position_embeddings)
        for row, (sequence, start) in enumerate(zip(past_key_values.sequences, past_key_values.starts, strict=True)):
            keys = past_key_values.layers[self.own.layer_idx].rows[sequence]
            try:
                self._compare(keys[0], queries[row], start, block_ids[row], own[row])
            except reference.SelectionMismatchError as error:
                place = f"layer {self.layer}, sequence {sequence}, positions from {start}"
                raise reference.SelectionMismatchError(f"{place}: {error}") from error
        for sequence, position in zip(past_key_values.sequences, position_ids.tolist(), strict=True):
            self.tally.flips_until.update(((sequence, each), self.tally.flips) for each in position)
        return block_ids

    def _compare(
        self, keys: torch.Tensor, queries: torch.Tensor, start: int, block_ids: torch.Tensor, own: torch.Tensor
    ) -> None:
        """Compares the selections `[heads, tokens, topk]` of one sequence; the reference judges what differs.

        An fp8 cache rounds what the model's own indexer does not: there the reference says what to expect.
        """
        self.tally.selections += block_ids.shape[0] * block_ids.shape[1]
        comparable = self.spec.key_dtype == "bf16"
        if comparable and not _differing_rows(block_ids, own):
            return
        judge = reference.select(keys.cpu(), queries.cpu(), start, self.spec, flip_tolerance=self.tolerance)
        ours = block_ids.cpu().transpose(0, 1)
        expected = own.cpu().transpose(0, 1) if comparable else judge.block_ids
        reference.count_flips(ours, expected, judge)
        self.tally.flips += _differing_rows(ours, expected)


def _differing_rows(ours: torch.Tensor, theirs: torch.Tensor) -> int:
    return int((ours.sort().values != theirs.sort().values).any(dim=-1).sum())


def use_checked_blockdex(
    model: MiniMaxM3VLForCausalLM, client: blockdex.Client, info: blockdex.Info, tally: Tally
) -> None:
    """Puts the model on blockdex, with the check beside it; `info` is what the server says it is."""
    replace_indexers(model, lambda own, layer: CheckedIndexer(own, client, layer, info, tally))
