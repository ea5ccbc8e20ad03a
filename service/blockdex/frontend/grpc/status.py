"""Errors as `google.rpc.Status` with `google.rpc.ErrorInfo`."""

from __future__ import annotations

import logging

from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from blockdex.contract.errors import BlockdexError, InternalError, Reason
from blockdex.logs import log_fault

ERROR_DOMAIN = "blockdex"
DETAILS_KEY = "grpc-status-details-bin"

logger = logging.getLogger(__name__)


def status_of(error: BlockdexError) -> status_pb2.Status:
    """The status that carries an error's code, message, reason and numbers."""
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason=str(error.reason), domain=ERROR_DOMAIN, metadata=error.metadata))
    return status_pb2.Status(code=int(error.code), message=error.message, details=[detail])


def as_blockdex_error(error: BaseException, rpc: str, request_id: str) -> BlockdexError:
    """The error itself, or, for a fault of the server, an `InternalError` whose cause is in the log."""
    if isinstance(error, BlockdexError):
        return error
    log_fault(logger, "request failed", error, rpc=rpc, request_id=request_id)
    return InternalError(f"{rpc}: the server failed ({type(error).__name__}); its log says why", Reason.INTERNAL)
