"""What an engine tells the other ends of its links unasked, and how that comes from its thread to theirs."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from blockdex.ring.control_channel import Words

_MOST_SEQUENCES = 1024
_MOST_EVENTS = 1024


@dataclass(frozen=True, slots=True)
class SequencesEvicted:
    """Sequences past their lease were given up.

    Attributes:
        tenant: whose they were.
        sequence_ids: uint64 each.
    """

    tenant: str
    sequence_ids: list[int]


@dataclass(frozen=True, slots=True)
class NewEpoch:
    """The cache was born anew, without any sequence.

    Attributes:
        epoch: its epoch from now on, uint64, not 0.
    """

    epoch: int


@dataclass(frozen=True, slots=True)
class Draining:
    """The server is told to stop: requests are taken for a while still, and then refused."""


Event = SequencesEvicted | NewEpoch | Draining


def evictions(evicted: dict[str, list[int]]) -> Iterator[SequencesEvicted]:
    """What to tell of evicted sequences, by their tenants: of many, several events."""
    for tenant, ids in evicted.items():
        for first in range(0, len(ids), _MOST_SEQUENCES):
            yield SequencesEvicted(tenant, ids[first : first + _MOST_SEQUENCES])


def words_of(event: Event) -> Words:
    """An event as it goes over a control channel."""
    match event:
        case NewEpoch():
            return {"new_epoch": event.epoch}
        case Draining():
            return {"draining": True}
    return {"evicted": event.sequence_ids, "tenant": event.tenant}


def event_of(words: Words) -> Event | None:
    """The event that such an object stands for; None where it is none."""
    match words:
        case {"draining": True}:
            return Draining()
        case {"new_epoch": epoch} if _is_word(epoch):
            return NewEpoch(epoch)
        case {"evicted": list(ids), "tenant": str(tenant)} if all(map(_is_word, ids)):
            return SequencesEvicted(tenant, ids)
    return None


def _is_word(number: object) -> bool:
    return isinstance(number, int) and 0 <= number < 1 << 64


class EventQueue:
    """Events on their way from the engine's thread to one link; of too many the oldest are lost.

    Args:
        loop: where they are awaited.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: deque[Event] = deque(maxlen=_MOST_EVENTS)
        self._has_some = asyncio.Event()

    def put(self, event: Event) -> None:
        """Adds an event; on the engine's thread, which does not wait."""
        self._events.append(event)
        if len(self._events) == 1:
            # Of one behind others the loop need not be told: it takes all that there are.
            self._loop.call_soon_threadsafe(self._has_some.set)

    async def get(self) -> Event:
        """The next event, once there is one."""
        while not self._events:
            self._has_some.clear()
            await self._has_some.wait()
        return self._events.popleft()
