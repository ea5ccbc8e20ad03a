"""What travels on a stream: calls with a number, their answers, word that a caller has gone, and events."""

from __future__ import annotations

import math
from struct import Struct
from typing import Any

from blockdex.client.call import Call
from blockdex.client.failures import error_of_status, message_of
from blockdex.client.kinds import Kind
from blockdex.contract.errors import BlockdexError, CancelledError, Reason, UnavailableError
from blockdex.v1 import indexer_pb2 as pb

_LONGEST_TIMEOUT_MS = 2**32 - 1
_HEAD = Struct("<BQB")
_NUMBER, _TIMEOUT = 1 << 3 | 1, 2 << 3
"""Tags of a request's number and its timeout."""

_NUMBER_FIRST = bytes([_NUMBER])
_NUMBER_END = 9


def frame_of(call: Call[Any], request_id: int, timeout: float) -> bytes:
    """A call, numbered; the server gives it up when the caller does."""
    timeout_ms = min(math.ceil(1000 * timeout), _LONGEST_TIMEOUT_MS)
    head = _HEAD.pack(_NUMBER, request_id, _TIMEOUT)
    return b"".join((head, _varint(timeout_ms), call.kind.tag, _varint(len(call.request)), call.request))


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


def event_of(frame: bytes) -> pb.Event:
    """The event that a frame of number 0 tells of; one that is not known here has nothing set."""
    return message_of(pb.StreamResponse, frame).event


def answer_of(kind: Kind, frame: bytes) -> Any:
    """The response to a call that a frame holds.

    Raises:
        BlockdexError: it holds an error instead.
    """
    answer = message_of(pb.StreamResponse, frame)
    field = answer.WhichOneof("response")
    if field == "error":
        raise error_of_status(answer.error)
    if field != kind.field:
        raise UnavailableError("the server answered with a kind of response that is not known here", Reason.INTERNAL)
    return getattr(answer, field)


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
