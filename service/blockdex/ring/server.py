"""The engine's end of the links: they come and go on any thread, and the engine's own hears of it."""

from __future__ import annotations

import contextlib
import os
import queue
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from blockdex._native import Core
from blockdex._native import ServerLink as NativeLink
from blockdex.contract.stats import LinkStats
from blockdex.ring.events import Event
from blockdex.ring.handshake import Handles
from blockdex.ring.segment import RingError

T = TypeVar("T")


class ServerLink:
    """One link, as the engine sees it.

    Args:
        handles: the engine's side of the link.
        hang_up: ends the connection, from any thread; called where the client has written what cannot be.
        tell: tells the client of an event, on the engine's thread.

    Attributes:
        native: what the core serves.
        gone: set, from any thread, when the client is.
    """

    def __init__(self, handles: Handles, hang_up: Callable[[RingError], None], tell: Callable[[Event], None]) -> None:
        self.handles = handles
        self.hang_up = hang_up
        self.tell = tell
        self.native = NativeLink(handles.segment, handles.client_bell, handles.engine_bell, handles.tenant)
        self.gone = False


class RingInbox:
    """The links that an engine serves. The engine's thread looks round, tells and breaks off; others do the rest.

    Args:
        spin_seconds: after a request or an answer, how long the core looks for requests before it sleeps.

    Attributes:
        nudge: eventfd that has the core look round.
        spin_seconds: the same.
        counts: what whoever lets clients in has counted of them.
    """

    def __init__(self, spin_seconds: float) -> None:
        self.nudge = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.spin_seconds = spin_seconds
        self.counts = LinkStats()
        self._core: Core | None = None
        self._links: list[ServerLink] = []
        self._arrivals: queue.SimpleQueue[ServerLink] = queue.SimpleQueue()
        self._errands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._given_back: list[tuple[ServerLink, int]] = []

    def serve(self, core: Core) -> None:
        """Serves links with a core from now on; before the first one comes."""
        self._core = core

    def add(self, link: ServerLink) -> None:
        """Takes requests of a client from now on."""
        assert self._core is not None
        self._arrivals.put(link)
        self._core.notice()

    def drop(self, link: ServerLink) -> None:
        """Takes no more requests of a client that is gone, and gives up those that it sent."""
        assert self._core is not None
        link.gone = True
        self._core.notice()

    def do(self, errand: Callable[[], None]) -> None:
        """Has the engine's thread do something between its steps."""
        assert self._core is not None
        self._errands.put(errand)
        self._core.notice()

    def ask(self, question: Callable[[], T]) -> Future[T]:
        """What the engine's thread answers between its steps, or raises; while nobody waits for it, it is not asked."""
        answer: Future[T] = Future()

        def run() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                answer.set_result(question())
            except Exception as error:
                answer.set_exception(error)

        self.do(run)
        return answer

    def give_back(self, link: ServerLink, region: int) -> None:
        """Has no request name a region any more, and lets go of it when none uses it; on the engine's thread."""
        self._given_back.append((link, region))

    def look_round(self) -> None:
        """Hands the core the links that have come, and takes those back that are gone, and regions likewise."""
        assert self._core is not None
        with contextlib.suppress(queue.Empty):
            while True:
                link = self._arrivals.get_nowait()
                self._links.append(link)
                self._core.add(link.native)
        with contextlib.suppress(queue.Empty):
            while True:
                self._errands.get_nowait()()
        self._given_back = [each for each in self._given_back if not each[0].native.give_back(each[1])]
        for link in [link for link in self._links if link.gone]:
            self._links.remove(link)
            self._core.drop(link.native)
            link.handles.close()

    def tell(self, event: Event) -> None:
        """Tells the clients of all links of an event, those included that have only just come."""
        self.look_round()
        for link in self._links:
            link.tell(event)

    def break_off(self) -> None:
        """Ends the links whose clients wrote what cannot be."""
        assert self._core is not None
        while (broken := self._core.take_broken()) is not None:
            native, why = broken
            link = next(link for link in self._links if link.native is native)
            link.hang_up(RingError(why))
            link.gone = True
        self.look_round()
