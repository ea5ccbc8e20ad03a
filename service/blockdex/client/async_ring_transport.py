"""The asyncio client's calls over a ring: shared memory with a server on the same host."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from blockdex.client.answers import Info
from blockdex.client.async_transports import AsyncUnaryTransport
from blockdex.client.call import Call
from blockdex.client.core import Core
from blockdex.client.failures import another
from blockdex.client.frames import closed
from blockdex.client.ring import Link, Question, answer_of, open_link, refusal_of, submit, take_up_events
from blockdex.contract.errors import BlockdexError, DeadlineExceededError, Reason

if TYPE_CHECKING:
    from blockdex._native import RequestAnswer, RequestRefusal, RingConnection

_ROOM_SECONDS = 2.0
_AGAIN_SECONDS = 0.001


class AsyncRingTransport:
    """Calls share one link, opened anew by the next call after it broke; what the server says of itself goes over gRPC.

    The loop itself is woken by the link: no thread of the client stands between a call and its answer.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._unary = AsyncUnaryTransport(core)
        self._closed = False
        self._link: Link | None = None
        self._sending = asyncio.Lock()
        self._reply: asyncio.Future[bytes | RequestRefusal] | None = None
        self._waiting: dict[int, asyncio.Future[RequestAnswer | RequestRefusal]] = {}

    async def send(self, call: Call[Any]) -> Any:
        """What the response to one attempt holds."""
        if not call.kind.field:
            return await self._unary.send(call)
        # One at a time, so that calls take effect in the order in which they were made.
        async with self._sending:
            assert call.ledger is not None
            link = await self._open(call.ledger.info, call.deadline)
            ticket = await self._submit(link.connection, call)
            # A link that comes after it has tickets and callers of its own.
            waiting = self._waiting
            future = waiting[ticket] = asyncio.get_running_loop().create_future()
        self._look()
        try:
            async with asyncio.timeout(call.remaining()):
                answer = await future
        except TimeoutError:
            raise call.late() from None
        finally:
            if waiting.pop(ticket, None) is not None and self._link is link:
                link.connection.give_up(ticket)
        return answer_of(call, answer)

    async def close(self) -> None:
        """Ends what is in flight, then the link."""
        self._closed = True
        self._end(closed())
        await self._unary.close()

    async def update_regions(self, info: Info, deadline: float) -> None:
        """Has a server take what the client shares now, and give back what it shares no more.

        Args:
            info: what the server says of itself.
            deadline: `time.monotonic()` by which it has answered.

        Raises:
            BlockdexError: it does not take it.
        """
        async with self._sending:
            await self._open(info, deadline)

    async def _open(self, info: Info, deadline: float) -> Link:
        """The link, on which the server has the client's regions."""
        if self._closed:
            raise closed()
        if self._link is None:
            # Connecting waits for the server, and nothing else here does.
            left = deadline - time.monotonic()
            connection = await asyncio.to_thread(open_link, self._core, info, left, room_seconds=0.0)
            if self._closed:
                connection.close()
                raise closed()
            self._link = Link(connection)
            asyncio.get_running_loop().add_reader(connection.fileno(), self._look)
        link = self._link
        while question := link.question(self._core.regions):
            link.settle(question, await self._ask(link.connection, question, deadline))
        return link

    async def _ask(self, connection: RingConnection, question: Question, deadline: float) -> bytes | RequestRefusal:
        reply: asyncio.Future[bytes | RequestRefusal] = asyncio.get_running_loop().create_future()
        if refusal := connection.begin_question(question.text, question.files):
            return refusal
        self._reply = reply
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await reply
        except TimeoutError:
            raise DeadlineExceededError("share: no answer within the timeout", Reason.DEADLINE_EXCEEDED) from None
        finally:
            self._reply = None

    async def _submit(self, link: RingConnection, call: Call[Any]) -> int:
        """Sends a call, as soon as there is room for it."""
        until = time.monotonic() + _ROOM_SECONDS
        while True:
            try:
                return submit(link, call, call.remaining())
            except BlockdexError as error:
                if self._closed:
                    raise closed() from None
                if link.over is not None:
                    self._look()
                if error.reason != Reason.OVERLOADED or time.monotonic() > until:
                    raise
            await asyncio.sleep(_AGAIN_SECONDS)

    def _look(self) -> None:
        """Takes the answers that are there; from then on the link wakes the loop for the next one."""
        if self._link is None:
            return
        link = self._link.connection
        for ticket, answer in link.poll():
            future = self._waiting.pop(ticket, None)
            if future is not None and not future.done():
                future.set_result(answer)
        if self._reply is not None and not self._reply.done() and (reply := link.take_reply()) is not None:
            self._reply.set_result(reply)
        take_up_events(link, self._core)
        if link.over is not None:
            self._end(refusal_of(link.over))

    def _end(self, why: BlockdexError) -> None:
        """Gives the link back; what is in flight fails."""
        link, self._link = self._link, None
        if link is None:
            return
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(another(why))
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(another(why))
        asyncio.get_running_loop().remove_reader(link.connection.fileno())
        link.connection.close()
