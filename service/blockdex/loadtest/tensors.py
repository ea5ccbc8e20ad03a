"""Keys and queries out of a seed: any of them can be made again, so none has to be kept to check an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

_FEWEST_KEYS, _MOST_KEYS = 16_381, 262_139
_QUERIES = 2_039
# Odd and large, so that streams and layers begin all over the pool.
_STREAM_STRIDE, _LAYER_STRIDE = 104_729, 15_485_863


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive positions whose keys come from one stream."""

    start: int
    length: int
    stream: int


class TensorPool:
    """Random keys and queries, made once; a stream of keys walks over them, from somewhere else in each layer.

    The key and the query at a position follow from (seed, stream, layer, position) alone. A sequence that is longer
    than the pool meets its keys again, at another place inside a block.

    Args:
        heads: H, index heads of a query.
        head_dim: D.
        longest: tokens of the longest sequence; the pool is as long, within bounds.
        seed: of everything.
    """

    def __init__(self, *, heads: int, head_dim: int, longest: int, seed: int) -> None:
        numbers = np.random.default_rng(seed)
        rows = min(max(longest, _FEWEST_KEYS), _MOST_KEYS) | 1
        self._keys = _bits(numbers.standard_normal((rows, head_dim), dtype=np.float32))
        self._queries = _bits(numbers.standard_normal((_QUERIES, heads, head_dim), dtype=np.float32))

    def keys(self, layer: int, runs: Sequence[Run]) -> NDArray[Any]:
        """bfloat16 `[sum of lengths, D]`, run after run."""
        return self._keys[_places(layer, runs) % len(self._keys)].view(ml_dtypes.bfloat16)

    def queries(self, layer: int, runs: Sequence[Run]) -> NDArray[Any]:
        """bfloat16 `[sum of lengths, H, D]`, run after run."""
        return self._queries[_places(layer, runs) % len(self._queries)].view(ml_dtypes.bfloat16)


def _bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    # numpy gathers its own types several times faster than bfloat16.
    return values.astype(ml_dtypes.bfloat16).view(np.uint16)


def _places(layer: int, runs: Sequence[Run]) -> NDArray[np.int64]:
    columns = np.array([(run.start, run.length, run.stream) for run in runs], dtype=np.int64)
    starts, lengths, streams = columns.T
    firsts = starts + streams * _STREAM_STRIDE + layer * _LAYER_STRIDE
    before = np.cumsum(lengths) - lengths
    return np.repeat(firsts - before, lengths) + np.arange(lengths.sum())
