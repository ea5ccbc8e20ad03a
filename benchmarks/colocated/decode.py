"""One more token of each of several sequences, in every layer, and the block ids that it must be answered.

Keys and queries are small integers, whose products are the same however they are summed: block ids are compared bit by
bit with those of a plain selection, ties included.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from blockdex import Client
from blockdex_kernels import IndexSpec

Array = NDArray[Any]


class Decode(NamedTuple):
    """What is asked, layer by layer.

    Attributes:
        keys: bfloat16 `[L, S, D]`.
        queries: bfloat16 `[L, S, H, D]`.
        block_ids: int32 `[L, S, H, topk]`, in ascending order.
    """

    keys: Array
    queries: Array
    block_ids: Array

    def write(self, path: Path) -> None:
        """Layer after layer, so that each lies in one piece."""
        with path.open("wb") as file:
            for parts in zip(*self, strict=True):
                for part in parts:
                    file.write(part.tobytes())

    @classmethod
    def read(cls, path: Path, spec: IndexSpec, sequences: int) -> Decode:
        """What `write` wrote of as many layers as there are."""
        shapes = ((spec.head_dim,), (spec.num_index_heads, spec.head_dim), (spec.num_index_heads, spec.topk))
        types = (ml_dtypes.bfloat16, ml_dtypes.bfloat16, np.int32)
        names = cls._fields
        layer = np.dtype(
            [(name, each, (sequences, *shape)) for name, each, shape in zip(names, types, shapes, strict=True)]
        )
        layers = np.fromfile(path, layer)
        return cls(*(np.ascontiguousarray(layers[name]) for name in names))


def make_decode(client: Client, spec: IndexSpec, ids: list[int], tokens: int, layers: int) -> Decode:
    """Opens sequences, appends so many tokens to each in so many layers, and says what to ask for the next one."""
    random = np.random.default_rng(ids[0])
    made = []
    client.open_sequences(ids)
    for layer in range(layers):
        keys = random.integers(-4, 5, (len(ids), tokens + 1, spec.head_dim), np.int8).astype(np.float32)
        queries = random.integers(-4, 5, (len(ids), spec.num_index_heads, spec.head_dim), np.int8).astype(np.float32)
        prompt = keys[:, :-1].astype(ml_dtypes.bfloat16).reshape(-1, spec.head_dim)
        client.append_keys(layer, sequences=ids, lengths=[tokens] * len(ids), starts=[0] * len(ids), keys=prompt)
        rows = (keys[:, -1].astype(ml_dtypes.bfloat16), queries.astype(ml_dtypes.bfloat16))
        made.append((*rows, select(spec, keys, queries)))
    return Decode(*map(np.stack, zip(*made, strict=True)))


def select(spec: IndexSpec, keys: Array, queries: Array) -> Array:
    """Block ids `[S, H, topk]` of queries `[S, H, D]` at the last of the keys `[S, T, D]`, both float32."""
    scores = queries @ keys.transpose(0, 2, 1)
    missing = -scores.shape[-1] % spec.block_size
    scores = np.pad(scores, ((0, 0), (0, 0), (0, missing)), constant_values=-np.inf)
    blocks = scores.reshape(*scores.shape[:2], -1, spec.block_size).max(-1)
    count = blocks.shape[-1]
    blocks[..., : spec.init_blocks] = blocks[..., max(count - spec.local_blocks, 0) :] = np.inf
    chosen = np.sort(np.argsort(-blocks, axis=-1, kind="stable")[..., : spec.topk], axis=-1).astype(np.int32)
    return np.pad(chosen, ((0, 0), (0, 0), (0, spec.topk - chosen.shape[-1])), constant_values=-1)
