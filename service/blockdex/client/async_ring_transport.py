"""The asyncio client's calls over a ring: shared memory with a server on the same host."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from blockdex.client.async_transports import AsyncUnaryTransport
from blockdex.client.call import Call
from blockdex.client.core import Core
from blockdex.client.failures import another
from blockdex.client.frames import closed
from blockdex.client.ring import answer_of, open_link, refusal_of, submit, take_up_events
from blockdex.contract.errors import BlockdexError, Reason

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
        self._link: RingConnection | None = None
        self._sending = asyncio.Lock()
        self._waiting: dict[int, asyncio.Future[RequestAnswer | RequestRefusal]] = {}

    async def send(self, call: Call[Any]) -> Any:
        """What the response to one attempt holds."""
        if not call.kind.field:
            return await self._unary.send(call)
        # One at a time, so that calls take effect in the order in which they were made.
        async with self._sending:
            link = await self._open(call)
            ticket = await self._submit(link, call)
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
                link.give_up(ticket)
        return answer_of(call, answer)

    async def close(self) -> None:
        """Ends what is in flight, then the link."""
        self._closed = True
        self._end(closed())
        await self._unary.close()

    async def _open(self, call: Call[Any]) -> RingConnection:
        if self._closed:
            raise closed()
        if self._link is None:
            assert call.ledger is not None
            # Connecting waits for the server, and nothing else here does.
            link = await asyncio.to_thread(open_link, self._core, call.ledger.info, call.remaining(), room_seconds=0.0)
            if self._closed:
                link.close()
                raise closed()
            self._link = link
            asyncio.get_running_loop().add_reader(link.fileno(), self._look)
        return self._link

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
        link = self._link
        if link is None:
            return
        for ticket, answer in link.poll():
            future = self._waiting.pop(ticket, None)
            if future is not None and not future.done():
                future.set_result(answer)
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
        asyncio.get_running_loop().remove_reader(link.fileno())
        link.close()
