"""The server's methods, as gRPC asks for them: bytes go in and bytes come out."""

from __future__ import annotations

from blockdex.v1 import indexer_pb2 as pb

_SERVICE = pb.DESCRIPTOR.services_by_name["IndexerService"]
_STREAM = "Stream"

UNARY_PATHS = {rpc: f"/{_SERVICE.full_name}/{rpc}" for rpc in _SERVICE.methods_by_name if rpc != _STREAM}
STREAM_PATH = f"/{_SERVICE.full_name}/{_STREAM}"
