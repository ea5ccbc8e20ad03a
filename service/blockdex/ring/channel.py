"""What a frontend sees of the engine, whatever lies between them: a queue in one process or a ring between two."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol

from blockdex.contract.errors import BlockdexError, UnavailableError
from blockdex.contract.messages import Answer, CacheOverview, Info, Limits, Phase, Request, Stage
from blockdex.contract.stats import Stats
from blockdex.scheduler.request import shutting_down
from blockdex_kernels import IndexSpec

TOKEN_RPCS = ("AppendKeys", "SelectBlocks", "AppendAndSelect")
STREAM = len(TOKEN_RPCS)
"""Number of a request of a stream, which says itself which of the token RPCs it is; those are numbered from 0."""

SHORT_RPCS = (*TOKEN_RPCS, *(f"Stream/{rpc}" for rpc in TOKEN_RPCS))
"""RPCs that may take the short way, as metrics and log name them."""


class CameTo(NamedTuple):
    """What a request came to in the engine: its phase, and the seconds in each stage that it reached."""

    phase: Phase
    stage_seconds: Mapping[Stage, float]


class Asker(Protocol):
    """Who sends requests the short way; each is answered or failed once, unless it is given up."""

    def answered(self, number: int, response: bytes) -> None:
        """The response to a request, as it goes over the wire; it was counted and timed."""
        ...

    def was_slow(self, number: int, rpc: str, began: float, came_to: CameTo) -> None:
        """The request just answered took longer than slow ones do; `began` are `time.monotonic` seconds."""
        ...

    def failed(self, number: int, rpc: str, began: float, error: BlockdexError, came_to: CameTo | None) -> None:
        """A request was refused; neither counted nor timed yet."""
        ...


class GivenUp(NamedTuple):
    """A request on the short way that nobody waits for any more: its RPC, and the `time.monotonic` of its arrival."""

    number: int
    rpc: str
    began: float


class PendingAnswer(asyncio.Future[Answer]):
    """An answer to come, or a `BlockdexError`. Cancelling it gives the request up.

    Attributes:
        request: what it is the answer to.
        received: `time.monotonic` seconds at which that was handed over.
        phase: once it is there, what the request came to.
        stage_seconds: once it is there, the seconds in each of the engine's stages, as far as the request got; the rest
            of its time it was at the frontend.
    """

    phase: Phase = "sequence"
    stage_seconds: Mapping[Stage, float] = MappingProxyType({})

    def __init__(self, request: Request) -> None:
        super().__init__()
        self.request = request
        self.received = time.monotonic()


class Reports(Protocol):
    """What is said of the engine rather than by it; every call is made on an asyncio loop, and none blocks it."""

    async def info(self) -> Info:
        """What the engine is, holds and can do, now.

        Raises:
            UnavailableError: the engine is gone (UNREACHABLE); so do the other two.
        """
        ...

    async def overview(self, max_cells: int) -> CacheOverview:
        """What pages and sequences are like, now, the pages in `max_cells` cells at most."""
        ...

    async def stats(self) -> Stats:
        """What the engine counted and timed since it started."""
        ...


class Channel(Reports, Protocol):
    """The engine, seen from an asyncio loop. Every call is made on that loop; none blocks it."""

    @property
    def spec(self) -> IndexSpec:
        """The indexer that requests are checked against."""
        ...

    @property
    def limits(self) -> Limits:
        """Bounds that requests are checked against."""
        ...

    def submit(self, request: Request, timeout: float) -> PendingAnswer:
        """Hands a request over.

        Args:
            request: checked against spec and limits.
            timeout: seconds until the engine drops it with DEADLINE_EXCEEDED.

        Raises:
            ResourceExhaustedError: too many requests are queued (OVERLOADED).
            UnavailableError: the engine is shutting down (SHUTTING_DOWN) or gone (UNREACHABLE).
        """
        ...

    def send(self, asker: Asker, rpc: int, tenant: str, timeout: float, message: bytes) -> bool:
        """Sends a token request the short way, past protobuf and plain messages.

        Args:
            asker: who is told of the answer; no two of its requests in flight have the same number.
            rpc: which of `TOKEN_RPCS` the message is the request of, or `STREAM`.
            tenant: whose sequences it names.
            timeout: seconds, where the message says none itself.
            message: as it came off the wire.

        Returns:
            False where nothing was sent: something is wrong with it, or this is no time or channel for the short way.
            `submit` is the way then.
        """
        ...

    def look(self) -> None:
        """Tells the askers of the answers that are there, after a moment if the only request in flight has none yet.

        To be called once a request was sent the short way: where it is alone, its answer then has come before the loop
        could have turned. It holds the loop up while there is nothing else to do, for a tenth of a millisecond at most.
        """
        ...

    def awaits(self, asker: Asker, number: int) -> bool:
        """Whether a request is under way on the short way. On its own, a unary one has the number 0."""
        ...

    def give_up(self, asker: Asker, number: int) -> GivenUp | None:
        """Gives up a request on the short way; None where there is no such one."""
        ...

    def give_up_all(self, asker: Asker) -> list[GivenUp]:
        """Gives up all requests of an asker on the short way."""
        ...


class InFlight:
    """The answers to come of one channel, and its end; used on one asyncio loop.

    Attributes:
        closed: whether no new request is taken.
    """

    def __init__(self) -> None:
        self.closed = False
        self._pending: set[PendingAnswer] = set()
        self._none = asyncio.Event()
        self._none.set()

    def __len__(self) -> int:
        return len(self._pending)

    def open(self, request: Request) -> PendingAnswer:
        """A new one, to a request.

        Raises:
            UnavailableError: no new request is taken (SHUTTING_DOWN).
        """
        if self.closed:
            raise shutting_down("takes no new requests")
        pending = PendingAnswer(request)
        self._pending.add(pending)
        self._none.clear()
        pending.add_done_callback(self._forget)
        return pending

    def fail_all(self, error: Exception) -> None:
        """Answers all of them with an error."""
        for pending in list(self._pending):
            if not pending.done():
                pending.set_exception(error)

    async def drain(self, grace: float) -> None:
        """Waits until all are there; after `grace` seconds the rest are refused."""
        try:
            await asyncio.wait_for(self._none.wait(), timeout=grace)
        except TimeoutError:
            self.fail_all(not_done_within(grace))

    def _forget(self, pending: PendingAnswer) -> None:
        self._pending.discard(pending)
        if not self._pending:
            self._none.set()


def not_done_within(grace: float) -> UnavailableError:
    """What is refused that is in flight so long after the server was told to stop."""
    return shutting_down(f"the request was not done within {grace:g} s")
