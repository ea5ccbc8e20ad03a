"""A TCP proxy that can hold answers back, cut connections, and lead to another server."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Iterator

_TICK_SECONDS = 0.01


class TcpProxy:
    """Forwards bytes between clients and a server.

    Attributes:
        address: `host:port` that it listens on.
        target: `host:port` of the server that new connections lead to.
        requests: whether the clients' bytes are taken; while not, they wait.
        answers: whether the server's bytes reach the client; while not, they are dropped.
        accepts: whether new connections lead anywhere; while not, they are closed at once.
        connections: connections accepted so far.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.requests = True
        self.answers = True
        self.accepts = True
        self.connections = 0
        self._cut = threading.Event()
        self._ending = threading.Event()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(_TICK_SECONDS)
        # Inherited by connections: what is held up is held up at the sender, and not swallowed by a growing buffer.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        self.address = "{}:{}".format(*self._listener.getsockname())
        self._acceptor = threading.Thread(target=self._accept)
        self._acceptor.start()

    def cut(self) -> None:
        """Closes every connection there is."""
        threads, self._threads = self._threads, []
        self._cut.set()
        for thread in threads:
            thread.join()
        self._cut.clear()

    def close(self) -> None:
        """Closes everything."""
        self._ending.set()
        self._acceptor.join()
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        while not self._ending.is_set():
            with contextlib.suppress(TimeoutError):
                client, _ = self._listener.accept()
                self.connections += 1
                if not self.accepts:
                    client.close()
                    continue
                thread = threading.Thread(target=self._forward, args=(client,))
                self._threads.append(thread)
                thread.start()

    def _forward(self, client: socket.socket) -> None:
        host, _, port = self.target.rpartition(":")
        with contextlib.suppress(OSError), client, socket.create_connection((host, int(port))) as server:
            while not self._cut.is_set():
                sources = (client, server) if self.requests else (server,)
                readable, _, _ = select.select(sources, (), (), _TICK_SECONDS)
                for source in readable:
                    data = source.recv(65536)
                    if not data:
                        return
                    if source is client:
                        server.sendall(data)
                    elif self.answers:
                        client.sendall(data)


@contextlib.contextmanager
def proxy_to(target: str) -> Iterator[TcpProxy]:
    """A proxy that leads to a server."""
    proxy = TcpProxy(target)
    try:
        yield proxy
    finally:
        proxy.close()
