"""A bare gRPC echo server: what a call of the same bytes costs when nothing is computed.

Each request names, in its first four bytes (little-endian), how many bytes its answer has. Told a port (0: any free
one), it shares that with others; otherwise it takes one for itself.
"""

from __future__ import annotations

import asyncio
import os
import sys
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


async def main(shared_port: str | None = None) -> None:
    """Serves until it is ended; prints the port and its process id."""
    share = int(shared_port is not None)
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", share)])
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "Unary": grpc.unary_unary_rpc_method_handler(_unary),
        "Stream": grpc.stream_stream_rpc_method_handler(_stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    print(server.add_insecure_port(f"127.0.0.1:{shared_port or 0}"), os.getpid(), flush=True)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:2]))
