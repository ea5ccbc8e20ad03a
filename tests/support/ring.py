"""Slots that one process fills and another one empties, each in its own time; who has nothing to do sleeps.

One side writes the slots and then how many it has written; the other reads them and then says how many it has read.
"""

from __future__ import annotations

import contextlib
import os

from blockdex.ring.handshake import silence
from blockdex.ring.layout import AT, SLOT_BYTES
from blockdex.ring.segment import RingError, Segment
from support.atomics import Atomics


def flags_of(segment: Segment) -> memoryview:
    """All of a segment as uint32: its header's flags among them."""
    return segment.memory.cast("I")


def wake(bell: int) -> None:
    """Wakes who sleeps on the other end of a pair, if it is still there; one that is full has done so already."""
    with contextlib.suppress(OSError):
        os.write(bell, b"\0")


class Bell:
    """Wakes the side that sleeps.

    Args:
        segment: where it says that it sleeps.
        sleeps: name of the header's field for it.
        fd: the end of the datagram pair that it is woken over.
    """

    def __init__(self, segment: Segment, sleeps: str, fd: int) -> None:
        self._atomics = Atomics(segment)
        self._at = AT[sleeps]
        self.fd = fd

    def ring(self) -> None:
        """Wakes the other side if it sleeps; after whatever it is to see was written."""
        if self._atomics.take_flag(self._at):
            wake(self.fd)

    def lie_down(self) -> None:
        """Says that this side sleeps from now on; it has to look once more before it does."""
        self._atomics.raise_flag(self._at)

    def get_up(self) -> None:
        """Says that this side is awake."""
        self._atomics.clear_flag(self._at)

    def silence(self) -> None:
        """Takes what has woken it."""
        silence(self.fd)


class Producer:
    """The side that fills slots."""

    def __init__(self, segment: Segment, what: str, bell: Bell) -> None:
        """`what`: `request` or `answer`."""
        self._atomics = Atomics(segment)
        self._slots_offset: int = getattr(segment, f"{what}_slots_offset")
        self._num_slots: int = getattr(segment, f"{what}_slots")
        self._written_at = AT[f"{what}s_written"]
        self._read_at = AT[f"{what}s_read"]
        self._bell = bell
        self._written = 0

    @property
    def full(self) -> bool:
        """Whether no slot is free."""
        return self._written - self._atomics.load(self._read_at) >= self._num_slots

    def claim(self) -> int:
        """Offset in the segment of the next free slot, to be filled and then published."""
        offset = self._slots_offset + self._written % self._num_slots * SLOT_BYTES
        self._written += 1
        return offset

    def publish(self) -> None:
        """Shows the other side all slots that were claimed, and wakes it if it sleeps."""
        self._atomics.store(self._written_at, self._written)
        self._bell.ring()


class Consumer:
    """The side that empties slots."""

    def __init__(self, segment: Segment, what: str) -> None:
        """`what`: `request` or `answer`."""
        self._atomics = Atomics(segment)
        self._slots_offset: int = getattr(segment, f"{what}_slots_offset")
        self._num_slots: int = getattr(segment, f"{what}_slots")
        self._written_at = AT[f"{what}s_written"]
        self._read_at = AT[f"{what}s_read"]
        self._read = 0

    @property
    def filled(self) -> int:
        """Slots that are said to be filled and were not yet taken."""
        return self._atomics.load(self._written_at) - self._read

    def check(self) -> int:
        """`filled`, as far as that can be.

        Raises:
            RingError: more than there are slots, or fewer than none.
        """
        filled = self.filled
        if not 0 <= filled <= self._num_slots:
            raise RingError(f"ring: {filled} slots are said to be filled, there are {self._num_slots}")
        return filled

    def take(self) -> int:
        """Offset in the segment of the oldest filled slot, which stays as it is until `release`."""
        offset = self._slots_offset + self._read % self._num_slots * SLOT_BYTES
        self._read += 1
        return offset

    def release(self) -> None:
        """Gives the slots that were taken back."""
        self._atomics.store(self._read_at, self._read)
