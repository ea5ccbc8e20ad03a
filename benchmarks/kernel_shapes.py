"""The published shapes as the kernel benchmark runs them, and the least that each of them asks of a chip."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from blockdex.loadtest.workloads import DECODE_CASES, PREFILL_CASES, lengths_around

BLOCK_SIZE, HEAD_DIM, HEADS = 128, 128, 4
DECODE_QUERIES = (1, 8)
"""Queries of a sequence in a decode: its one token, and it with seven draft tokens."""


@dataclass(frozen=True)
class Shape:
    """One call.

    Attributes:
        weight: how often production made it, as a part of its grid.
        tokens: of a sequence; in a decode the mean of the batch.
        queries: of each sequence, its last positions.
        lengths: tokens of each sequence.
    """

    weight: int
    tokens: int
    queries: int
    lengths: tuple[int, ...]

    def __str__(self) -> str:
        return f"{len(self.lengths)} x {self.queries} queries at {self.tokens:,}"

    @property
    def blocks(self) -> int:
        """Pages of all sequences."""
        return sum(-(-length // BLOCK_SIZE) for length in self.lengths)

    def key_bytes(self, element_bytes: int) -> int:
        """Bytes of the visible keys, read once for all heads and queries: the floor of a decode."""
        return sum(self.lengths) * HEAD_DIM * element_bytes

    def score_bytes(self) -> int:
        """Bytes of the visible scores, fp32, of all heads: what a top-k reads."""
        return 4 * HEADS * int(sum((self._positions(length) // BLOCK_SIZE + 1).sum() for length in self.lengths))

    def touched_bytes(self) -> int:
        """Bytes of a call's queries in bf16, keys in fp8 and scores: the least that it moves through the L2 cache."""
        query_bytes = 2 * HEAD_DIM * HEADS * self.queries * len(self.lengths)
        return query_bytes + self.key_bytes(1) + self.score_bytes()

    def operations(self) -> int:
        """Useful floating-point operations of scoring: those of the blocks that lie wholly before each query."""
        whole_blocks = sum(int((self._positions(length) // BLOCK_SIZE).sum()) for length in self.lengths)
        return 2 * BLOCK_SIZE * HEAD_DIM * HEADS * whole_blocks

    def _positions(self, length: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.arange(length - self.queries, length)


def decode_shapes(queries: int) -> list[Shape]:
    """The decode grid, the lengths of a batch drawn from a seed."""
    return [
        Shape(case.weight, case.tokens, queries, lengths_around(case.batch, case.tokens, random.Random(str(case))))
        for case in DECODE_CASES
    ]


def prefill_shapes() -> list[Shape]:
    """The prefill strata, of one sequence each."""
    return [Shape(case.weight, case.tokens, case.queries, (case.tokens,)) for case in PREFILL_CASES]


@dataclass(frozen=True)
class Workload:
    """What a run measures.

    Attributes:
        prefill: shapes of prefills, whole and in their stages.
        decode: shapes of decodes.
        rotated_bytes: what the calls of a replay touch together in a part, at least: several times what an L2 cache
            holds, and where calls are short enough to last a millisecond, beside which a replay's start is nothing.
        memory_bytes: what the roofline reads and copies.
        product: rows of the roofline's matrices.
    """

    prefill: list[Shape]
    decode: list[Shape]
    rotated_bytes: dict[str, int]
    memory_bytes: int
    product: int

    @property
    def pages(self) -> int:
        """Pages that hold any of the shapes."""
        return max(shape.blocks for shape in (*self.prefill, *self.decode))


FULL = Workload(
    prefill_shapes(),
    [shape for queries in DECODE_QUERIES for shape in decode_shapes(queries)],
    rotated_bytes={"prefill": 256 << 20, "scoring": 256 << 20, "topk": 4 << 30, "decode": 4 << 30},
    memory_bytes=4 << 30,
    product=8192,
)
QUICK = Workload(
    [min(prefill_shapes(), key=lambda shape: shape.operations())],
    [shape for queries in DECODE_QUERIES for shape in decode_shapes(queries) if sum(shape.lengths) <= 32_000],
    rotated_bytes=dict.fromkeys(("prefill", "scoring", "topk", "decode"), 0),
    memory_bytes=64 << 20,
    product=512,
)
"""A few small shapes: shows that everything runs, and measures nothing that counts."""
