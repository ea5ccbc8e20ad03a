"""The gRPC server: the indexer, health and reflection on one port."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from blockdex.frontend.grpc.call_context import Observer, RequestLog
from blockdex.frontend.grpc.service import SERVICE, IndexerService
from blockdex.ring.client import RingChannel
from blockdex.v1 import indexer_pb2 as pb

if TYPE_CHECKING:
    from blockdex.frontend.grpc.tracing import Tracing

_PING_MS = 60_000
"""How long a client may be silent before it is pinged, and how long it then has to answer."""


class RpcServer:
    """A running gRPC server.

    Attributes:
        address: `host:port` it listens on, with the real port.
    """

    def __init__(
        self, channel: RingChannel, address: str, log: RequestLog, share_port: bool, min_ping_seconds: float
    ) -> None:
        # Room above the limit, so that a request beyond it is refused in words and not cut off by the transport.
        receive = 2 * channel.limits.max_message_bytes
        self._server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", int(share_port)),
                ("grpc.max_receive_message_length", min(receive, 2**31 - 1)),
                ("grpc.max_send_message_length", -1),
                # gRPC by itself cuts who pings oftener than every five minutes.
                ("grpc.http2.min_ping_interval_without_data_ms", round(1000 * min_ping_seconds)),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.keepalive_time_ms", _PING_MS),
                ("grpc.keepalive_timeout_ms", _PING_MS),
            ]
        )
        self._service = IndexerService(channel, log)
        self._health = health.aio.HealthServicer()
        self._server.add_generic_rpc_handlers((self._service.handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (SERVICE.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )
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
    min_ping_seconds: float = 5.0,
    tracing: Tracing | None = None,
    share_port: bool = False,
) -> RpcServer:
    """Starts a server.

    Args:
        channel: the engine.
        address: `host:port`; port 0 takes a free one.
        observer: told of every answered request, stream and message.
        slow_request_seconds: a request that takes longer is logged.
        min_ping_seconds: a client that pings oftener is cut.
        tracing: makes a span of every request; None where that is off.
        share_port: whether other processes may listen on the port too, and take a part of its connections each.

    Raises:
        OSError: the address cannot be bound, for instance since the port is in use.
    """
    log = RequestLog(observer, slow_request_seconds, tracing)
    server = RpcServer(channel, address, log, share_port, min_ping_seconds)
    await server.start()
    return server
