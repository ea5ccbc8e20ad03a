"""The gRPC server: the indexer, health and reflection on one port."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from blockdex.contract.credentials import Certificate, Credentials
from blockdex.contract.errors import BlockdexError
from blockdex.frontend.grpc.call_context import Observer, RequestLog
from blockdex.frontend.grpc.parsing import CheckingServer
from blockdex.frontend.grpc.service import SERVICE, IndexerService
from blockdex.frontend.grpc.status import Context, refuse
from blockdex.ring.client import RingChannel
from blockdex.v1 import indexer_pb2 as pb

if TYPE_CHECKING:
    from blockdex.frontend.grpc.tracing import Tracing

_SPAN_BYTES = 40
_MARGIN = 1 << 20
_PING_MS = 60_000
"""How long a client may be silent before it is pinged, and how long it then has to answer."""
UNIX = "unix:"
"""What the address of a Unix socket begins with."""

_OWN, _SHARED = 0o600, 0o660


class RpcServer:
    """A running gRPC server.

    Attributes:
        address: `host:port` it listens on, with the real port, or `unix:/path`.
    """

    def __init__(
        self, channel: RingChannel, address: str, log: RequestLog, share_port: bool, min_ping_seconds: float
    ) -> None:
        self._log = log
        self._shown: Certificate | None = None
        # Room for columns, and above the limit, so that a request just beyond it is refused in words; what is longer is
        # cut off by its length, before its body is taken.
        receive = channel.limits.max_message_bytes + _SPAN_BYTES * channel.limits.max_spans + _MARGIN
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
        checking = CheckingServer(self._server, log)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, checking)
        names = (SERVICE.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(_Reflection(names, log), checking)
        try:
            if address.startswith(UNIX):
                self._listen_on_file(address, Path(address.removeprefix(UNIX)))
            else:
                host, _, _ = address.rpartition(":")
                self.address = f"{host}:{self._add_port(address)}"
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: {error}") from error

    def _add_port(self, address: str) -> int:
        certificate = self._log.credentials.certificate
        if certificate is None:
            return self._server.add_insecure_port(address)
        return self._server.add_secure_port(address, self._tls(certificate))

    def _listen_on_file(self, address: str, path: Path) -> None:
        """Makes a Unix socket for this process's user alone; then its group, where one may use it too, gets it."""
        self.address = address
        mask = os.umask(0o777 & ~_OWN)
        try:
            self._add_port(address)
        finally:
            os.umask(mask)
        group = self._log.credentials.socket_group
        if group is not None:
            os.chown(path, -1, group)
            path.chmod(_SHARED)

    def _tls(self, certificate: Certificate) -> grpc.ServerCredentials:
        """What gRPC takes connections with: it asks for each whether the certificate is another one now."""
        self._shown = certificate

        def newest() -> grpc.ServerCertificateConfiguration | None:
            # Called on gRPC's own threads.
            now = self._log.credentials.certificate
            if now is None or now is self._shown:
                return None
            self._shown = now
            return _shown(now)

        asks = bool(certificate.client_ca)
        return grpc.dynamic_ssl_server_credentials(_shown(certificate), newest, require_client_authentication=asks)  # type: ignore[arg-type]

    def take_up(self, credentials: Credentials) -> None:
        """Shows another certificate to new connections, and knows callers by others, from now on."""
        self._service.take_up(credentials)

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


class _Reflection(reflection.aio.ReflectionServicer):  # type: ignore[misc]
    """Tells of the services whom the server knows."""

    def __init__(self, names: tuple[str, ...], log: RequestLog) -> None:
        super().__init__(names)
        self._log = log

    async def ServerReflectionInfo(self, requests: Any, context: Context) -> AsyncIterator[Any]:  # noqa: N802
        call = self._log.call_of(context)
        try:
            call.identity()
        except BlockdexError as error:
            refuse(context, error, call.request_id)
            return
        async for answer in super().ServerReflectionInfo(requests, context):
            yield answer


def _shown(certificate: Certificate) -> grpc.ServerCertificateConfiguration:
    chain, key, client_ca = (part.encode() for part in certificate)
    return grpc.ssl_server_certificate_configuration([(key, chain)], root_certificates=client_ca or None)


async def start_rpc_server(
    channel: RingChannel,
    address: str,
    *,
    observer: Observer,
    slow_request_seconds: float = 1.0,
    min_ping_seconds: float = 5.0,
    tracing: Tracing | None = None,
    share_port: bool = False,
    credentials: Credentials | None = None,
) -> RpcServer:
    """Starts a server.

    Args:
        channel: the engine.
        address: `host:port`; port 0 takes a free one. Or `unix:/path`, whose file then is for the user alone.
        observer: told of every answered request, stream and message.
        slow_request_seconds: a request that takes longer is logged.
        min_ping_seconds: a client that pings oftener is cut.
        tracing: makes a span of every request; None where that is off.
        share_port: whether other processes may listen on the port too, and take a part of its connections each.
        credentials: what the server shows and knows callers by; left out, it is plain text for anybody.

    Raises:
        OSError: the address cannot be bound, for instance since the port is in use.
    """
    log = RequestLog(observer, slow_request_seconds, tracing, credentials or Credentials())
    server = RpcServer(channel, address, log, share_port, min_ping_seconds)
    await server.start()
    return server
