"""The gRPC server: the indexer, health and reflection on one port."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from blockdex.frontend.grpc.call_context import Observer, RequestLog
from blockdex.frontend.grpc.parsing import CheckingServer
from blockdex.frontend.grpc.service import SERVICE, IndexerService
from blockdex.ring.client import RingChannel
from blockdex.v1 import indexer_pb2 as pb

if TYPE_CHECKING:
    from blockdex.frontend.grpc.tracing import Tracing

_SPAN_BYTES = 40
_MARGIN = 1 << 20


class RpcServer:
    """A running gRPC server.

    Attributes:
        address: `host:port` it listens on, with the real port.
    """

    def __init__(self, channel: RingChannel, address: str, log: RequestLog, share_port: bool) -> None:
        # Room for columns, and above the limit, so that a request just beyond it is refused in words; what is longer is
        # cut off by its length, before its body is taken.
        receive = channel.limits.max_message_bytes + _SPAN_BYTES * channel.limits.max_spans + _MARGIN
        self._server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", int(share_port)),
                ("grpc.max_receive_message_length", min(receive, 2**31 - 1)),
                ("grpc.max_send_message_length", -1),
            ]
        )
        self._service = IndexerService(channel, log)
        self._health = health.aio.HealthServicer()
        self._server.add_generic_rpc_handlers((self._service.handlers(),))
        checking = CheckingServer(self._server, log)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, checking)
        names = (SERVICE.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflection.aio.ReflectionServicer(names), checking)
        host, _, _ = address.rpartition(":")
        try:
            self.address = f"{host}:{self._server.add_insecure_port(address)}"
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: {error}") from error

    async def start(self) -> None:
        """Serves, and says so to health probes."""
        await self._server.start()
        await self.be_ready(True)

    async def be_ready(self, ready: bool) -> None:
        """Health probes hear SERVING or NOT_SERVING from now on."""
        status = health_pb2.HealthCheckResponse
        for name in ("", SERVICE.full_name):
            await self._health.set(name, status.SERVING if ready else status.NOT_SERVING)

    async def stop_being_ready(self) -> None:
        """Health probes hear NOT_SERVING from now on, whatever comes, and streams that the server is told to stop."""
        self._service.tell(pb.Event(draining=pb.Draining()))
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace: float) -> None:
        """Ends the streams once they are answered, then the server, within `grace` seconds."""
        self._service.finish_streams()
        await self._server.stop(grace)


async def start_rpc_server(
    channel: RingChannel,
    address: str,
    *,
    observer: Observer,
    slow_request_seconds: float = 1.0,
    tracing: Tracing | None = None,
    share_port: bool = False,
) -> RpcServer:
    """Starts a server.

    Args:
        channel: the engine.
        address: `host:port`; port 0 takes a free one.
        observer: told of every answered request, stream and message.
        slow_request_seconds: a request that takes longer is logged.
        tracing: makes a span of every request; None where that is off.
        share_port: whether other processes may listen on the port too, and take a part of its connections each.

    Raises:
        OSError: the address cannot be bound, for instance since the port is in use.
    """
    server = RpcServer(channel, address, RequestLog(observer, slow_request_seconds, tracing), share_port)
    await server.start()
    return server
