"""What travels on a stream: data calls with a number, their answers, and word that a caller has gone."""

from __future__ import annotations

import math
from typing import Any

from blockdex.client import compiled
from blockdex.client.call import Call
from blockdex.client.failures import error_of_status, message_of
from blockdex.client.kinds import Kind
from blockdex.contract.errors import BlockdexError, CancelledError, Reason, UnavailableError
from blockdex.v1 import indexer_pb2 as pb

_LONGEST_TIMEOUT_MS = 2**32 - 1
_NUMBER_FIRST = b"\x09"
_NUMBER_END = 9


def frame_of(call: Call[Any], request_id: int, timeout: float) -> bytes:
    """A data call, numbered; the server gives it up when the caller does."""
    assert call.kind is not None
    timeout_ms = min(math.ceil(1000 * timeout), _LONGEST_TIMEOUT_MS)
    if compiled.native is not None:
        frame: bytes = compiled.native.frame(call.kind.number, request_id, timeout_ms, call.request)
        return frame
    head = pb.StreamRequest(request_id=request_id, timeout_ms=timeout_ms).SerializeToString()
    return b"".join((head, call.kind.tag, _varint(len(call.request)), call.request))


def cancel_of(request_id: int) -> bytes:
    """Word that nobody waits for a request any longer."""
    return pb.StreamRequest(cancel=pb.CancelRequest(request_id=request_id)).SerializeToString()


def number_of(frame: bytes) -> int:
    """Whose answer it is.

    Raises:
        InternalError: it is no answer.
    """
    # Whoever writes protobuf writes the fields in their order, though it need not be.
    if frame[:1] == _NUMBER_FIRST and len(frame) >= _NUMBER_END:
        return int.from_bytes(frame[1:_NUMBER_END], "little")
    return message_of(pb.StreamResponse, frame).request_id


def answer_of(kind: Kind, frame: bytes) -> bytes:
    """The response to a call that a frame holds.

    Raises:
        BlockdexError: it holds an error instead.
    """
    if compiled.native is not None and (quick := compiled.native.find_response(kind.number, frame)) is not None:
        return bytes(quick)
    answer = message_of(pb.StreamResponse, frame)
    field = answer.WhichOneof("response")
    if field == "error":
        raise error_of_status(answer.error)
    if field != kind.field:
        raise UnavailableError("the server answered with a kind of response that is not known here", Reason.INTERNAL)
    response: bytes = getattr(answer, field).SerializeToString()
    return response


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
