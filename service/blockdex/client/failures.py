"""What went wrong on the wire, as the exceptions of `blockdex.contract.errors`."""

from __future__ import annotations

from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from blockdex.contract.errors import BlockdexError, Code, InternalError, Reason, UnavailableError, error_of

M = TypeVar("M", bound=Message)

_DOMAIN = "blockdex"
_DETAILS_KEY = "grpc-status-details-bin"

# Why a call fails that no blockdex server answered; a code that is not here names itself.
_TRANSPORT_REASONS = {
    Code.CANCELLED: Reason.CANCELLED,
    Code.DEADLINE_EXCEEDED: Reason.DEADLINE_EXCEEDED,
    Code.INTERNAL: Reason.INTERNAL,
    Code.UNAVAILABLE: Reason.UNREACHABLE,
}
# Words of gRPC's about connections that did not come to be, and what they mean to who reads them.
_MEANINGS = {
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not of the authorities that are trusted (tls), or has expired",
    "Hostname Verification Check failed": "its certificate is for another name (tls: server_name)",
    "WRONG_VERSION_NUMBER": "it does not speak TLS",
    "Socket closed": "it ended the connection: does it ask for TLS, or for a client's certificate (tls)?",
}
_OUTCOME_UNKNOWN = frozenset(
    {Code.CANCELLED, Code.UNKNOWN, Code.DEADLINE_EXCEEDED, Code.INTERNAL, Code.UNAVAILABLE, Code.DATA_LOSS}
)
_CODE_NAMES: dict[int, str] = {code: code.name for code in Code}
_STREAM_REFUSED = frozenset({Code.INVALID_ARGUMENT, Code.UNAUTHENTICATED, Code.PERMISSION_DENIED, Code.UNIMPLEMENTED})


def message_of(kind: type[M], answer: bytes) -> M:
    """What a server answered.

    Raises:
        InternalError: its bytes are no such message (INTERNAL).
    """
    try:
        return kind.FromString(answer)
    except DecodeError:
        raise InternalError(f"the answer is no {kind.DESCRIPTOR.name}", Reason.INTERNAL) from None


def error_of_status(status: Status) -> BlockdexError:
    """The exception that a `google.rpc.Status` stands for; where it names no reason, the code's name is one."""
    for detail in status.details:
        info = ErrorInfo()
        if detail.Unpack(info) and info.domain == _DOMAIN:
            return error_of(status.code, status.message, reason_of(info.reason), info.metadata)
    name = _CODE_NAMES.get(status.code, str(status.code))
    return error_of(status.code, status.message, reason_of(name), {})


def error_of_call(failure: Any, target: str) -> BlockdexError:
    """The exception that a failed gRPC call stands for, whichever of gRPC's two APIs it came from.

    Args:
        failure: a `grpc.RpcError` with `code`, `details` and `trailing_metadata`.
        target: the call and the address, for the message of a failure that gRPC made itself.
    """
    for key, value in failure.trailing_metadata() or ():
        if key == _DETAILS_KEY:
            try:
                return error_of_status(Status.FromString(value))
            except DecodeError:
                break
    number, name = failure.code().value[0], failure.code().name
    message = f"{target}: {failure.details() or name}"
    if number == Code.RESOURCE_EXHAUSTED and "larger than max" in message:
        return error_of(number, message, Reason.MESSAGE_TOO_LARGE, {})
    if number == Code.UNAVAILABLE:
        message = "; ".join((message, *(meaning for words, meaning in _MEANINGS.items() if words in message)))
    return error_of(number, message, _TRANSPORT_REASONS.get(number, name), {})


def error_of_stream(failure: BlockdexError) -> BlockdexError:
    """What a stream that ended so means to its requests: the server's refusal of the stream, else unreachable."""
    if failure.code in _STREAM_REFUSED:
        return failure
    return UnavailableError(f"the stream broke: {failure.message}", Reason.UNREACHABLE)


def another(error: BlockdexError) -> BlockdexError:
    """The same error once more, for another caller to raise."""
    return error_of(error.code, error.message, error.reason, error.metadata)


def changed_nothing(failure: BaseException) -> bool:
    """Whether a request that failed so is certain to have had no effect."""
    if not isinstance(failure, BlockdexError):
        return False
    return failure.code not in _OUTCOME_UNKNOWN or failure.reason == Reason.SHUTTING_DOWN


def reason_of(word: str) -> Reason | str:
    """The word of `Reason`, or a string that this version does not know."""
    return Reason(word) if word in Reason.__members__ else word
