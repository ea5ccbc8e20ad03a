"""Everything that can be refused, once for the engine that raises it, the wire that carries it and the client."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum, StrEnum
from typing import ClassVar


class Code(IntEnum):
    """Canonical status codes, as `google.rpc.Code` numbers them."""

    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class Reason(StrEnum):
    """The `reason` of an error's `google.rpc.ErrorInfo`: the words of `blockdex.v1.ErrorReason` without its prefix."""

    INVALID_LAYER = "INVALID_LAYER"
    INVALID_HEADS = "INVALID_HEADS"
    INVALID_SPANS = "INVALID_SPANS"
    INVALID_TENSOR = "INVALID_TENSOR"
    INVALID_ORDER = "INVALID_ORDER"
    INVALID_SCORES = "INVALID_SCORES"
    INVALID_LENGTH = "INVALID_LENGTH"
    INVALID_TENANT = "INVALID_TENANT"
    MISSING_CREDENTIALS = "MISSING_CREDENTIALS"
    UNKNOWN_CREDENTIALS = "UNKNOWN_CREDENTIALS"
    WRONG_TENANT = "WRONG_TENANT"
    MISSING_RIGHT = "MISSING_RIGHT"
    DUPLICATE_SEQUENCE = "DUPLICATE_SEQUENCE"
    DUPLICATE_REQUEST_ID = "DUPLICATE_REQUEST_ID"
    EMPTY_REQUEST = "EMPTY_REQUEST"
    MALFORMED_MESSAGE = "MALFORMED_MESSAGE"
    UNKNOWN_FEATURE = "UNKNOWN_FEATURE"
    UNKNOWN_MODEL = "UNKNOWN_MODEL"
    REGION_UNSUPPORTED = "REGION_UNSUPPORTED"
    INVALID_REGION = "INVALID_REGION"
    MESSAGE_TOO_LARGE = "MESSAGE_TOO_LARGE"
    UNKNOWN_SEQUENCE = "UNKNOWN_SEQUENCE"
    SEQUENCE_EXISTS = "SEQUENCE_EXISTS"
    APPEND_BEYOND_LENGTH = "APPEND_BEYOND_LENGTH"
    APPEND_OVERLAPS = "APPEND_OVERLAPS"
    KEYS_NOT_APPENDED = "KEYS_NOT_APPENDED"
    EPOCH_MISMATCH = "EPOCH_MISMATCH"
    STALE_REVISION = "STALE_REVISION"
    FUTURE_REVISION = "FUTURE_REVISION"
    OUT_OF_PAGES = "OUT_OF_PAGES"
    OVERLOADED = "OVERLOADED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    CANCELLED = "CANCELLED"
    SHUTTING_DOWN = "SHUTTING_DOWN"
    UNREACHABLE = "UNREACHABLE"
    OUTCOME_UNKNOWN = "OUTCOME_UNKNOWN"
    INTERNAL = "INTERNAL"
    UNKNOWN_POOL = "UNKNOWN_POOL"
    POOL_EXISTS = "POOL_EXISTS"
    INVALID_POOL = "INVALID_POOL"
    PAGE_NOT_SET = "PAGE_NOT_SET"


class BlockdexError(Exception):
    """A request that was refused or failed. Subclasses stand for canonical codes.

    Attributes:
        code: the canonical code.
        reason: a word of `Reason`; a string that this version does not know is kept as it came.
        message: names the field, the sequence and both numbers.
        metadata: the numbers of the message by name (`sequence_id`, `layer`, `start`, `length`, ...), as text.
    """

    code: ClassVar[Code] = Code.UNKNOWN

    def __init__(self, message: str, reason: Reason | str, /, **metadata: object) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.metadata = {name: str(value) for name, value in metadata.items()}

    def __str__(self) -> str:
        return f"{self.message} [{self.code.name}, {self.reason}]"


class CancelledError(BlockdexError):
    """The caller gave the request up."""

    code = Code.CANCELLED


class UnknownError(BlockdexError):
    """The transport failed in a way that says nothing about the request."""

    code = Code.UNKNOWN


class InvalidArgumentError(BlockdexError):
    """A field is out of bounds, whatever the state of the server."""

    code = Code.INVALID_ARGUMENT


class DeadlineExceededError(BlockdexError):
    """The deadline passed first; a write may have taken effect."""

    code = Code.DEADLINE_EXCEEDED


class NotFoundError(BlockdexError):
    """The tenant holds no such sequence or pool (never opened, closed, evicted, of an earlier epoch); or no model."""

    code = Code.NOT_FOUND


class AlreadyExistsError(BlockdexError):
    """The tenant has a sequence or a pool of that id."""

    code = Code.ALREADY_EXISTS


class PermissionDeniedError(BlockdexError):
    """The caller may not do that."""

    code = Code.PERMISSION_DENIED


class ResourceExhaustedError(BlockdexError):
    """Out of pages, out of queue, or over a size limit: the reason says which."""

    code = Code.RESOURCE_EXHAUSTED


class FailedPreconditionError(BlockdexError):
    """Another epoch, keys that are not there yet, or a block without a page."""

    code = Code.FAILED_PRECONDITION


class AbortedError(BlockdexError):
    """A revision that is not the layer's."""

    code = Code.ABORTED


class OutOfRangeError(BlockdexError):
    """An append that would leave a gap, or cut a layer without saying so."""

    code = Code.OUT_OF_RANGE


class UnimplementedError(BlockdexError):
    """A feature, transport or method that this server does not have."""

    code = Code.UNIMPLEMENTED


class InternalError(BlockdexError):
    """A fault of the server."""

    code = Code.INTERNAL


class UnavailableError(BlockdexError):
    """The server cannot be reached, or is shutting down."""

    code = Code.UNAVAILABLE


class DataLossError(BlockdexError):
    """The answer arrived damaged."""

    code = Code.DATA_LOSS


class UnauthenticatedError(BlockdexError):
    """The caller could not be identified."""

    code = Code.UNAUTHENTICATED


_BY_CODE: dict[int, type[BlockdexError]] = {
    int(error.code): error for error in BlockdexError.__subclasses__() if error is not BlockdexError
}


def error_of(code: int, message: str, reason: Reason | str, metadata: Mapping[str, str]) -> BlockdexError:
    """The exception that stands for a canonical code; an unknown code becomes `UnknownError`."""
    return _BY_CODE.get(code, UnknownError)(message, reason, **metadata)


def shutting_down(why: str) -> UnavailableError:
    """What is refused that can no longer be done."""
    return UnavailableError(f"server: shutting down, {why}", Reason.SHUTTING_DOWN)
