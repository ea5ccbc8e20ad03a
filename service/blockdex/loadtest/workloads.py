"""The shapes that scenarios and benchmarks draw from: what production engines asked of the MSA kernels, and how often.

Source: the benchmark cases published with the MiniMax MSA kernels (repository `MiniMax-AI/MSA`, MIT licence): its
fixed decode grid, and the sixteen single-request strata of its prefill selection. Shapes and weights only.
"""

from __future__ import annotations

import random
from typing import NamedTuple


class DecodeCase(NamedTuple):
    """A batch of sequences of about equal length that grow together; `weight` is its share of 10,000."""

    batch: int
    tokens: int
    weight: int


class PrefillCase(NamedTuple):
    """`queries` new tokens at the end of a sequence of `tokens` tokens; `weight` is the production calls behind it."""

    queries: int
    tokens: int
    weight: int


_BATCHES = (8, 32, 64, 128)
_WEIGHTS_BY_TOKENS = {
    1_000: (30, 90, 180, 300),
    4_000: (40, 120, 240, 400),
    5_000: (50, 150, 300, 500),
    10_000: (140, 350, 490, 420),
    50_000: (500, 800, 500, 200),
    100_000: (1260, 980, 420, 140),
    200_000: (910, 350, 112, 28),
}

DECODE_CASES = tuple(
    DecodeCase(batch, tokens, weight)
    for tokens, weights in _WEIGHTS_BY_TOKENS.items()
    for batch, weight in zip(_BATCHES, weights, strict=True)
)

PREFILL_CASES = (
    PrefillCase(171, 55_339, 1325),
    PrefillCase(338, 74_578, 1418),
    PrefillCase(347, 131_547, 312),
    PrefillCase(182, 17_718, 611),
    PrefillCase(9_844, 48_884, 110),
    PrefillCase(10_295, 85_815, 103),
    PrefillCase(8_476, 153_884, 14),
    PrefillCase(8_897, 25_537, 47),
    PrefillCase(1_404, 46_844, 492),
    PrefillCase(1_626, 93_146, 565),
    PrefillCase(1_649, 135_537, 180),
    PrefillCase(1_623, 18_007, 388),
    PrefillCase(16_384, 47_744, 2477),
    PrefillCase(16_384, 84_480, 1347),
    PrefillCase(16_384, 173_824, 35),
    PrefillCase(16_384, 27_136, 1010),
)


def lengths_around(batch: int, mean: int, numbers: random.Random) -> tuple[int, ...]:
    """Lengths of a decode batch, in pairs that keep their mean and lie a twentieth to a quarter of it away."""
    differences = [numbers.randint(max(1, mean // 20), mean // 4) for _ in range(batch // 2)]
    pairs = [length for difference in differences for length in (mean - difference, mean + difference)]
    return (*pairs, mean) if batch % 2 else tuple(pairs)
