"""The blocking client's calls over rings: shared memory with a server on the same host."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from blockdex.client.answers import Info
from blockdex.client.call import Call
from blockdex.client.core import Core
from blockdex.client.frames import closed
from blockdex.client.ring import Link, answer_of, open_link, submit, take_up_events
from blockdex.client.shared_regions import Regions
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
        self._free: list[Link] = []
        self._all: list[Link] = []

    def send(self, call: Call[Any]) -> Any:
        """What the response to one attempt holds."""
        if not call.kind.field:
            return self._unary.send(call)
        assert call.ledger is not None
        link = self._take(call.ledger.info, call.remaining())
        try:
            _bring_up_to_date(link, self._core.regions, call.deadline)
            answer = _ask(link.connection, call)
            take_up_events(link.connection, self._core)
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
                link.connection.hang_up()
            while self._free:
                self._end(self._free.pop())
        self._unary.close()

    def share(self, info: Info, deadline: float) -> None:
        """Has a server take what the client shares now, over one link at once, over others before they are used.

        Args:
            info: what the server says of itself.
            deadline: `time.monotonic()` by which it has answered.

        Raises:
            BlockdexError: it does not take it.
        """
        link = self._take(info, deadline - time.monotonic())
        try:
            _bring_up_to_date(link, self._core.regions, deadline)
        finally:
            self._give_back(link)

    def release(self, deadline: float) -> None:
        """Has a server give back what the client shares no more, over free links at once; otherwise as `share`."""
        with self._lock:
            links, self._free = self._free, []
        try:
            for link in links:
                _bring_up_to_date(link, self._core.regions, deadline)
        finally:
            for link in links:
                self._give_back(link)

    def _take(self, info: Info, timeout: float) -> Link:
        with self._lock:
            if self._closed:
                raise closed()
            while self._free:
                link = self._free.pop()
                if link.connection.over is None:
                    return link
                self._end(link)
        link = Link(open_link(self._core, info, timeout))
        with self._lock:
            self._all.append(link)
        return link

    def _give_back(self, link: Link) -> None:
        with self._lock:
            if self._closed or link.connection.over is not None:
                self._end(link)
            else:
                self._free.append(link)

    def _end(self, link: Link) -> None:
        self._all.remove(link)
        link.connection.close()


def _bring_up_to_date(link: Link, regions: Regions, deadline: float) -> None:
    while question := link.question(regions):
        left = deadline - time.monotonic()
        link.settle(question, link.connection.ask(question.text, question.files, max(left, 0)))


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
