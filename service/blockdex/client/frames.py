"""Protobuf of calls and their answers: alone, and on a stream, where they have a number beside cancels and events."""

from __future__ import annotations

import math
from struct import Struct
from types import ModuleType
from typing import Any

from blockdex.client.answers import SequenceState, info_of, totals_of
from blockdex.client.failures import error_of_status, message_of
from blockdex.client.kinds import GET_INFO, GET_STATS, Kind
from blockdex.contract.errors import BlockdexError, CancelledError, Reason, UnavailableError
from blockdex.v1 import indexer_pb2 as pb

_LONGEST_TIMEOUT_MS = 2**32 - 1
_HEAD = Struct("<BQB")
_NUMBER, _TIMEOUT = 1 << 3 | 1, 2 << 3
"""Tags of a request's number and its timeout."""

_NUMBER_FIRST = bytes([_NUMBER])
_NUMBER_END = 9


class Message:
    """A request that is not a data call's.

    Attributes:
        body: as protobuf has it.
    """

    __slots__ = ("_kind", "body")

    def __init__(self, kind: Kind, body: Any) -> None:
        self._kind = kind
        self.body = body

    def message(self) -> bytes:
        """As protobuf, by itself."""
        return bytes(self.body.SerializeToString())

    def frame(self, number: int, timeout_ms: int) -> bytes:
        """The same as a `StreamRequest`."""
        return framed(self._kind, self.message(), number, timeout_ms)


def framed(kind: Kind, body: bytes, number: int, timeout_ms: int) -> bytes:
    """A request as a `StreamRequest`."""
    head = _HEAD.pack(_NUMBER, number, _TIMEOUT)
    return b"".join((head, _varint(timeout_ms), kind.tag, _varint(len(body)), body))


def milliseconds_of(timeout: float) -> int:
    """How long the server may take, so that it gives a call up when its caller does."""
    return min(math.ceil(1000 * timeout), _LONGEST_TIMEOUT_MS)


def cancel_of(request_id: int) -> bytes:
    """Word that nobody waits for a request any longer."""
    return pb.StreamRequest(cancel=pb.CancelRequest(request_id=request_id)).SerializeToString()


def number_of(frame: bytes) -> int:
    """Whose answer it is; 0 of an event.

    Raises:
        InternalError: it is neither.
    """
    # Whoever writes protobuf writes the fields in their order, though it need not be.
    if frame[:1] == _NUMBER_FIRST and len(frame) >= _NUMBER_END:
        return int.from_bytes(frame[1:_NUMBER_END], "little")
    return message_of(pb.StreamResponse, frame).request_id


def event_of(frame: bytes) -> tuple[list[int], int | None]:
    """What a frame of number 0 tells of: sequences that were evicted, and a new epoch."""
    event = message_of(pb.StreamResponse, frame).event
    new_epoch = event.new_epoch.epoch if event.HasField("new_epoch") else None
    return list(event.sequences_evicted.sequence_ids), new_epoch


def answer_of(kind: Kind, frame: bytes, codec: ModuleType) -> Any:
    """What the frame of a call's answer holds.

    Raises:
        BlockdexError: it holds an error instead.
    """
    if kind.number >= 0 and (selected := codec.read_selection(kind.number, True, frame)):
        return selected
    answer = message_of(pb.StreamResponse, frame)
    field = answer.WhichOneof("response")
    if field == "error":
        raise error_of_status(answer.error)
    if field != kind.field:
        raise UnavailableError("the server answered with a kind of response that is not known here", Reason.INTERNAL)
    return plain(kind, getattr(answer, field))


def response_of(kind: Kind, response: bytes, codec: ModuleType) -> Any:
    """What the response of a call by itself holds."""
    if kind.number >= 0 and (selected := codec.read_selection(kind.number, False, response)):
        return selected
    return plain(kind, message_of(kind.response, response))


def plain(kind: Kind, response: Any) -> Any:
    """A response as plain data: what was selected, what the server is or did, or the state of a sequence."""
    if kind.number >= 0:
        tensors = [getattr(response, name, None) for name in ("block_ids", "scores")]
        known = zip(tensors, (pb.DTYPE_INT32, pb.DTYPE_FP32), strict=True)
        return tuple(bytearray(tensor.data) if tensor and tensor.dtype == dtype else None for tensor, dtype in known)
    if kind is GET_INFO:
        return info_of(response)
    if kind is GET_STATS:
        return totals_of(response)
    lengths, revisions = getattr(response, "lengths", ()), getattr(response, "revisions", ())
    return SequenceState(tuple(lengths), tuple(revisions), response.epoch)


def closed() -> BlockdexError:
    """What a request in flight fails with when its client is closed."""
    return CancelledError("the client was closed", Reason.CANCELLED)


def _varint(number: int) -> bytes:
    digits = bytearray()
    while number >= 0x80:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    digits.append(number)
    return bytes(digits)
