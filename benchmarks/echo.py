"""A bare gRPC echo server: what a call of the same bytes costs when nothing is computed.

Each request names, in its first four bytes (little-endian), how many bytes its answer has.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

SERVICE = "blockdex.benchmarks.Echo"


def answer(request: bytes) -> bytes:
    """As many bytes as the request asks for."""
    return bytes(int.from_bytes(request[:4], "little"))


async def _unary(request: bytes, _context: Any) -> bytes:
    return answer(request)


async def _stream(requests: AsyncIterator[bytes], _context: Any) -> AsyncIterator[bytes]:
    async for request in requests:
        yield answer(request)


async def main() -> None:
    """Serves until it is ended; prints the port."""
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)])
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "Unary": grpc.unary_unary_rpc_method_handler(_unary),
        "Stream": grpc.stream_stream_rpc_method_handler(_stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
