"""Checks of a request that need no cache: shapes, sizes, bounds. Client and front door refuse with the same words."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from blockdex.errors import InvalidArgumentError, Reason, ResourceExhaustedError
from blockdex.messages import Spans
from blockdex_kernels import IndexSpec

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8_e4m3": 1}


def check_layer(spec: IndexSpec, layer: int) -> None:
    """Refuses a layer that the spec does not have."""
    if not 0 <= layer < spec.num_layers:
        raise InvalidArgumentError(f"layer must be below {spec.num_layers}, got {layer}", Reason.INVALID_LAYER)


def check_heads(spec: IndexSpec, first_head: int, num_heads: int) -> int:
    """The number of heads that a head range names (0 = all from `first_head`); refuses one beyond the spec's."""
    if not 0 <= first_head < spec.num_index_heads:
        raise InvalidArgumentError(
            f"first_head must be below {spec.num_index_heads}, got {first_head}", Reason.INVALID_HEADS
        )
    heads = num_heads or spec.num_index_heads - first_head
    if heads < 0 or first_head + heads > spec.num_index_heads:
        raise InvalidArgumentError(
            f"first_head + num_heads must be at most {spec.num_index_heads}, got {first_head} + {num_heads}",
            Reason.INVALID_HEADS,
        )
    return heads


def check_spans(
    spec: IndexSpec,
    max_spans: int,
    sequence_ids: ArrayLike,
    starts: ArrayLike,
    lengths: ArrayLike,
    revisions: Sequence[int] | NDArray[np.uint64] | None,
) -> Spans:
    """The columns as one message; refuses uneven or empty columns, duplicates, and positions out of bounds."""
    ids = np.asarray(sequence_ids, dtype=np.uint64)
    first = np.asarray(starts, dtype=np.int64)
    count = np.asarray(lengths, dtype=np.int64)
    revision = np.zeros(len(ids), np.uint64) if revisions is None else np.asarray(revisions, dtype=np.uint64)
    if not revision.size:
        revision = np.zeros(len(ids), np.uint64)
    if not len(ids) == len(first) == len(count) == len(revision):
        raise InvalidArgumentError(
            "spans: columns must be equally long, got "
            f"{len(ids)} sequence_ids, {len(first)} starts, {len(count)} lengths, {len(revision)} revisions",
            Reason.INVALID_SPANS,
        )
    if not 1 <= len(ids) <= max_spans:
        raise InvalidArgumentError(f"spans: must be 1 to {max_spans}, got {len(ids)}", Reason.INVALID_SPANS)
    spans = Spans(ids, first, count, revision)
    _check_positions(spec, spans)
    if len(ids) > 1 and len(np.unique(ids)) != len(ids):
        values, counts = np.unique(ids, return_counts=True)
        raise InvalidArgumentError(
            f"spans: sequence {values[counts > 1][0]} is named {counts.max()} times, at most 1 is allowed",
            Reason.DUPLICATE_SEQUENCE,
        )
    return spans


def _check_positions(spec: IndexSpec, spans: Spans) -> None:
    bad = (spans.starts < 0) | (spans.lengths < 1) | (spans.starts + spans.lengths > spec.max_sequence_tokens)
    if not bad.any():
        return
    row = int(np.argmax(bad))
    sequence, start, length = int(spans.sequence_ids[row]), int(spans.starts[row]), int(spans.lengths[row])
    if length < 1:
        raise InvalidArgumentError(
            f"sequence {sequence}: length must be at least 1, got {length}", Reason.INVALID_SPANS
        )
    if start < 0:
        raise InvalidArgumentError(f"sequence {sequence}: start must be at least 0, got {start}", Reason.INVALID_SPANS)
    raise InvalidArgumentError(
        f"sequence {sequence}: start + length must be at most {spec.max_sequence_tokens}, got {start} + {length}",
        Reason.INVALID_SPANS,
    )


def check_tensor_bytes(name: str, dtype: str, num_bytes: int, shape: tuple[int, ...]) -> None:
    """Refuses a tensor whose byte count is not what its shape and dtype give."""
    expected = math.prod(shape) * DTYPE_BYTES[dtype]
    if num_bytes != expected:
        raise InvalidArgumentError(
            f"{name}: {_dims(shape)} of {dtype} takes {expected} bytes, got {num_bytes}", Reason.INVALID_TENSOR
        )


def check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Refuses a tensor that has the right size in another shape, which only a client can see."""
    if shape != expected:
        raise InvalidArgumentError(
            f"{name}: shape must be {_dims(expected)}, got {_dims(shape)}", Reason.INVALID_TENSOR
        )


def _dims(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def check_message_bytes(num_bytes: int, max_message_bytes: int) -> None:
    """Refuses tensors that together are larger than a message may be."""
    if num_bytes > max_message_bytes:
        raise ResourceExhaustedError(
            f"keys and queries together must be at most {max_message_bytes} bytes, got {num_bytes}",
            Reason.MESSAGE_TOO_LARGE,
        )


def check_length(spec: IndexSpec, sequence_id: int, length: int) -> None:
    """Refuses a length, of a fork or a truncation, that no sequence can have."""
    if not 0 <= length <= spec.max_sequence_tokens:
        raise InvalidArgumentError(
            f"sequence {sequence_id}: length must be 0 to {spec.max_sequence_tokens}, got {length}",
            Reason.INVALID_LENGTH,
        )
