"""A server that computes nothing: the contract's messages, answered at once with as many bytes as a real one's.

What the load test reaches against it is the load test's own ceiling on this machine.
"""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc

from blockdex.client.endpoint import Endpoint
from blockdex.client.failures import error_of_call
from blockdex.v1 import indexer_pb2 as pb
from blockdex.v1 import indexer_pb2_grpc as pb_grpc

_SERVICE = "blockdex.v1.IndexerService"
_STREAM_CALLS = {
    "open_sequences": "OpenSequences",
    "fork_sequence": "ForkSequence",
    "truncate_sequence": "TruncateSequence",
    "close_sequences": "CloseSequences",
    "append_keys": "AppendKeys",
    "select_blocks": "SelectBlocks",
    "append_and_select": "AppendAndSelect",
}
_CALLS = ("GetInfo", *_STREAM_CALLS.values())
_ANSWER_SECONDS = 10.0
_OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1), ("grpc.so_reuseport", 0))


class NullServer:
    """Says yes to everything; every selected block is block 0.

    Args:
        info: what it answers for GetInfo, and takes shapes from.
    """

    def __init__(self, info: pb.GetInfoResponse) -> None:
        self._info = info

    def answer(self, call: str, request: Any) -> Any:
        """The response to a request of the RPC `call`."""
        if call == "GetInfo":
            return self._info
        fields: dict[str, Any] = {"epoch": self._info.epoch}
        if call in {"ForkSequence", "TruncateSequence"}:
            fields["lengths"] = [request.length] * self._info.spec.num_layers
        elif call in {"SelectBlocks", "AppendAndSelect"}:
            spec = self._info.spec
            count = sum(request.spans.lengths) * spec.num_index_heads * spec.topk
            fields["block_ids"] = pb.Tensor(dtype=pb.DTYPE_INT32, data=_zeros(4 * count))
        return getattr(pb, f"{call}Response")(**fields)

    async def stream(self, requests: AsyncIterator[pb.StreamRequest], _: Any) -> AsyncIterator[pb.StreamResponse]:
        """The responses to a stream's requests, in order."""
        async for request in requests:
            kind = request.WhichOneof("request")
            if kind in _STREAM_CALLS:
                response: dict[str, Any] = {kind: self.answer(_STREAM_CALLS[kind], getattr(request, kind))}
                yield pb.StreamResponse(request_id=request.request_id, **response)

    def handler(self) -> grpc.GenericRpcHandler:
        """The service, for a server."""
        handlers = {call: _unary(self, call) for call in _CALLS}
        handlers["Stream"] = grpc.stream_stream_rpc_method_handler(
            self.stream, pb.StreamRequest.FromString, pb.StreamResponse.SerializeToString
        )
        return grpc.method_handlers_generic_handler(_SERVICE, handlers)


def _unary(server: NullServer, call: str) -> Any:
    async def answer(request: Any, _: Any) -> Any:
        return server.answer(call, request)

    request, response = getattr(pb, f"{call}Request"), getattr(pb, f"{call}Response")
    return grpc.unary_unary_rpc_method_handler(answer, request.FromString, response.SerializeToString)


def info_message(endpoint: Endpoint) -> bytes:
    """What a server answers for GetInfo.

    Raises:
        BlockdexError: it does not answer.
    """
    with endpoint.channel() as channel:
        ask = pb_grpc.IndexerServiceStub(channel).GetInfo
        try:
            answer = ask(pb.GetInfoRequest(), timeout=_ANSWER_SECONDS, metadata=endpoint.metadata(None))
        except grpc.RpcError as failure:
            raise error_of_call(failure, endpoint.address) from failure
        return bytes(answer.SerializeToString())


@functools.lru_cache(maxsize=64)
def _zeros(count: int) -> bytes:
    return bytes(count)


async def _serve(info: pb.GetInfoResponse) -> None:
    server = grpc.aio.server(options=_OPTIONS)
    server.add_generic_rpc_handlers((NullServer(info).handler(),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    # Whoever started this process holds the other end: when that is gone, so is the need for it.
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(_serve(pb.GetInfoResponse.FromString(bytes.fromhex(sys.argv[1]))))
