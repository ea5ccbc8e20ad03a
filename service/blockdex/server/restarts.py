"""A child that is started again whenever it ends."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from blockdex.logs import log_event
from blockdex.server.bootstrap import StartError
from blockdex.server.child_process import Child

logger = logging.getLogger(__name__)

_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 10.0
_LONG_LIFE_SECONDS = 30.0
MOST_SHORT_LIVES = 12
"""In a row, with some 60 s of pauses between them. A GPU that is lost for good, for instance, ends every one."""


class Kept:
    """One child after another; used on one asyncio loop.

    Args:
        what: it is: `core` or `frontend`.
        start: starts it, and returns once it is ready.
        ended: called with a child that has ended.
        restarts: how many were started after the first, by what they are.
        gives_up: whether too many that do not last end this.

    Attributes:
        child: the one that runs; None while there is none.
    """

    def __init__(
        self,
        what: str,
        start: Callable[[], Awaitable[Child]],
        ended: Callable[[Child], None],
        restarts: dict[str, int],
        *,
        gives_up: bool = False,
    ) -> None:
        self.child: Child | None = None
        self._what = what
        self._start = start
        self._ended = ended
        self._restarts = restarts
        self._gives_up = gives_up

    async def start(self) -> None:
        """Starts the first one.

        Raises:
            StartError: it cannot start.
        """
        self.child = await self._start()

    async def keep(self) -> None:
        """Starts another one whenever it has ended, until this is cancelled; after a pause, where it did not last.

        Raises:
            StartError: `MOST_SHORT_LIVES` of them in a row did not last, if any can be too many.
        """
        pause, began, short_lives = _FIRST_PAUSE_SECONDS, time.monotonic(), 0
        while True:
            if self.child is not None:
                await self._see_the_end(self.child)
            short_lives += 1
            if time.monotonic() - began > _LONG_LIFE_SECONDS:
                pause, short_lives = _FIRST_PAUSE_SECONDS, 0
            if self._gives_up and short_lives >= MOST_SHORT_LIVES:
                raise StartError(
                    f"{self._what}: {short_lives} in a row ended within {_LONG_LIFE_SECONDS:g} s of their start"
                )
            await asyncio.sleep(pause)
            pause, began = min(2 * pause, _LONGEST_PAUSE_SECONDS), time.monotonic()
            self._restarts[self._what] += 1
            try:
                self.child = await self._start()
                log_event(logger, logging.WARNING, "process runs again", process=self._what, pid=self.child.pid)
            except (StartError, OSError) as error:
                log_event(logger, logging.ERROR, "process did not start", process=self._what, reason=str(error))

    async def _see_the_end(self, child: Child) -> None:
        status = await asyncio.shield(child.ended)
        self._ended(child)
        self.child = None
        log_event(logger, logging.ERROR, "process ended", process=self._what, pid=child.pid, status=status)
