"""A server between client and server that hands on every call, and spoils some of the answers."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np

from blockdex.v1 import indexer_pb2 as pb

_SPOILED = "/blockdex.v1.IndexerService/AppendAndSelect"
_SECONDS = 10.0
_TOPK = 16


class _Handler(grpc.GenericRpcHandler):
    def __init__(self, channel: grpc.Channel, every: int) -> None:
        self._channel = channel
        self._every = every
        self._answers = itertools.count(1)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return grpc.unary_unary_rpc_method_handler(self._hand_on(handler_call_details.method))

    def _hand_on(self, method: str) -> Callable[[bytes, Any], bytes]:
        call: Any = self._channel.unary_unary(method)

        def answer(request: bytes, context: Any) -> bytes:
            tenant = tuple(pair for pair in context.invocation_metadata() if pair[0] == "blockdex-tenant")
            response: bytes = call(request, metadata=tenant, timeout=_SECONDS)
            if method == _SPOILED and next(self._answers) % self._every == 0:
                return spoiled(response)
            return response

        return answer


def spoiled(response: bytes) -> bytes:
    """The answer with the first block id of every row one too low: no block at all, or one that scores less."""
    message = pb.AppendAndSelectResponse.FromString(response)
    block_ids = np.frombuffer(message.block_ids.data, "<i4").reshape(-1, _TOPK).copy()
    block_ids[:, 0] -= 1
    message.block_ids.data = block_ids.tobytes()
    return message.SerializeToString()


@contextlib.contextmanager
def corrupting_proxy(address: str, every: int) -> Iterator[str]:
    """The address of a proxy, for unary calls, that spoils every n-th answer of AppendAndSelect."""
    with grpc.insecure_channel(address) as channel, ThreadPoolExecutor(8) as threads:
        server = grpc.server(threads)
        server.add_generic_rpc_handlers((_Handler(channel, every),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait(_SECONDS)
