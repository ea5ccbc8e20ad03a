"""A server that hands out a segment and takes no part in the ring but what the test does in its place."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

from blockdex.ring.handshake import Handles, new_link
from blockdex.ring.layout import GREETING_STRUCT, HELLO_STRUCT, MAGIC, VERSION
from blockdex.ring.segment import Sizes

_SECONDS = 10.0


@contextlib.contextmanager
def strange_server(sizes: Sizes, reply: Callable[[socket.socket], None] | None = None) -> Iterator[tuple[str, Handles]]:
    """The address of one, for one client, and the engine's side of the link that it gets; it stays until the end.

    Args:
        sizes: of the segment.
        reply: says something on the link's socket, once the client has its files.
    """
    engine, client = new_link(sizes, epoch=1)
    ended = threading.Event()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening, contextlib.closing(engine):
        listening.bind(b"")
        listening.listen()
        listening.settimeout(_SECONDS)

        def serve() -> None:
            with contextlib.closing(client), listening.accept()[0] as accepted:
                accepted.settimeout(_SECONDS)
                *_, tenant_bytes = HELLO_STRUCT.unpack(accepted.recv(HELLO_STRUCT.size, socket.MSG_WAITALL))
                accepted.recv(tenant_bytes, socket.MSG_WAITALL)
                files = [client.segment.fd, client.engine_bell, client.client_bell]
                socket.send_fds(accepted, [GREETING_STRUCT.pack(MAGIC, VERSION, 0)], files)
                if reply is not None:
                    reply(accepted)
                ended.wait()

        serving = threading.Thread(target=serve)
        serving.start()
        try:
            yield str(listening.getsockname(), "latin-1").replace("\0", "@"), engine
        finally:
            ended.set()
            serving.join()
