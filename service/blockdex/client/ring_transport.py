"""The blocking client's calls over rings: shared memory with a server on the same host."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from blockdex.client.call import Call
from blockdex.client.core import Core
from blockdex.client.frames import closed
from blockdex.client.ring import answer_of, open_link, submit, take_up_events
from blockdex.client.transports import UnaryTransport
from blockdex.contract.errors import BlockdexError

if TYPE_CHECKING:
    from blockdex._native import RequestAnswer, RequestRefusal, RingConnection


class RingTransport:
    """Calls go over links, each of which is one caller's at a time; what the server says of itself goes over gRPC.

    A caller writes its request and reads its answer itself: no other thread of the client stands between the two. Links
    are opened as callers come that find none free, and stay open.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._unary = UnaryTransport(core)
        self._lock = threading.Lock()
        self._closed = False
        self._free: list[RingConnection] = []
        self._all: list[RingConnection] = []

    def send(self, call: Call[Any]) -> Any:
        """What the response to one attempt holds."""
        if not call.kind.field:
            return self._unary.send(call)
        link = self._take(call)
        try:
            answer = _ask(link, call)
            take_up_events(link, self._core)
            return answer_of(call, answer)
        except BlockdexError as failure:
            raise closed() if self._closed else failure from None
        finally:
            self._give_back(link)

    def close(self) -> None:
        """Ends what is in flight, then the links."""
        with self._lock:
            self._closed = True
            for link in self._all:
                link.hang_up()
            while self._free:
                self._end(self._free.pop())
        self._unary.close()

    def _take(self, call: Call[Any]) -> RingConnection:
        with self._lock:
            if self._closed:
                raise closed()
            while self._free:
                link = self._free.pop()
                if link.over is None:
                    return link
                self._end(link)
        assert call.ledger is not None
        link = open_link(self._core, call.ledger.info, call.remaining())
        with self._lock:
            self._all.append(link)
        return link

    def _give_back(self, link: RingConnection) -> None:
        with self._lock:
            if self._closed or link.over is not None:
                self._end(link)
            else:
                self._free.append(link)

    def _end(self, link: RingConnection) -> None:
        self._all.remove(link)
        link.close()


def _ask(link: RingConnection, call: Call[Any]) -> RequestAnswer | RequestRefusal:
    """The answer to a call; whose caller waits no longer than until its deadline, and then gives it up."""
    timeout = call.remaining()
    ticket = submit(link, call, timeout)
    answer = None
    try:
        answer = link.wait(ticket, timeout)
    finally:
        if answer is None:
            link.give_up(ticket)
    if answer is None:
        raise call.late()
    return answer
