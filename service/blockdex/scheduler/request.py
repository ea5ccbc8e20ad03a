"""One request on its way through the engine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol

from blockdex.contract.errors import CancelledError, DeadlineExceededError, Reason, UnavailableError
from blockdex.contract.messages import (
    Answer,
    CloseSequences,
    ForkSequence,
    OpenSequences,
    Phase,
    Request,
    Stage,
    TokenRequest,
)

SequenceKey = tuple[str, int]
"""(tenant, sequence id)."""


@dataclass(eq=False, slots=True)
class Entry:
    """A request, its deadline, its time stamps, and the place where its answer goes.

    Stamps are `time.monotonic` seconds, 0.0 until they are reached.

    Attributes:
        request: what to do.
        deadline: `time.monotonic` seconds after which it is dropped.
        ticket: the channel's own note of who asked.
        received: stamp of its arrival.
        cancelled: set by the channel, from any thread, when the caller is gone.
        taken: stamp of the batch that took it up; of a selection that waited for keys, once they were there.
        launched: stamp of its last kernel's handing over to the device.
        finished: stamp of its answer's being seen on the host.
        phase: what it came to, `sequence` until a kernel is to run for it.
    """

    request: Request
    deadline: float
    ticket: object
    received: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    taken: float = 0.0
    launched: float = 0.0
    finished: float = 0.0
    phase: Phase = "sequence"
    _sequences: tuple[SequenceKey, ...] | None = field(default=None, init=False)

    @property
    def sequences(self) -> tuple[SequenceKey, ...]:
        """What the request names."""
        if self._sequences is None:
            self._sequences = _sequences(self.request)
        return self._sequences

    def stage_seconds(self, now: float) -> dict[Stage, float]:
        """Seconds in each stage that it reached, one behind the other from its arrival until now.

        Without any kernel there is no `device`, and `plan` lasts until the answer was there. What was never taken up
        was in `queue` all the time.

        Args:
            now: `time.monotonic` seconds at which the answer is handed over.
        """
        if not self.taken:
            return {"queue": now - self.received}
        stages: dict[Stage, float] = {"queue": self.taken - self.received}
        planned = self.launched or self.finished
        if planned:
            stages["plan"] = planned - self.taken
        if self.finished:
            if self.launched:
                stages["device"] = self.finished - self.launched
            stages["reply"] = now - self.finished
        return stages


class Inbox(Protocol):
    """A queue of entries. None, put by any thread, has the engine look round."""

    def put(self, item: Entry | None) -> None:
        """Adds an entry."""
        ...

    def get(self, block: bool = True, timeout: float | None = None) -> Entry | None:
        """The next one, or `queue.Empty`."""
        ...

    def qsize(self) -> int:
        """How many there are."""
        ...

    def empty(self) -> bool:
        """Whether there are none."""
        ...


Outcome = tuple[Entry, "Answer | Exception"]
"""An entry and its answer; an exception is a `BlockdexError`."""


def selects(entry: Entry) -> bool:
    """Whether the entry asks for blocks."""
    return isinstance(entry.request, TokenRequest) and entry.request.queries is not None


def too_late(entry: Entry) -> DeadlineExceededError:
    """What an entry past its deadline is answered."""
    allowed = entry.deadline - entry.received
    waited = time.monotonic() - entry.received
    return DeadlineExceededError(
        f"timeout: {allowed:.3f} s were allowed, {waited:.3f} s have passed", Reason.DEADLINE_EXCEEDED
    )


def given_up(entry: Entry) -> CancelledError:
    """What an entry is answered whose caller is gone: for the channel, which may hold something for it."""
    waited = time.monotonic() - entry.received
    return CancelledError(f"caller: gone after {waited:.3f} s", Reason.CANCELLED)


def shutting_down(why: str) -> UnavailableError:
    """What an entry is answered that can no longer be done."""
    return UnavailableError(f"server: shutting down, {why}", Reason.SHUTTING_DOWN)


def _sequences(request: Request) -> tuple[SequenceKey, ...]:
    tenant = request.tenant
    if isinstance(request, TokenRequest):
        return tuple((tenant, sequence) for sequence in request.spans.sequence_ids.tolist())
    if isinstance(request, OpenSequences | CloseSequences):
        return tuple((tenant, sequence) for sequence in request.sequence_ids)
    if isinstance(request, ForkSequence):
        return ((tenant, request.parent_id), (tenant, request.child_id))
    return ((tenant, request.sequence_id),)
