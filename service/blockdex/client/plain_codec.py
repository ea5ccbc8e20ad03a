"""What `blockdex._native` does for the client, in Python: for an install that has no compiled module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from numpy.typing import NDArray

from blockdex.client.frames import framed
from blockdex.client.kinds import TOKEN_KINDS, Kind
from blockdex.client.lengths import Layers, Sequences
from blockdex.client.requests import ArrayOf, Selected, Shape, integer, integers
from blockdex.contract.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
    ResourceExhaustedError,
)
from blockdex.v1 import indexer_pb2 as pb

_ORDERS = {"ascending": pb.SELECTION_ORDER_UNSPECIFIED, "score": pb.SELECTION_ORDER_SCORE}
_SCORE_FORMATS = {False: pb.SCORE_FORMAT_UNSPECIFIED, True: pb.SCORE_FORMAT_SCALED, "raw": pb.SCORE_FORMAT_RAW}
_IDS = {"blocks": pb.SELECTED_IDS_UNSPECIFIED, "pages": pb.SELECTED_IDS_PAGES}


class TokenRequest:
    """As `blockdex.client.requests.TokenRequest`; what it sends is in `body`."""

    def __init__(self, kind: Kind, body: Any, at_ends: bool, shape: Shape) -> None:
        self.shape = shape
        self._kind = kind
        self._body = body
        self._at_ends = at_ends
        self._writes: list[tuple[Layers, int, int]] = []

    @property
    def epoch(self) -> int:
        """That it names."""
        return int(self._body.header.epoch)

    @property
    def repeatable(self) -> bool:
        """Whether sending it twice has the effect of sending it once."""
        revisions = self._body.spans.revisions
        return not self._kind.appends or (bool(revisions) and all(revisions))

    def place(self, sequences: Sequences) -> None:
        """Has a selection without starts ask for the last positions."""
        if not self._at_ends or self._body.spans.pool_id:
            return
        spans = self._body.spans
        lengths = self._lengths(sequences)
        for sequence, rows, length in zip(spans.sequence_ids, spans.lengths, lengths, strict=False):
            if rows > length:
                where = f"sequence {sequence}, layer {self._body.layer}"
                message = f"{where}: its last {rows} positions are asked for, its length is {length}"
                raise InvalidArgumentError(message, Reason.INVALID_SPANS)
        spans.starts[:] = [length - rows for length, rows in zip(lengths, spans.lengths, strict=False)]

    def begin(self, sequences: Sequences) -> None:
        """Counts an append in the lengths."""
        spans, layer = self._body.spans, self._body.layer
        if spans.pool_id:  # whose rows have no lengths
            return
        if self._at_ends:
            spans.starts[:] = self._lengths(sequences)
        for sequence, start, rows in zip(spans.sequence_ids, spans.starts, spans.lengths, strict=False):
            layers = sequences.get(sequence) or sequences.__missing__(sequence)
            if layers.has(layer):
                self._writes.append((layers, *layers.begin(layer, start, start + rows)))

    def end(self) -> None:
        """The append took effect."""
        for layers, _, _ in self._writes:
            layers.end(self._body.layer)
        self._writes.clear()

    def fail(self, changed_nothing: bool) -> None:
        """The append failed."""
        layer = self._body.layer
        for layers, before, number in reversed(self._writes):
            layers.end(layer)
            if changed_nothing:
                layers.undo(layer, before, number)
            else:
                layers.lose(layer)
        self._writes.clear()

    def message(self) -> bytes:
        """The request as protobuf."""
        return bytes(self._body.SerializeToString())

    def frame(self, number: int, timeout_ms: int) -> bytes:
        """The same as a `StreamRequest`."""
        return framed(self._kind, self.message(), number, timeout_ms)

    def _lengths(self, sequences: Sequences) -> list[int]:
        """Of the layer in each sequence; 0 where there is no such layer, which the server says."""
        layer, lengths = self._body.layer, []
        for sequence in self._body.spans.sequence_ids:
            layers = sequences[sequence]
            if layers is None:
                message = f"sequence {sequence}, layer {layer}: the server has evicted it"
                raise NotFoundError(message, Reason.UNKNOWN_SEQUENCE)
            length = layers.length(layer) if layers.has(layer) else 0
            if length < 0:
                raise FailedPreconditionError(
                    f"sequence {sequence}, layer {layer}: its length is not known to this client; "
                    "ask get_sequence, or name the starts",
                    Reason.OUTCOME_UNKNOWN,
                )
            lengths.append(length)
        return lengths


class RequestMaker:
    """As `blockdex.client.requests.RequestMaker`."""

    def __init__(
        self,
        *,
        num_heads: int,
        head_dim: int,
        topk: int,
        max_message_bytes: int,
        epoch: int,
        array: type,
        dtypes: Mapping[Any, int],
        array_of: ArrayOf,
        refuse: Callable[..., NoReturn],
    ) -> None:
        del array, refuse
        self._num_heads = num_heads
        self._head_dim = head_dim
        self._topk = topk
        self._max_message_bytes = max_message_bytes
        self._epoch = epoch
        self._dtypes = dtypes
        self._array_of = array_of

    def make(self, kind: int, /, *arguments: Any) -> TokenRequest:
        """A request of a kind."""
        layer, sequences, lengths, starts, revisions, epoch, keys, queries, *selection = arguments
        *selection, wait_for_keys, rollback, pool_id, ids = selection
        of = TOKEN_KINDS[kind]
        body = of.request()
        body.header.epoch = self._epoch if epoch is None else integer("epoch", epoch)
        body.layer = integer("layer", layer, bits=32, reason=Reason.INVALID_LAYER)
        _fill_spans(body, sequences, lengths, starts, revisions)
        body.spans.pool_id = integer("pool_id", pool_id, reason=Reason.INVALID_POOL)
        arrays = {}
        if of.appends:
            arrays["keys"] = self._array_of("keys", keys)[0]
            if rollback:
                body.rollback = True
                body.header.required_features.append(pb.FEATURE_ROLLBACK)
        if of.selects:
            arrays["queries"] = self._array_of("queries", queries)[0]
            _fill_selection(body, *selection)
            body.ids = _number_of(_IDS, ids, "ids", Reason.INVALID_POOL)
        if pool_id or (of.selects and body.ids):
            body.header.required_features.append(pb.FEATURE_POOLS)
        if wait_for_keys and not of.appends:
            body.wait_for_keys = True
            body.header.required_features.append(pb.FEATURE_WAIT_FOR_KEYS)
        if lengths is None:
            _count_rows(body.spans, next(iter(arrays.values())))
        self._fill_tensors(body, arrays)
        tokens, num_heads = sum(body.spans.lengths), self._heads(body) if of.selects else 0
        if of.appends:
            _check_shape("keys", arrays["keys"].shape, (tokens, self._head_dim))
        if num_heads:
            _check_shape("queries", arrays["queries"].shape, (tokens, num_heads, self._head_dim))
        return TokenRequest(of, body, starts is None, (tokens, num_heads, self._topk))

    def _heads(self, body: Any) -> int:
        """Heads that the queries hold; 0 of a range that the server does not have, which is for it to refuse."""
        left = max(self._num_heads - body.first_head, 0)
        return 0 if body.num_heads > left else body.num_heads or left

    def _fill_tensors(self, body: Any, arrays: Mapping[str, NDArray[Any]]) -> None:
        num_bytes, most = sum(array.nbytes for array in arrays.values()), self._max_message_bytes
        if num_bytes > most:
            raise ResourceExhaustedError(
                f"keys and queries together must be at most {most} bytes, got {num_bytes}",
                Reason.MESSAGE_TOO_LARGE,
                bytes=num_bytes,
                max_message_bytes=most,
            )
        for name, array in arrays.items():
            tensor = getattr(body, name)
            tensor.dtype = self._dtypes[array.dtype]
            tensor.data = array.tobytes()


def read_selection(kind: int, streamed: bool, answer: bytes) -> Selected | None:
    """Left to protobuf."""
    del kind, streamed, answer
    return None


def _fill_spans(body: Any, sequences: Any, lengths: Any, starts: Any, revisions: Any) -> None:
    columns = body.spans
    columns.sequence_ids.extend(integers("sequences", sequences, bits=64))
    if starts is not None:
        columns.starts.extend(integers("starts", starts, bits=32))
    if lengths is not None:
        columns.lengths.extend(integers("lengths", lengths, bits=32))
    elif len(columns.sequence_ids) != 1:
        message = f"lengths: may be left out for 1 sequence only, got {len(columns.sequence_ids)}"
        raise InvalidArgumentError(message, Reason.INVALID_SPANS)
    if revisions is not None:
        columns.revisions.extend(integers("revisions", revisions, bits=64))
    if columns.revisions:
        body.header.required_features.append(pb.FEATURE_REVISIONS)


def _fill_selection(body: Any, first_head: int, num_heads: int, order: object, return_scores: object) -> None:
    body.first_head = integer("first_head", first_head, bits=32, reason=Reason.INVALID_HEADS)
    body.num_heads = integer("num_heads", num_heads, bits=32, reason=Reason.INVALID_HEADS)
    body.order = _number_of(_ORDERS, order, "order", Reason.INVALID_ORDER)
    body.return_scores = _number_of(_SCORE_FORMATS, return_scores, "return_scores", Reason.INVALID_SCORES)
    features = body.header.required_features
    if first_head or num_heads:
        features.append(pb.FEATURE_HEAD_RANGES)
    if body.return_scores == pb.SCORE_FORMAT_RAW:
        features.append(pb.FEATURE_RAW_SCORES)
    elif body.return_scores or body.order:
        features.append(pb.FEATURE_SCORES)


def _number_of(numbers: Mapping[Any, int], word: object, name: str, reason: Reason) -> int:
    """The wire's number of a word; refuses what is none."""
    number = numbers.get(word) if isinstance(word, str | bool) else None
    if number is None:
        raise InvalidArgumentError(f"{name} must be one of {', '.join(map(str, numbers))}, got {word}", reason)
    return number


def _count_rows(spans: Any, array: NDArray[Any]) -> None:
    """The length of a single sequence may be left to the rows of its tensor."""
    spans.lengths.append(array.shape[0] if array.ndim else 0)


def _check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """All but the rows, of which the server says what is wrong: it sees no shapes, but bytes."""
    if len(shape) != len(expected) or shape[1:] != expected[1:]:
        raise InvalidArgumentError(f"{name}: shape must be {list(expected)}, got {list(shape)}", Reason.INVALID_TENSOR)
