"""One request on its way through the engine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol

from blockdex.errors import CancelledError, DeadlineExceededError, Reason, UnavailableError
from blockdex.messages import Answer, ForkSequence, Request, TokenRequest

SequenceKey = tuple[str, int]
"""(tenant, sequence id)."""


@dataclass(eq=False, slots=True)
class Entry:
    """A request, its deadline, its time stamps, and the place where its answer goes.

    Attributes:
        request: what to do.
        deadline: `time.monotonic` seconds after which it is dropped.
        ticket: the channel's own note of who asked.
        received: `time.monotonic` seconds of its arrival.
        cancelled: set by the channel, from any thread, when the caller is gone.
        stage_seconds: seconds in `queue` and in each kernel phase, those of others in the same launch included.
    """

    request: Request
    deadline: float
    ticket: object
    received: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    stage_seconds: dict[str, float] = field(default_factory=dict)
    sequences: tuple[SequenceKey, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.sequences = _sequences(self.request)

    def spent(self, stage: str, seconds: float) -> None:
        """Notes time that the request took in a stage."""
        self.stage_seconds[stage] = self.stage_seconds.get(stage, 0.0) + seconds


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
    if isinstance(request, ForkSequence):
        return ((tenant, request.parent_id), (tenant, request.child_id))
    return ((tenant, request.sequence_id),)
