"""The engine's end of device channels: a client hands over a segment that it made, and the memory beside it."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from blockdex.contract.errors import (
    BlockdexError,
    FailedPreconditionError,
    InvalidArgumentError,
    Reason,
    ResourceExhaustedError,
)
from blockdex.ring.channel_layout import MAX_CHANNELS, MAX_SEGMENT_BYTES
from blockdex.ring.control_channel import Words
from blockdex.ring.handshake import Handles
from blockdex.ring.regions import Offer, Region, offer_of, open_offer
from blockdex.ring.segment import RingError, Segment
from blockdex.ring.server import RingInbox, ServerLink

MOST_BOUND_SECONDS = 60.0
MAX_MEMORY_BYTES = 16 << 30
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_END_SECONDS = 4.0
"""How long a client that closes a channel is kept waiting for the requests that use it."""


class LinkChannels:
    """The channels of one link, as they are spoken of on its control channel; used on its asyncio loop.

    Args:
        open_region: opens what is offered, on any thread.
        inbox: where requests come in.
        epoch: the cache's.
        tenant: of the link.
        hang_up: ends the connection, from any thread; called where a channel's client has written what cannot be.
    """

    def __init__(
        self,
        open_region: Callable[[Offer], Region],
        inbox: RingInbox,
        epoch: Callable[[], int],
        tenant: str,
        hang_up: Callable[[Exception], None],
    ) -> None:
        self._open_region = open_region
        self._inbox = inbox
        self._epoch = epoch
        self._tenant = tenant
        self._hang_up = hang_up
        self._links: dict[int, ServerLink] = {}
        self._closed: dict[int, Future[None]] = {}
        self._opened = 0

    async def reply_to(self, words: Words, files: Sequence[int]) -> Words | None:
        """What is said to a client that opens a channel, or closes it; None to words of something else.

        Args:
            words: the client's.
            files: that came with them; they stay the caller's.
        """
        try:
            match words:
                case {"open_channel": kind}:
                    return {"answer": await self._open(kind, words, files)}
                case {"close_channel": int(number)}:
                    await self._close(number)
                    return {"answer": {}}
        except BlockdexError as error:
            return {"failed": error.message, "reason": error.reason, "code": error.code}
        return None

    def drop(self) -> None:
        """Takes no more requests of any of them."""
        while self._links:
            self._end(next(iter(self._links)))

    def _end(self, number: int) -> None:
        self._inbox.drop(self._links.pop(number))
        self._inbox.counts.channels -= 1

    async def _open(self, kind: object, words: Words, files: Sequence[int]) -> Words:
        bound, epoch = words.get("bound_seconds"), self._epoch()
        if not self._tenant:
            raise InvalidArgumentError("channel: its link names no tenant", Reason.INVALID_TENANT)
        if words.get("epoch") != epoch:
            message = f"epoch: channel names {words.get('epoch')}, the cache's is {epoch}"
            raise FailedPreconditionError(message, Reason.EPOCH_MISMATCH)
        if not isinstance(bound, int | float) or not 0 < bound <= MOST_BOUND_SECONDS:
            raise _refused(f"bound_seconds must be above 0 and at most {MOST_BOUND_SECONDS:g}, got {bound!r}")
        if len(files) != 2:
            raise _refused(f"2 files must come with it, its segment and its memory, got {len(files)}")
        if len(self._closed) >= MAX_CHANNELS:
            raise ResourceExhaustedError(
                f"channels: a link may have {MAX_CHANNELS} at once, it has {len(self._closed)}", Reason.OVERLOADED
            )
        offer = offer_of(kind, words, files[1:], MAX_MEMORY_BYTES, f"the {MAX_MEMORY_BYTES} of a channel")
        region = await open_offer(self._open_region, offer)
        handles = _handles_of(files[0], self._tenant)
        try:
            link = ServerLink(handles, self._hang_up, lambda _: None)
            memory = link.native.make_channel(region, float(bound), epoch)
        except ValueError as error:
            handles.close()
            raise _refused(str(error)) from None
        self._opened += 1
        self._links[self._opened], self._closed[self._opened] = link, region.closed
        self._inbox.add(link)
        self._inbox.counts.channels += 1
        return {"channel": self._opened, "region": memory}

    async def _close(self, number: int) -> None:
        """Returns when the device neither reads nor writes the channel's memory any more."""
        closed = self._closed.get(number)
        if closed is None:
            raise _refused(f"the link has none of number {number}")
        if number in self._links:
            self._end(number)
        try:
            await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(closed)), _END_SECONDS)
        except TimeoutError:
            raise ResourceExhaustedError(
                f"channel: requests have used number {number} for {_END_SECONDS:g} s more; ask again", Reason.OVERLOADED
            ) from None
        del self._closed[number]


def _handles_of(fd: int, tenant: str) -> Handles:
    """The engine's side of a segment that the client made: nobody is woken by a GPU, and no GPU is."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        raise _refused("its segment is no memfd") from None
    if seals & _SEALS != _SEALS:
        raise _refused(f"its segment must be sealed against shrinking and growing, its seals are {seals:#x}")
    if (size := os.fstat(fd).st_size) > MAX_SEGMENT_BYTES:
        raise _refused(f"its segment may have {MAX_SEGMENT_BYTES} bytes, got {size}")
    own = os.dup(fd)
    try:
        return Handles(Segment(own), -1, -1, tenant)
    except RingError as error:
        os.close(own)
        raise _refused(str(error)) from None


def _refused(message: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"channel: {message}", Reason.INVALID_REGION)
