"""Block selection for block-sparse attention, served from a sidecar.

    with blockdex.Client("127.0.0.1:50051") as client:
        client.open_sequence(7)
        client.append_keys(layer=0, sequences=7, keys=keys)

`Client` and `AsyncClient` are the way in; what they raise is in `blockdex.contract.errors` and listed here too.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from blockdex.contract.errors import (
    AbortedError,
    AlreadyExistsError,
    BlockdexError,
    CancelledError,
    Code,
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    OutOfRangeError,
    PermissionDeniedError,
    Reason,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
    UnknownError,
)
from blockdex.contract.version import VERSION

__all__ = [
    "TLS",
    "AbortedError",
    "AlreadyExistsError",
    "AsyncClient",
    "AsyncPool",
    "BlockdexError",
    "CancelledError",
    "Client",
    "Code",
    "DataLossError",
    "DeadlineExceededError",
    "FailedPreconditionError",
    "Info",
    "InternalError",
    "InvalidArgumentError",
    "NotFoundError",
    "OutOfRangeError",
    "PermissionDeniedError",
    "Pool",
    "Reason",
    "ResourceExhaustedError",
    "SequenceState",
    "SharedRegion",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "UnknownError",
    "__version__",
    "connect",
    "connect_async",
]

__version__ = VERSION

if TYPE_CHECKING:
    from blockdex.client import (
        TLS,
        AsyncClient,
        AsyncPool,
        Client,
        Info,
        Pool,
        SequenceState,
        SharedRegion,
        connect,
        connect_async,
    )
else:

    def __getattr__(name: str) -> Any:
        # The engine imports this package too, and must not get gRPC with it.
        if name in {
            "TLS",
            "AsyncClient",
            "AsyncPool",
            "Client",
            "Info",
            "Pool",
            "SequenceState",
            "SharedRegion",
            "connect",
            "connect_async",
        }:
            return getattr(import_module("blockdex.client"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
