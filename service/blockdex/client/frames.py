"""What travels on a stream: data calls with a number, their answers, and word that a caller has gone."""

from __future__ import annotations

import math
from typing import Any

from blockdex.client.call import Call
from blockdex.client.failures import error_of_status
from blockdex.errors import BlockdexError, CancelledError, Reason, UnavailableError
from blockdex.v1 import indexer_pb2 as pb

_LONGEST_TIMEOUT_MS = 2**32 - 1


def frame_of(call: Call[Any], request_id: int, timeout: float) -> pb.StreamRequest:
    """A data call, numbered; the server gives it up when the caller does."""
    assert call.envelope is not None
    call.envelope.request_id = request_id
    call.envelope.timeout_ms = min(math.ceil(1000 * timeout), _LONGEST_TIMEOUT_MS)
    return call.envelope


def cancel_of(request_id: int) -> pb.StreamRequest:
    """Word that nobody waits for a request any longer."""
    return pb.StreamRequest(cancel=pb.CancelRequest(request_id=request_id))


def answer_of(frame: pb.StreamResponse) -> Any:
    """The response that a frame holds.

    Raises:
        BlockdexError: it holds an error instead.
    """
    kind = frame.WhichOneof("response")
    if kind == "error":
        raise error_of_status(frame.error)
    if kind is None:
        raise UnavailableError("the server answered with a kind of response that is not known here", Reason.INTERNAL)
    return getattr(frame, kind)


def closed() -> BlockdexError:
    """What a request in flight fails with when its client is closed."""
    return CancelledError("the client was closed", Reason.CANCELLED)
