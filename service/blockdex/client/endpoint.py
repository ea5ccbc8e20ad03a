"""Where a server is, and how a client and it know each other."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from blockdex.contract.limits import TENANT_KEY

Token = str | Callable[[], str]
"""A bearer token, or what says it anew for every call and stream."""

Options = tuple[tuple[str, int | str], ...]

CHANNEL_OPTIONS: Options = (
    # 16,384 queries are answered with 4 MiB of block ids; requests are checked against the server's own limit.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # The client repeats what may be repeated, and gRPC nothing.
    ("grpc.enable_retries", 0),
    # Else all clients of a process share a connection, and so one frontend of several.
    ("grpc.use_local_subchannel_pool", 1),
    # gRPC would wait a second at first, then minutes, before it looks for a server again.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A server that is silently gone is found while calls are in flight: pinged when nothing was heard for so long. gRPC
    # sends no such ping while one of those is unanswered that it measures the bandwidth with.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
)


@dataclass(frozen=True, slots=True)
class TLS:
    """A connection that nobody reads along, to a server that is who it says.

    The files are read when a client connects first: one that is to show a new certificate is made anew.

    Args:
        ca: file with the authorities that the server's certificate may be of (PEM); None: those that gRPC brings.
        cert: file with the client's own certificate, where the server asks for one, and those up to its authority.
        key: file with its private key.
        server_name: that the server's certificate is for, where it is not that of the address.

    Raises:
        ValueError: there is a certificate without its key, or a key without its certificate.
    """

    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError(f"tls: cert and key go together, got cert {self.cert} and key {self.key}")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server, and how a client and it know each other; of things that can be pickled, unless the token is a function.

    Attributes:
        address: `HOST:PORT`, or a gRPC target such as `unix:/path`.
        tls: True: with the authorities that gRPC brings; None or False: plain text.
        token: shown with every call and stream; None: none is.

    Raises:
        ValueError: a token would go over a network in plain text, which takes `tls=False` in so many words.
    """

    address: str
    tls: TLS | bool | None = None
    token: Token | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.token is not None and self.tls is None and not _is_local(self.address):
            raise ValueError(
                f"token: would go to {self.address} in plain text: tls=True or tls=TLS(...), or tls=False where "
                "something else keeps it secret"
            )

    def metadata(self, tenant: str | None) -> tuple[tuple[str, str], ...]:
        """What a call or stream says beside its request.

        Raises:
            ValueError: the token is empty, or has characters that a header cannot carry.
        """
        named = () if tenant is None else ((TENANT_KEY, tenant),)
        if self.token is None:
            return named
        token = self.token if isinstance(self.token, str) else self.token()
        if not token or not token.isascii() or not token.isprintable() or " " in token:
            raise ValueError("token: must be printable ASCII without spaces, and not empty")
        return (*named, ("authorization", f"Bearer {token}"))

    def channel(self, options: Options = CHANNEL_OPTIONS) -> grpc.Channel:
        """A connection to the server.

        Raises:
            OSError: a file of `tls` cannot be read.
        """
        credentials = self._credentials()
        if credentials is None:
            return grpc.insecure_channel(self.address, options=options)
        return grpc.secure_channel(self.address, credentials, options=(*self._tls_options(), *options))

    def aio_channel(self) -> grpc.aio.Channel:
        """The same for asyncio."""
        credentials = self._credentials()
        if credentials is None:
            return grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS)
        return grpc.aio.secure_channel(self.address, credentials, options=(*self._tls_options(), *CHANNEL_OPTIONS))

    def _credentials(self) -> grpc.ChannelCredentials | None:
        if not self.tls:
            return None
        tls = TLS() if self.tls is True else self.tls
        ca, key, cert = (None if path is None else Path(path).read_bytes() for path in (tls.ca, tls.key, tls.cert))
        return grpc.ssl_channel_credentials(ca, key, cert)

    def _tls_options(self) -> Options:
        """Of two that are alike gRPC takes the first."""
        name = self.tls.server_name if isinstance(self.tls, TLS) else None
        # It is how long a connection may take to come to be as well, and with TLS both sides compute.
        patience: Options = (("grpc.min_reconnect_backoff_ms", 5000),)
        return patience if name is None else (*patience, ("grpc.ssl_target_name_override", name))


def _is_local(address: str) -> bool:
    """Whether a token that goes there stays on this machine."""
    if address.startswith("unix"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
