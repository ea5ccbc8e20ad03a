"""Block ids and scores out of an answer."""

from __future__ import annotations

from typing import Any

from blockdex.client.requests import Queries, Shape
from blockdex.client.tensors import tensor_like


def selection_of(answer: Any, queries: Queries, shape: Shape) -> Any:
    """The block ids, or the pair of them and their scores, of the kind of the queries.

    Raises:
        DataLossError: the answer has another number of elements.
    """
    block_ids = tensor_like(queries.tensor, "block_ids", answer.block_ids, shape)
    if not queries.return_scores:
        return block_ids
    return block_ids, tensor_like(queries.tensor, "scores", answer.scores, shape)
