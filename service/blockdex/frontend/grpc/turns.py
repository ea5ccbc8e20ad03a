"""Turns at a frontend's loop: while several tenants ask, each gets one request a turn of it."""

from __future__ import annotations

import asyncio
import time
from collections import deque

_RECENT_SECONDS = 1.0
"""For which a tenant counts as one that asks: who waits for each answer has some time to think."""


class Turns:
    """Who may go on at once, and who waits behind others; used on one asyncio loop.

    What a request costs the loop is about the same for all, and more than a turn. A loop that took all that is there
    would make a tenant of one request wait for thousands of another one's.
    """

    def __init__(self) -> None:
        self._tenant, self._asked, self._another_asked = "", 0.0, 0.0
        self._served: set[str] = set()
        self._queues: dict[str, deque[asyncio.Future[None]]] = {}
        self._next: asyncio.Handle | None = None

    def may_go(self, tenant: str) -> bool:
        """Whether a tenant's request may go on; `wait` says when, otherwise."""
        now = time.monotonic()
        if tenant != self._tenant:
            self._tenant, self._another_asked = tenant, self._asked
        self._asked = now
        if now - self._another_asked > _RECENT_SECONDS and not self._queues:
            return True
        if tenant in self._served or tenant in self._queues:
            return False
        self._serve(tenant)
        return True

    async def wait(self, tenant: str) -> None:
        """Waits for a turn."""
        turn = asyncio.get_running_loop().create_future()
        self._queues.setdefault(tenant, deque()).append(turn)
        self._serve_next_turn()
        await turn

    def _serve(self, tenant: str) -> None:
        self._served.add(tenant)
        self._serve_next_turn()

    def _serve_next_turn(self) -> None:
        if self._next is None:
            self._next = asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._next = None
        self._served.clear()
        for tenant, queue in list(self._queues.items()):
            while queue and (turn := queue.popleft()).done():
                pass  # its caller has gone
            if not turn.done():
                turn.set_result(None)
                self._serve(tenant)
            if not queue:
                del self._queues[tenant]
