"""The arguments of the three data calls, checked with the server's own words and written into a request."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from blockdex.client.answers import Info
from blockdex.client.tensors import elements_of, rows_of
from blockdex.contract import limits as checks
from blockdex.contract.errors import InvalidArgumentError, Reason
from blockdex.contract.messages import FloatDtype, Order
from blockdex.v1 import indexer_pb2 as pb

Integers = int | Sequence[int] | NDArray[Any]
"""One integer, or one for each sequence of a request."""

Named = tuple[int, Integers, Integers | None, Integers | None, Integers | None, int | None]
"""The runs of a data call as its caller named them: layer, sequences, lengths, starts, revisions and epoch."""

Shape = tuple[int, int, int]
"""Of an answer: `[T, num_heads, topk]`, with no heads where there were no queries."""

Scores = bool | Literal["raw"]
"""Whether an answer carries scores: multiplied by the spec's scale (True), or `raw`, as they rank."""

DTYPES: dict[FloatDtype, pb.Dtype] = {
    "bf16": pb.DTYPE_BF16,
    "fp16": pb.DTYPE_FP16,
    "fp32": pb.DTYPE_FP32,
    "fp8_e4m3": pb.DTYPE_FP8_E4M3,
}
_NUMPY = (np.ndarray, np.integer)
_ORDERS = {"ascending": pb.SELECTION_ORDER_ASCENDING, "score": pb.SELECTION_ORDER_SCORE}
_SCORE_FORMATS = {False: pb.SCORE_FORMAT_UNSPECIFIED, True: pb.SCORE_FORMAT_SCALED, "raw": pb.SCORE_FORMAT_RAW}


@dataclass(slots=True)
class Spans:
    """The runs of a request: columns of Python integers.

    Attributes:
        starts: None where they are the client's to count.
        revisions: empty where unchecked.
        epoch: None for the one that the client knows.
    """

    layer: int
    sequences: list[int]
    lengths: list[int]
    starts: list[int] | None
    revisions: list[int]
    epoch: int | None


@dataclass(slots=True)
class Keys:
    """The appending half of a request, as the caller named it."""

    tensor: Any
    rollback: bool = False


@dataclass(slots=True)
class Queries:
    """The selecting half of a request, as the caller named it."""

    tensor: Any
    first_head: int
    num_heads: int
    order: Order
    return_scores: Scores
    wait_for_keys: bool = False


def spans_of(
    layer: int,
    sequences: Integers,
    lengths: Integers | None,
    starts: Integers | None,
    revisions: Integers | None,
    epoch: int | None,
    *,
    name: str,
    tensor: Any,
) -> Spans:
    """The spans of a data call; the length of a single sequence may be left to the rows of its tensor, so named.

    Raises:
        InvalidArgumentError: an integer that the wire cannot carry, or lengths left out for several sequences
            (INVALID_SPANS).
        TypeError: not integers, or the length left to what is no tensor.
    """
    columns = integers("sequences", sequences, bits=64)
    if lengths is not None:
        rows = integers("lengths", lengths, bits=32)
    elif len(columns) == 1:
        rows = [rows_of(name, tensor)]
    else:
        raise InvalidArgumentError(
            f"lengths: may be left out for 1 sequence only, got {len(columns)}", Reason.INVALID_SPANS
        )
    return Spans(
        layer=layer,
        sequences=columns,
        lengths=rows,
        starts=None if starts is None else integers("starts", starts, bits=32),
        revisions=[] if revisions is None else integers("revisions", revisions, bits=64),
        epoch=None if epoch is None else integer("epoch", epoch),
    )


def integer(name: str, value: int, *, bits: int = 64) -> int:
    """One integer that the wire can carry; raises as `integers`."""
    return integers(name, [value], bits=bits)[0]


def integers(name: str, value: Integers, *, bits: int) -> list[int]:
    """One integer or several, as a list that the wire can carry.

    Raises:
        InvalidArgumentError: one of them is below 0 or takes more bits (INVALID_SPANS).
        TypeError: not integers.
    """
    plain = value.tolist() if isinstance(value, _NUMPY) else value
    try:
        column = [plain] if isinstance(plain, int) else list(map(operator.index, plain))
    except TypeError:
        raise TypeError(f"{name} must be integers, got {value!r}") from None
    if column and not (min(column) >= 0 and max(column) >> bits == 0):
        beyond = next(number for number in column if not 0 <= number < 1 << bits)
        raise InvalidArgumentError(f"{name} must be 0 to {(1 << bits) - 1}, got {beyond}", Reason.INVALID_SPANS)
    return column


def fill(
    request: Any, info: Info, spans: Spans, starts: list[int], keys: Keys | None, queries: Queries | None
) -> Shape:
    """Checks everything that needs no cache, in the server's order, and writes it into the request.

    Args:
        request: empty, of the kind that takes keys, queries or both.
        info: what the server is.
        spans: the runs.
        starts: `[N]`, where they start.
        keys: `[T, D]` or None.
        queries: `[T, num_heads, D]` or None.

    Returns:
        The shape of the answer.

    Raises:
        BlockdexError: a field is out of bounds.
    """
    spec = info.spec
    checks.check_columns(spec, info.limits.max_spans, spans.sequences, starts, spans.lengths, spans.revisions)
    tokens, num_heads = sum(spans.lengths), 0
    num_bytes = 0
    if keys is not None:
        keys_dtype, vectors = elements_of("keys", keys.tensor)
        num_bytes = vectors.nbytes
    if queries is not None:
        num_heads = checks.check_heads(spec, queries.first_head, queries.num_heads)
        _fill_selection(request, queries)
        queries_dtype, asking = elements_of("queries", queries.tensor)
        num_bytes += asking.nbytes
    checks.check_message_bytes(num_bytes, info.limits.max_message_bytes)
    if keys is not None:
        _fill_tensor(request.keys, "keys", keys_dtype, vectors, (tokens, spec.head_dim))
        if keys.rollback:
            request.rollback = True
            request.header.required_features.append(pb.FEATURE_ROLLBACK)
    if queries is not None:
        _fill_tensor(request.queries, "queries", queries_dtype, asking, (tokens, num_heads, spec.head_dim))
    _fill_spans(request, spans, starts)
    return tokens, num_heads, spec.topk


def _fill_tensor(target: Any, name: str, dtype: FloatDtype, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        checks.check_tensor_bytes(name, dtype, array.nbytes, shape)
        checks.check_shape(name, array.shape, shape)
    target.dtype = DTYPES[dtype]
    target.data = array.tobytes()


def _fill_spans(request: Any, spans: Spans, starts: list[int]) -> None:
    request.layer = spans.layer
    columns = request.spans
    columns.sequence_ids.extend(spans.sequences)
    columns.starts.extend(starts)
    columns.lengths.extend(spans.lengths)
    if spans.revisions:
        columns.revisions.extend(spans.revisions)
        request.header.required_features.append(pb.FEATURE_REVISIONS)


def _fill_selection(request: Any, queries: Queries) -> None:
    if queries.first_head or queries.num_heads:
        request.first_head = queries.first_head
        request.num_heads = queries.num_heads
        request.header.required_features.append(pb.FEATURE_HEAD_RANGES)
    if queries.order != "ascending" or queries.return_scores is not False:
        request.order = _number_of(_ORDERS, queries.order, "order", Reason.INVALID_ORDER)
        scores = _number_of(_SCORE_FORMATS, queries.return_scores, "return_scores", Reason.INVALID_SCORES)
        request.return_scores = scores
        feature = pb.FEATURE_RAW_SCORES if scores == pb.SCORE_FORMAT_RAW else pb.FEATURE_SCORES
        request.header.required_features.append(feature)
    if queries.wait_for_keys:
        request.wait_for_keys = True
        request.header.required_features.append(pb.FEATURE_WAIT_FOR_KEYS)


def _number_of(numbers: Mapping[Any, int], word: object, name: str, reason: Reason) -> int:
    """The wire's number of a word; refuses what is none."""
    number = numbers.get(word) if isinstance(word, Hashable) else None
    if number is None:
        raise InvalidArgumentError(f"{name} must be one of {', '.join(map(str, numbers))}, got {word}", reason)
    return number
