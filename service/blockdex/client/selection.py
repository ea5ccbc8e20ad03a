"""Block ids and scores out of an answer."""

from __future__ import annotations

from typing import Any

import numpy as np

from blockdex.client import compiled
from blockdex.client.failures import message_of
from blockdex.client.kinds import Kind
from blockdex.client.requests import Queries, Shape
from blockdex.client.tensors import array_like, tensor_like

_IDS, _SCORES = np.dtype("<i4"), np.dtype("<f4")


def selection_of(kind: Kind, answer: bytes, queries: Queries, shape: Shape) -> Any:
    """The block ids, or the pair of them and their scores, of the kind of the queries.

    Raises:
        DataLossError: the answer has another number of elements.
        InternalError: it is no answer of that kind.
    """
    if compiled.native is not None:
        tokens, num_heads, topk = shape
        quick = compiled.native.read_selection(answer, 4 * tokens * num_heads * topk, queries.return_scores)
        if quick is not None:
            ids, scores = quick
            block_ids = array_like(queries.tensor, _IDS, ids, shape)
            return block_ids if scores is None else (block_ids, array_like(queries.tensor, _SCORES, scores, shape))
    response = message_of(kind.response, answer)
    block_ids = tensor_like(queries.tensor, "block_ids", response.block_ids, shape)
    if not queries.return_scores:
        return block_ids
    return block_ids, tensor_like(queries.tensor, "scores", response.scores, shape)
