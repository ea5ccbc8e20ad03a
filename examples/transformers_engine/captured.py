"""Decoding without the host: a step of all sequences in one CUDA graph, in which the GPU asks blockdex by itself.

Nothing of a step may hang on its number: attention's keys and values have room for the longest sequence, positions are
on the device, and a device channel takes them from there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.models.minimax_m3_vl import MiniMaxM3VLForCausalLM
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLIndexer

import blockdex
from blockdex.device_channel.channel import DeviceChannel
from examples.transformers_engine.engine import BatchCache
from examples.transformers_engine.indexer import BlockdexIndexer, project, replace_indexers
from examples.transformers_engine.requests import CHUNK_TOKENS, Request


class StaticCache(BatchCache):
    """Attention keys and values of a batch that stays, each sequence in a row of a fixed length.

    Attributes:
        rows: int64 `[batch]`, those of this step.
        positions: int64 `[batch, tokens]`, of its tokens.
    """

    def __init__(self, model: MiniMaxM3VLForCausalLM, batch: int, length: int) -> None:
        super().__init__(0)
        config, like = model.config, next(model.parameters())
        shape = (config.num_hidden_layers, 2, batch, config.num_key_value_heads, length, config.head_dim)
        self._states = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.length = length
        self.rows = torch.arange(batch, device=like.device)
        self.positions = torch.zeros(batch, 1, dtype=torch.int64, device=like.device)

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What attention calls: takes the states of the new tokens, returns whole rows, zeros behind the last token."""
        every = self._states[layer]
        for states, new in zip(every, (keys, values), strict=True):
            states[self.rows[:, None], :, self.positions] = new.transpose(1, 2)
        return every[0, self.rows], every[1, self.rows]


class ChannelIndexer(BlockdexIndexer):
    """Asks over a device channel where all sequences decode, and over its client, as ever, for prompts."""

    def __init__(
        self, own: MiniMaxM3VLIndexer, client: blockdex.Client, layer: int, channel: DeviceChannel, ids: torch.Tensor
    ) -> None:
        super().__init__(own, client, layer)
        self._channel, self._ids = channel, ids

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: BatchCache,
        position_ids: torch.Tensor,
    ) -> torch.Tensor:
        """As `BlockdexIndexer.forward`."""
        batch, num_tokens, _ = hidden_states.shape
        if (batch, num_tokens) != (len(self._ids), 1):
            return super().forward(hidden_states, position_embeddings, past_key_values, position_ids)
        queries, keys = project(self.own, hidden_states, position_embeddings)
        block_ids = self._channel.append_and_select(
            self.layer,
            sequences=self._ids,
            starts=position_ids[:, 0].contiguous(),
            lengths=torch.ones_like(self._ids),
            keys=keys[:, :, 0].contiguous(),
            queries=queries.contiguous(),
            rollback=True,
        )
        return block_ids.transpose(1, 2).long()


def use_channel(
    model: MiniMaxM3VLForCausalLM, client: blockdex.Client, channel: DeviceChannel, ids: torch.Tensor
) -> None:
    """Puts the model on a device channel for the sequences `ids`, int64 `[batch]` where the model is."""
    replace_indexers(model, lambda own, layer: ChannelIndexer(own, client, layer, channel, ids))


class StaticDecode:
    """Serves a batch of requests from their prompts on.

    Args:
        model: on blockdex.
        requests: without parents and drafts.
        length: of the longest sequence, its answer included.

    Attributes:
        cache: attention's.
        tokens: int64 `[batch, 1]`, those that go in next.
    """

    def __init__(self, model: MiniMaxM3VLForCausalLM, requests: Sequence[Request], length: int) -> None:
        self._model, self._requests = model, requests
        self.cache = StaticCache(model, len(requests), length)
        self._slots = torch.arange(length, device=self.cache.rows.device)
        self.tokens = torch.zeros_like(self.cache.positions)

    @torch.inference_mode()
    def prefill(self) -> None:
        """Takes the prompts in, chunk by chunk; their sequences are open."""
        cache = self.cache
        every, positions = cache.rows, cache.positions
        for row, request in enumerate(self._requests):
            cache.rows, cache.sequences = every[row : row + 1], [request.sequence]
            for start in range(0, len(request.prompt), CHUNK_TOKENS):
                chunk = torch.tensor([list(request.prompt[start : start + CHUNK_TOKENS])], device=every.device)
                cache.positions = torch.arange(start, start + chunk.shape[1], device=every.device)[None]
                self.tokens[row] = self._following(chunk)[0, -1]
            positions[row] = len(request.prompt)
        cache.rows, cache.positions = every, positions
        cache.sequences = [request.sequence for request in self._requests]

    @torch.inference_mode()
    def generate(self, new_tokens: int, *, captured: bool) -> list[list[int]]:
        """The first `new_tokens` tokens of each; `captured`: all steps but the first replay a CUDA graph."""
        made = [self.tokens.clone()]

        def step() -> None:
            self.tokens.copy_(self._following(self.tokens))
            self.cache.positions.add_(1)

        run = step
        for number in range(1, new_tokens):
            if captured and number == 2:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    step()
                run = graph.replay
            run()
            made.append(self.tokens.clone())
        tokens: list[list[int]] = torch.cat(made, dim=1).tolist()
        return tokens

    def _following(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = self.cache.positions
        logits: torch.Tensor = self._model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=(self._slots <= positions[..., None])[:, None],
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        return logits.argmax(dim=-1)
