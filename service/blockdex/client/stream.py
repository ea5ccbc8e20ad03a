"""One stream of data calls, which has one caller at a time."""

from __future__ import annotations

import itertools
import math
import queue
import threading
from collections.abc import Iterator
from typing import Any

import grpc

from blockdex.client import compiled
from blockdex.client.alarm import Alarm
from blockdex.client.core import Core
from blockdex.client.failures import error_of_call, error_of_stream
from blockdex.client.paths import STREAM_PATH
from blockdex.contract.errors import BlockdexError, Reason, UnavailableError

SPIN_SECONDS = 0.0005
"""From one call of an engine to its next one in the same step it takes less."""


class Stream:
    """A stream, from its opening until it ends: by the server, by a connection that breaks, or with a late answer.

    gRPC's read cannot be given a timeout. So `alarm` ends the whole stream, which nobody else uses, when its caller has
    waited until the deadline.

    Args:
        channel: to the server.
        core: what the client knows of it.
        alarm: ends it where its caller has waited long enough.
        spins: whether the thread that sends looks for the next request, for `SPIN_SECONDS`, before it sleeps.

    Attributes:
        ended: whether it is of no use any more.
        deadline: `time.monotonic()` until which its caller waits; infinity while it has none.
    """

    def __init__(self, channel: grpc.Channel, core: Core, alarm: Alarm, *, spins: bool) -> None:
        self.ended = False
        self.deadline = math.inf
        self._address = core.address
        self._alarm = alarm
        self._late = False
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._baton = compiled.native.Baton() if spins and compiled.native is not None else None
        method: Any = channel.stream_stream(STREAM_PATH)
        self._answers = method(self._requests(self._baton), metadata=core.metadata)
        alarm.watch(self)
        if not self._answers.add_callback(self._note_end):
            self._note_end()

    def number(self) -> int:
        """For the next request."""
        return next(self._numbers)

    def ask(self, frame: bytes, deadline: float) -> bytes:
        """The answer to a request.

        Raises:
            TimeoutError: none came before the deadline.
            BlockdexError: the stream broke.
        """
        self.deadline = deadline
        self._alarm.expect(deadline)
        try:
            self._outbox.put(frame)
            if self._baton is not None:
                self._baton.pass_on()
            answer: bytes = next(self._answers)
        except BaseException as failure:
            self.end()
            if not isinstance(failure, StopIteration | grpc.RpcError):
                raise
            raise TimeoutError if self._late else self._end_of(failure) from None
        with self._lock:
            self.deadline = math.inf
        return answer

    def end_if_late(self, now: float) -> None:
        """Ends it where its caller has waited long enough."""
        with self._lock:
            if self.deadline > now:
                return
            self.deadline = math.inf
            self._late = True
            self.end()

    def end(self) -> None:
        """Gives up what is in flight."""
        self.ended = True
        self._answers.cancel()
        self._outbox.put(None)
        self._alarm.forget(self)

    def _requests(self, baton: Any) -> Iterator[bytes]:
        """What gRPC's own thread sends, which has to be woken for each request unless it looks for it."""
        while True:
            if baton is not None:
                baton.wait(SPIN_SECONDS)
            frame = self._outbox.get()
            if frame is None:
                return
            yield frame

    def _note_end(self) -> None:
        self.ended = True
        self._outbox.put(None)
        self._alarm.forget(self)

    def _end_of(self, failure: BaseException) -> BlockdexError:
        if isinstance(failure, grpc.RpcError):
            return error_of_stream(error_of_call(failure, self._address))
        return error_of_stream(UnavailableError(f"{self._address} ended it", Reason.UNREACHABLE))
