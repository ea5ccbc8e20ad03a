"""A small inference engine: sequences in batches, prompts in chunks, forks, rollback. It knows nothing of blockdex."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers.models.minimax_m3_vl import MiniMaxM3VLForCausalLM


class History:
    """One kind of state of one layer, the keys for instance, for many sequences.

    Attributes:
        rows: `[heads, tokens, dim]` by sequence.
    """

    def __init__(self) -> None:
        self.rows: dict[int, torch.Tensor] = {}

    def append(self, sequences: Sequence[int], starts: Sequence[int], states: torch.Tensor) -> torch.Tensor:
        """Writes a row of `[batch, heads, tokens, dim]` to each sequence; what lay behind is gone.

        Returns:
            `[batch, heads, longest, dim]`: the sequences from their first token, padded with zeros on the right.
        """
        for sequence, start, row in zip(sequences, starts, states, strict=True):
            self.rows[sequence] = torch.cat([self.rows[sequence][:, :start], row], dim=1) if start else row
        rows = [self.rows[sequence] for sequence in sequences]
        longest = max(row.shape[1] for row in rows)
        return torch.stack([nn.functional.pad(row, (0, 0, 0, longest - row.shape[1])) for row in rows])

    def fork(self, parent: int, child: int, length: int) -> None:
        """Begins a sequence as the first `length` tokens of another."""
        self.rows[child] = self.rows[parent][:, :length]

    def close(self, sequence: int) -> None:
        """Forgets a sequence."""
        del self.rows[sequence]


class BatchCache:
    """What the model gets as `past_key_values`: attention keys and values, and which sequences this step is about.

    Rows are padded on the right, so that a token's slot is its position: whatever hides the tokens behind a query's
    position hides the padding too.

    Attributes:
        sequences: the rows of this step.
        starts: position of the first new token of each row.
        histories: all state that is kept by sequence.
    """

    def __init__(self, num_layers: int) -> None:
        self.sequences: Sequence[int] = ()
        self.starts: Sequence[int] = ()
        self._keys = [History() for _ in range(num_layers)]
        self._values = [History() for _ in range(num_layers)]
        self.histories = self._keys + self._values

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What attention calls: takes the states of the new tokens, returns those of all tokens so far."""
        return (
            self._keys[layer].append(self.sequences, self.starts, keys),
            self._values[layer].append(self.sequences, self.starts, values),
        )


class Engine:
    """Runs a model over batches of sequences that it names itself."""

    def __init__(self, model: MiniMaxM3VLForCausalLM, cache: BatchCache) -> None:
        self._model = model
        self._cache = cache

    def open(self, sequence: int) -> None:
        """Begins an empty sequence."""

    def fork(self, parent: int, child: int, length: int) -> None:
        """Begins a sequence as the first `length` tokens of another."""
        for history in self._cache.histories:
            history.fork(parent, child, length)

    def close(self, sequence: int) -> None:
        """Ends a sequence."""
        for history in self._cache.histories:
            history.close(sequence)

    @torch.inference_mode()
    def forward(
        self, sequences: Sequence[int], starts: Sequence[int], tokens: Sequence[Sequence[int]]
    ) -> list[list[int]]:
        """One step: equally many new tokens for every sequence. A start before a sequence's end rolls it back.

        Returns:
            For each of the tokens, the one that the model puts after it.
        """
        self._cache.sequences, self._cache.starts = sequences, starts
        device = next(self._model.parameters()).device
        token_ids = torch.tensor(tokens, device=device)
        positions = torch.tensor(starts, device=device)[:, None] + torch.arange(token_ids.shape[1], device=device)
        slots = torch.arange(max(starts) + token_ids.shape[1], device=device)
        logits = self._model(
            input_ids=token_ids,
            position_ids=positions,
            attention_mask=(slots <= positions[..., None])[:, None],
            past_key_values=self._cache,
            use_cache=True,
        ).logits
        following: list[list[int]] = logits.argmax(dim=-1).tolist()
        return following
