"""One stream of calls, which has one caller at a time."""

from __future__ import annotations

import itertools
import math
import queue
import threading
from typing import Any

import grpc

from blockdex.client.alarm import Alarm
from blockdex.client.core import Core
from blockdex.client.failures import error_of_call, error_of_stream
from blockdex.client.frames import event_of, number_of
from blockdex.client.paths import STREAM_PATH
from blockdex.contract.errors import BlockdexError, Reason, UnavailableError


class Stream:
    """A stream, from its opening until it ends: by the server, by a connection that breaks, or with a late answer.

    gRPC's read cannot be given a timeout. So `alarm` ends the whole stream, which nobody else uses, when its caller has
    waited until the deadline.

    Args:
        channel: to the server.
        core: what the client knows of it.
        alarm: ends it where its caller has waited long enough.

    Attributes:
        ended: whether it is of no use any more.
        deadline: `time.monotonic()` until which its caller waits; infinity while it has none.
    """

    def __init__(self, channel: grpc.Channel, core: Core, alarm: Alarm) -> None:
        self.ended = False
        self.deadline = math.inf
        self._core = core
        self._alarm = alarm
        self._late = False
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        method: Any = channel.stream_stream(STREAM_PATH)
        self._answers = method(iter(self._outbox.get, None), metadata=core.metadata)
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
            answer: bytes = next(self._answers)
            while not number_of(answer):
                self._core.take_up(*event_of(answer))
                answer = next(self._answers)
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

    def _note_end(self) -> None:
        self.ended = True
        self._outbox.put(None)
        self._alarm.forget(self)

    def _end_of(self, failure: BaseException) -> BlockdexError:
        if isinstance(failure, grpc.RpcError):
            return error_of_stream(error_of_call(failure, self._core.address))
        return error_of_stream(UnavailableError(f"{self._core.address} ended it", Reason.UNREACHABLE))
