"""The paged cache: keys and values in blocks, and the step whose tokens are written and read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers.models.minimax_m3_vl import MiniMaxM3VLForCausalLM

from examples.paged_engine.request import Chunk


class Pages:
    """One kind of state of one layer, the keys for instance, in blocks: `[blocks, block_size, *shape]`."""

    def __init__(self, num_blocks: int, block_size: int, shape: Sequence[int], like: torch.Tensor) -> None:
        """Zeros, of the type and on the device of `like`."""
        self._states = like.new_zeros(num_blocks, block_size, *shape)

    def write(self, slots: torch.Tensor, states: torch.Tensor) -> None:
        """Writes `[tokens, *shape]` to these slots: block times block size, plus the place in the block."""
        self._states.flatten(0, 1)[slots] = states

    def read(self, table: Sequence[int], length: int) -> torch.Tensor:
        """The first `length` tokens of a block table, `[length, *shape]`."""
        return self._states[table].flatten(0, 1)[:length]


class Batch:
    """One step: chunks of requests, packed one after another.

    Attributes:
        step: its number, from 1.
        rows: `[N]`, each request's row.
        starts: `[N]`, position of each chunk's first token.
        lengths: `[N]`, tokens of each chunk.
        block_tables: `[N]`, the blocks of each request.
        token_ids: int64 `[T]`.
        positions: int64 `[T]`.
        slots: int64 `[T]`, where in the pages each token's states go.
    """

    def __init__(self, step: int, chunks: Sequence[Chunk], block_size: int, device: torch.device) -> None:
        self.step = step
        self.rows = [chunk.request.row for chunk in chunks if chunk.request.row is not None]
        self.starts = [chunk.start for chunk in chunks]
        self.lengths = [len(chunk.tokens) for chunk in chunks]
        self.block_tables = [list(chunk.request.blocks) for chunk in chunks]
        places = [
            (position, table[position // block_size] * block_size + position % block_size)
            for start, length, table in zip(self.starts, self.lengths, self.block_tables, strict=True)
            for position in range(start, start + length)
        ]
        self.positions, self.slots = torch.tensor(places, device=device).unbind(1)
        self.token_ids = torch.tensor([token for chunk in chunks for token in chunk.tokens], device=device)

    def __iter__(self) -> Iterator[tuple[slice, list[int], int]]:
        """For each chunk: which of the step's tokens are its own, its block table, and the length with them."""
        first = 0
        for start, length, table in zip(self.starts, self.lengths, self.block_tables, strict=True):
            yield slice(first, first + length), table, start + length
            first += length


class PagedCache:
    """What the model gets as `past_key_values`.

    Attributes:
        batch: the step that the model is in.
        keys, values: of each layer.
    """

    batch: Batch

    def __init__(self, model: MiniMaxM3VLForCausalLM, num_blocks: int, block_size: int) -> None:
        config = model.config
        shape = (config.num_key_value_heads, config.head_dim)
        like = next(model.parameters())
        self.keys = [Pages(num_blocks, block_size, shape, like) for _ in model.model.layers]
        self.values = [Pages(num_blocks, block_size, shape, like) for _ in model.model.layers]

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What attention calls: writes the new tokens' states, `[1, heads, T, head_dim]`; they are read by table."""
        self.keys[layer].write(self.batch.slots, keys[0].transpose(0, 1))
        self.values[layer].write(self.batch.slots, values[0].transpose(0, 1))
        return keys, values
