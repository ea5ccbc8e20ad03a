"""Where a server listens: HOST:PORT, checked and claimed before anything is started."""

from __future__ import annotations

import errno
import ipaddress
import socket
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Address:
    """A host (a name, an IPv4 or an IPv6 address) and a port; port 0 stands for any free one."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Reads `HOST:PORT`, with an IPv6 host in brackets.

        Raises:
            ValueError: the text is something else, or the port is beyond 65535.
        """
        host, colon, port = text.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        if not colon or not host.strip("[]") or (":" in host and not bracketed):
            raise ValueError(f"must be HOST:PORT, got {text!r}")
        if not (port.isascii() and port.isdigit()) or int(port) > 65535:
            raise ValueError(f"port must be 0 to 65535, got {port!r}")
        return cls(host.strip("[]"), int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_public(self) -> bool:
        """Whether other machines may reach it: a host that cannot be looked up may be anywhere."""
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except UnicodeError:
            return False
        except OSError:
            return True
        return not all(ipaddress.ip_address(str(place[0]).partition("%")[0]).is_loopback for *_, place in found)

    def listen(self) -> socket.socket:
        """A TCP socket that listens on the address and shares it with nobody.

        Raises:
            OSError: the port is in use, or the host is not one of this machine's; the message names the address.
        """
        try:
            family, kind, protocol, _, place = socket.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listening = socket.socket(family, kind, protocol)
        except UnicodeError as error:
            raise OSError(errno.EINVAL, f"cannot listen on {self}: not a host name") from error
        except OSError as error:
            raise OSError(error.errno, f"cannot listen on {self}: {error.strerror}") from error
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(place)
            # Until one of them listens, several sockets can be bound to the port.
            listening.listen()
        except OSError as error:
            listening.close()
            raise OSError(error.errno, f"cannot listen on {self}: {error.strerror}") from error
        return listening

    def reserve(self) -> tuple[socket.socket, Address]:
        """A socket that holds the port for others which share it, and the address with its real port.

        It does not listen itself. Whoever listens there without sharing keeps it from being had, here and elsewhere.

        Raises:
            OSError: as `listen`.
        """
        with self.listen() as alone:
            address = self.at_port_of(alone)
            family, place = alone.family, alone.getsockname()
        held = socket.socket(family, socket.SOCK_STREAM)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            held.bind(place)
        except OSError as error:
            held.close()
            raise OSError(error.errno, f"cannot listen on {address}: {error.strerror}") from error
        return held, address

    def at_port_of(self, listening: socket.socket) -> Address:
        """The address with the port that a socket on it really has."""
        return Address(self.host, listening.getsockname()[1])
