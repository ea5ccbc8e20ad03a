"""Runs as the host knows them: what a launch is planned from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blockdex_kernels.interface import Spans


@dataclass(frozen=True, slots=True)
class Runs:
    """Columns of runs of consecutive tokens, int32 `[R]` each.

    Attributes:
        rows: each run's row of the page table.
        layers: its layer.
        starts: position of its first token.
        lengths: its tokens.
    """

    rows: NDArray[np.int32]
    layers: NDArray[np.int32]
    starts: NDArray[np.int32]
    lengths: NDArray[np.int32]

    @classmethod
    def of(cls, spans: Spans) -> Runs:
        """The runs of spans: from their columns, or copied from the device, waiting for it."""
        columns = spans.columns
        if columns is None:
            columns = np.stack([column.cpu().numpy() for column in (spans.layers, spans.starts, spans.lengths)])
        return cls(np.arange(columns.shape[1], dtype=np.int32), *columns)

    @property
    def columns(self) -> NDArray[np.int32]:
        """int32 `[3, R]`: layers, starts and lengths, as `Spans.columns`."""
        return np.stack([self.layers, self.starts, self.lengths])

    def blocks(self, block_size: int) -> int:
        """Blocks that the longest sequence has."""
        return int((self.starts + self.lengths - 1).max(initial=0)) // block_size + 1

    def slices(self, tokens: int) -> Iterator[Runs]:
        """Cuts the packed tokens into slices of at most so many; a run may lie in several."""
        ends = np.cumsum(self.lengths, dtype=np.int64)
        for first in range(0, int(ends[-1]) if len(ends) else 0, tokens):
            begin = np.maximum(ends - self.lengths, first)
            lengths = np.minimum(ends, first + tokens) - begin
            inside = lengths > 0
            skipped = (begin - (ends - self.lengths))[inside]
            yield Runs(
                self.rows[inside],
                self.layers[inside],
                (self.starts[inside] + skipped).astype(np.int32),
                lengths[inside].astype(np.int32),
            )
