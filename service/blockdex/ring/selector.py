"""What a frontend's loop waits with: it looks for a while before it sleeps, as long as requests come."""

from __future__ import annotations

import selectors

import blockdex._native as native

_FOR_EVER = 1e9


class RingSelector(selectors.EpollSelector):
    """A selector that answers of one ring wake, too, without a system call while it looks; used on one asyncio loop.

    For as long as the ring spins after a request or an answer it does not sleep, unless another thread wants its core.
    It holds no lock of the interpreter then.
    """

    def __init__(self) -> None:
        super().__init__()
        self._ring: native.ClientLink | None = None
        self._bell = -1

    def watch(self, ring: native.ClientLink, bell: int) -> None:
        """Takes answers of a ring for events of its bell, which is registered, from now on."""
        self._ring, self._bell = ring, bell

    def forget(self) -> None:
        """Knows of no ring any more."""
        self._ring = None

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """As `BaseSelector.select`."""
        ring = self._ring
        if ring is None:
            return super().select(timeout)
        seconds = _FOR_EVER if timeout is None else timeout
        if seconds > 0 and ring.may_sleep(self.fileno(), seconds):
            return super().select(timeout)
        ready = super().select(0)
        if ring.answered:
            ready.append((self.get_key(self._bell), selectors.EVENT_READ))
        return ready
