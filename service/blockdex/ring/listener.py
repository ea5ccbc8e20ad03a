"""The engine's side of links: who connects gets a segment, may ask what the engine is, and is missed when gone."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from functools import partial

from blockdex.contract.access import Identity
from blockdex.contract.credentials import Credentials
from blockdex.contract.errors import BlockdexError
from blockdex.contract.messages import Limits
from blockdex.logs import RateLimit, log_event
from blockdex.ring.channels import LinkChannels
from blockdex.ring.control_channel import ControlChannel
from blockdex.ring.engine_reports import Engine, reply_to
from blockdex.ring.events import EventQueue, SequencesEvicted, words_of
from blockdex.ring.handshake import Handles, Peer, TenantOf, offer, refuse
from blockdex.ring.regions import LinkRegions
from blockdex.ring.segment import RingError, Sizes
from blockdex.ring.server import RingInbox, ServerLink
from blockdex_kernels import IndexSpec

logger = logging.getLogger(__name__)

_COLUMN_BYTES = 4 * 8
_MARGIN = 1 << 20
_AGAIN_SECONDS = 0.1
_LINES_PER_SECOND = 10
"""Of links that are refused, and of those that break: anybody may connect, as often as they like."""


class RingHost:
    """Serves an engine to the frontends that connect; used on one asyncio loop.

    Args:
        engine: takes its entries from the inbox.
        inbox: where requests come in.
        listening: where frontends connect, or other clients.
        credentials: by which other clients are known; None where the server's own frontends connect, which speak for
            all tenants.
    """

    def __init__(
        self, engine: Engine, inbox: RingInbox, listening: socket.socket, credentials: Credentials | None = None
    ) -> None:
        self._engine = engine
        self._inbox = inbox
        self._listening = listening
        self._credentials = credentials
        self._guests: set[asyncio.Task[None]] = set()
        self._known: dict[ServerLink, Peer] = {}
        self._limit, self._broken = RateLimit(_LINES_PER_SECOND), RateLimit(_LINES_PER_SECOND)

    async def run(self) -> None:
        """Lets frontends in until it is cancelled; then no link is left."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    connected, _ = await loop.sock_accept(self._listening)
                except OSError as error:
                    # Files ran out, say: the links that there are go on, and who connects waits.
                    self._tell_of_refusal(error)
                    await asyncio.sleep(_AGAIN_SECONDS)
                    continue
                guest = asyncio.create_task(self._serve(connected))
                self._guests.add(guest)
                guest.add_done_callback(self._guests.discard)
        finally:
            for guest in self._guests:
                guest.cancel()
            await asyncio.gather(*self._guests, return_exceptions=True)

    async def _serve(self, connected: socket.socket) -> None:
        """One link, from its beginning to its end."""
        info = self._engine.info()
        with connected:
            try:
                peer = Peer.of(connected)
                self._identity_of(peer)  # before anything is made for it, or waited for: anybody may connect
                sizes = sizes_of(info.spec, info.limits)
                handles, control = await _begin(connected, sizes, info.epoch, partial(self._tenant_of, peer))
            except (BlockdexError, RingError, OSError) as error:
                if isinstance(error, BlockdexError):
                    refuse(connected, error.message)
                self._tell_of_refusal(error)
                return
        loop = asyncio.get_running_loop()

        def hang_up(error: Exception) -> None:
            if self._broken.allows(time.monotonic()):
                withheld = self._broken.withheld()
                log_event(logger, logging.WARNING, "link broken", reason=str(error), withheld=withheld)
            loop.call_soon_threadsafe(control.hang_up)

        events = EventQueue(loop)
        link = ServerLink(handles, hang_up, events.put)
        regions = LinkRegions(self._engine.open_region, self._inbox, link, info.limits)
        channels = LinkChannels(
            self._engine.open_region, self._inbox, lambda: self._engine.info().epoch, handles.tenant, hang_up
        )
        self._known[link] = peer
        self._inbox.add(link)
        began = self._has_come(link, peer)
        try:
            async with asyncio.TaskGroup() as tasks:
                telling = tasks.create_task(_tell_of(events, control, handles.tenant))
                async for words in control.heard():
                    reply = await regions.reply_to(words, control.files) or await channels.reply_to(
                        words, control.files
                    )
                    control.tell(reply or await reply_to(self._engine, words))
                    await control.drain()
                telling.cancel()
        except* ConnectionError:
            pass  # it went without what it was told
        except* Exception as errors:
            # It does not read what it is told, or it said or shared what even its driver makes nothing of.
            hang_up(errors.exceptions[0])
        finally:
            del self._known[link]
            self._inbox.drop(link)
            channels.drop()
            regions.drop()
            control.hang_up()
            self._has_gone(peer, began)

    def take_up(self, credentials: Credentials) -> None:
        """Lets clients in by these from now on, and ends the links of those who could not come in any more."""
        self._credentials = credentials
        for link, peer in self._known.items():
            try:
                self._tenant_of(peer, link.handles.tenant)
            except BlockdexError as error:
                link.hang_up(RingError(error.message))

    def _identity_of(self, peer: Peer) -> Identity:
        """Who has connected.

        Raises:
            UnauthenticatedError: somebody who is not known.
        """
        if self._credentials is None:
            return Credentials().identity_of_peer(peer.user, peer.groups)
        return self._credentials.identity_of_peer(peer.user, peer.groups)

    def _tenant_of(self, peer: Peer, named: str) -> str:
        """Whose the requests of a link are; raises as `Identity.acting_for`."""
        return named if self._credentials is None else self._identity_of(peer).acting_for(named or None)

    def _has_come(self, link: ServerLink, peer: Peer) -> float:
        """Counts a client, but no frontend; when it came."""
        if self._credentials is not None:
            self._inbox.counts.open += 1
            self._inbox.counts.opened += 1
            log_event(logger, logging.INFO, "link opened", tenant=link.handles.tenant, user=peer.user, pid=peer.process)
        return time.monotonic()

    def _has_gone(self, peer: Peer, began: float) -> None:
        if self._credentials is not None:
            self._inbox.counts.open -= 1
            seconds = round(time.monotonic() - began, 3)
            log_event(logger, logging.INFO, "link closed", user=peer.user, pid=peer.process, seconds=seconds)

    def _tell_of_refusal(self, error: Exception) -> None:
        self._inbox.counts.turned_away += 1
        if self._limit.allows(time.monotonic()):
            withheld = self._limit.withheld()
            log_event(logger, logging.WARNING, "link refused", reason=str(error), withheld=withheld)


async def _tell_of(events: EventQueue, control: ControlChannel, tenant: str) -> None:
    """Tells of events as they come; a link with a tenant hears of its own sequences alone."""
    while True:
        event = await events.get()
        if tenant and isinstance(event, SequencesEvicted) and event.tenant != tenant:
            continue
        control.tell(words_of(event))
        await control.drain()


async def _begin(
    connected: socket.socket, sizes: Sizes, epoch: int, tenant_of: TenantOf
) -> tuple[Handles, ControlChannel]:
    """Both sides' files of a new link, and the conversation beside it."""
    handles = await offer(connected, sizes, epoch, tenant_of)
    try:
        return handles, await ControlChannel.on(connected.dup())
    except BaseException:
        handles.close()
        raise


def sizes_of(spec: IndexSpec, limits: Limits) -> Sizes:
    """Room for requests and answers of the largest kind that limits allow, twice over."""
    tokens_times_heads = limits.max_message_bytes // spec.head_dim
    largest_request = limits.max_message_bytes + _COLUMN_BYTES * limits.max_spans
    largest_answer = 8 * spec.topk * tokens_times_heads
    return Sizes(
        slots=1 << max(limits.max_queued_requests - 1, 1).bit_length(),
        request_bytes=2 * largest_request + _MARGIN,
        answer_bytes=2 * largest_answer + _MARGIN,
    )
