"""Errors as `google.rpc.Status` with `google.rpc.ErrorInfo`, and when to try again with `google.rpc.RetryInfo`."""

from __future__ import annotations

import logging
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from blockdex.contract.errors import BlockdexError, InternalError, Reason
from blockdex.logs import log_fault

Context = grpc.aio.ServicerContext[Any, Any]

ERROR_DOMAIN = "blockdex"
DETAILS_KEY = "grpc-status-details-bin"
REQUEST_ID_KEY = "x-request-id"

_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}
_RETRY_MILLISECONDS: dict[Reason | str, int] = {Reason.OVERLOADED: 200, Reason.OUT_OF_PAGES: 1000}
"""After which it is worth a try again: what is in flight is answered by then, or sequences may have been closed."""

logger = logging.getLogger(__name__)


def status_of(error: BlockdexError) -> status_pb2.Status:
    """The status that carries an error's code, message, reason and numbers."""
    told: list[Message] = [
        error_details_pb2.ErrorInfo(reason=str(error.reason), domain=ERROR_DOMAIN, metadata=error.metadata)
    ]
    if milliseconds := _RETRY_MILLISECONDS.get(error.reason):
        delay = error_details_pb2.RetryInfo()
        delay.retry_delay.FromMilliseconds(milliseconds)
        told.append(delay)
    details = [any_pb2.Any() for _ in told]
    for detail, message in zip(details, told, strict=True):
        detail.Pack(message)
    return status_pb2.Status(code=int(error.code), message=error.message, details=details)


def refuse(context: Context, error: BlockdexError, request_id: str) -> None:
    """Has a call end with an error when its method returns, whatever that returns.

    `context.abort` raises, and keeps what it raised: a cycle of the context and all frames with what they hold, such as
    a message of a hundred MiB, until the collector comes by.
    """
    context.set_code(_STATUS_CODES[int(error.code)])
    context.set_details(error.message)
    details = (DETAILS_KEY, status_of(error).SerializeToString())
    context.set_trailing_metadata((details, (REQUEST_ID_KEY, request_id)))


def as_blockdex_error(error: BaseException, rpc: str, request_id: str) -> BlockdexError:
    """The error itself, or, for a fault of the server, an `InternalError` whose cause is in the log."""
    if isinstance(error, BlockdexError):
        return error
    log_fault(logger, "request failed", error, rpc=rpc, request_id=request_id)
    return InternalError(f"{rpc}: the server failed ({type(error).__name__}); its log says why", Reason.INTERNAL)
