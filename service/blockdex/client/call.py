"""One call from its first attempt to its end, in the same steps for both clients."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from blockdex.client.failures import changed_nothing
from blockdex.client.kinds import Kind
from blockdex.client.ledger import Ledger
from blockdex.contract.errors import BlockdexError, Code, DeadlineExceededError, Reason

Result = TypeVar("Result")

_FIRST_BACKOFF = 0.02
_LONGEST_BACKOFF = 1.0


class Request(Protocol):
    """What a call sends."""

    def message(self) -> bytes:
        """As protobuf, by itself."""
        ...

    def frame(self, number: int, timeout_ms: int, /) -> bytes:
        """The same as a `StreamRequest`."""
        ...


def nothing_to_settle(changed_nothing: bool) -> None:
    """What a failure means to a call that writes nothing."""


@dataclass(slots=True, repr=False)
class Call(Generic[Result]):
    """A request, what its answer means and what its failure means. Whoever completes it says so when it has failed.

    Attributes:
        kind: which call it is.
        request: its request.
        deadline: `time.monotonic()` at which the caller stops waiting.
        finish: makes the caller's answer of what the response holds.
        repeatable: whether sending it twice has the effect of sending it once.
        ledger: what the request was built from; None for the question what the server is.
        fail: told, when the call fails for good, whether it is certain that it changed nothing.
        epoch: the one that the request names.
    """

    kind: Kind
    request: Request
    deadline: float
    finish: Callable[[Any], Result]
    repeatable: bool
    ledger: Ledger | None = None
    fail: Callable[[bool], None] = nothing_to_settle
    epoch: int = 0
    _backoff: float = field(default=_FIRST_BACKOFF, init=False)
    _certain: bool = field(default=True, init=False)
    _last: BlockdexError | None = field(default=None, init=False)

    def remaining(self) -> float:
        """Seconds until the deadline.

        Raises:
            DeadlineExceededError: it has passed.
        """
        seconds = self.deadline - time.monotonic()
        if seconds <= 0:
            raise self.late()
        return seconds

    def late(self) -> DeadlineExceededError:
        """What the caller gets once the deadline has passed."""
        before = "" if self._last is None else f"; an attempt before: {self._last.message}"
        return DeadlineExceededError(f"{self.kind.rpc}: no answer within the timeout{before}", Reason.DEADLINE_EXCEEDED)

    def retry_after(self, error: BlockdexError) -> float:
        """Seconds to wait before the next attempt.

        Raises:
            BlockdexError: the error, where there is no next attempt. There is one for a repeatable call that found
                the server unavailable, as long as it begins inside the deadline.
        """
        self._certain = self._certain and changed_nothing(error)
        self._last = error
        pause = self._backoff * random.uniform(0.5, 1.0)
        if not self.repeatable or error.code is not Code.UNAVAILABLE or time.monotonic() + pause >= self.deadline:
            raise error
        self._backoff = min(2 * self._backoff, _LONGEST_BACKOFF)
        return pause

    def failed(self, failure: BaseException) -> None:
        """It has failed for good."""
        self.fail(self._certain and changed_nothing(failure))
        if self.ledger is not None and getattr(failure, "reason", None) == Reason.EPOCH_MISMATCH:
            self.ledger.over |= self.epoch == self.ledger.info.epoch
