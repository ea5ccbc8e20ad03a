"""Who calls, and what is told of it: metrics hear of every request, the log of slow ones and of streams."""

from __future__ import annotations

import itertools
import logging
import random
import re
import time
from typing import TYPE_CHECKING, NamedTuple, Protocol

from blockdex.contract.access import Identity, Right
from blockdex.contract.credentials import Credentials
from blockdex.contract.errors import BlockdexError, Code
from blockdex.contract.limits import DEFAULT_TENANT, TENANT_KEY
from blockdex.frontend.grpc.memory import MemoryKeeper
from blockdex.frontend.grpc.status import REQUEST_ID_KEY, Context
from blockdex.logs import RateLimit, log_event
from blockdex.ring.caller import CameTo

if TYPE_CHECKING:
    from opentelemetry.context import Context as TraceContext

    from blockdex.frontend.grpc.tracing import Tracing

AUTHORIZATION_KEY = "authorization"

_REQUEST_ID = re.compile(r"[!-~]{1,128}")
_drawn = itertools.count(random.getrandbits(64))
"""From a random one on: two servers draw the same ids as seldom as two calls would that each drew 64 bits."""

_LINES_PER_SECOND = 10
"""Of a kind: who makes many requests and streams must not fill the log, nor keep the loop busy with it."""
_NOT_ALLOWED = frozenset((Code.UNAUTHENTICATED, Code.PERMISSION_DENIED))

logger = logging.getLogger(__name__)


class Observer(Protocol):
    """Counts what a frontend does; used on one asyncio loop.

    Attributes:
        streams: streams that are open.
        streams_opened: streams opened so far.
        bytes_received: of requests, as protobuf.
        bytes_sent: of answers and events, as protobuf.
    """

    streams: int
    streams_opened: int
    bytes_received: int
    bytes_sent: int

    def observe(self, rpc: str, code: str, reason: str, seconds: float) -> None:
        """Counts one answered request: the RPC's name, the code's, the error's reason if any, the seconds it took."""
        ...


class CallContext(NamedTuple):
    """Who makes a call.

    Attributes:
        context: of its RPC, which still runs.
        caller: who proved to make it, or why nobody did.
        named: the tenant that its metadata names; None where it names none.
        request_id: what its metadata says, if that is 1 to 128 visible ASCII characters, else drawn.
        trace: what its spans are part of, where requests are traced.
    """

    context: Context
    caller: Identity | BlockdexError
    named: str | None
    request_id: str
    trace: TraceContext | None = None

    @property
    def names(self) -> dict[str, str]:
        """What the log calls it; the peer is its address, as gRPC writes it, and the tenant may not be its own."""
        own = self.caller.tenant if isinstance(self.caller, Identity) else DEFAULT_TENANT
        tenant = own if self.named is None else self.named
        return {"peer": self.context.peer(), "tenant": tenant, "request_id": self.request_id}

    def identity(self) -> Identity:
        """Who makes it.

        Raises:
            UnauthenticatedError: nobody that is known.
        """
        if isinstance(self.caller, BlockdexError):
            raise self.caller
        return self.caller

    def tenant(self) -> str:
        """Whose sequences it names.

        Raises:
            UnauthenticatedError: nobody that is known makes it.
            PermissionDeniedError: it names the tenant of somebody else, or the caller has none.
            InvalidArgumentError: the tenant is empty, too long, or not printable ASCII.
        """
        return self.identity().acting_for(self.named)

    def check(self, right: Right) -> None:
        """Refuses a caller who may not do something.

        Raises:
            UnauthenticatedError: nobody that is known makes it.
            PermissionDeniedError: the caller's entry does not have the right (MISSING_RIGHT).
        """
        self.identity().check(right)


def call_of(context: Context, credentials: Credentials) -> CallContext:
    """Who makes the call; where an entry comes twice, the first one counts."""
    said: dict[str, str] = {}
    for key, value in context.invocation_metadata() or ():
        if key in {TENANT_KEY, REQUEST_ID_KEY, AUTHORIZATION_KEY}:
            said.setdefault(key, str(value))
    caller: Identity | BlockdexError
    try:
        caller = credentials.identity_of(
            said.get(AUTHORIZATION_KEY),
            [str(name, "utf-8", "replace") for name in context.peer_identities() or ()],
            on_socket=context.peer().startswith("unix"),
        )
    except BlockdexError as error:
        caller = error
    request_id = said.get(REQUEST_ID_KEY, "")
    if not _REQUEST_ID.fullmatch(request_id):
        request_id = f"{next(_drawn) % (1 << 64):016x}"
    return CallContext(context, caller, said.get(TENANT_KEY), request_id)


class RequestLog:
    """Tells of requests and streams; used on one asyncio loop.

    Args:
        observer: told of every answered request, stream and message.
        slow_seconds: a request that takes longer is logged.
        tracing: makes a span of every request; None where that is off.
        credentials: what callers are known by.

    Attributes:
        credentials: as above; may be replaced.
    """

    def __init__(
        self, observer: Observer, slow_seconds: float, tracing: Tracing | None, credentials: Credentials
    ) -> None:
        self.credentials = credentials
        self._observer = observer
        self._slow_seconds = slow_seconds
        self._tracing = tracing
        self._memory = MemoryKeeper()
        self._slow, self._opened, self._closed, self._refusals = (RateLimit(_LINES_PER_SECOND) for _ in range(4))

    def call_of(self, context: Context) -> CallContext:
        """Who makes the call, and what its spans are to be part of."""
        call = call_of(context, self.credentials)
        if self._tracing is None:
            return call
        return call._replace(trace=self._tracing.parent_of(context.invocation_metadata() or ()))

    def answered(
        self,
        rpc: str,
        error: BlockdexError | None,
        began: float,
        call: CallContext,
        came_to: CameTo | None = None,
        number: int | None = None,
    ) -> None:
        """Tells of one answered request that is not counted yet; otherwise as `took`, with its error if it has one."""
        code, reason = ("OK", "") if error is None else (error.code.name, str(error.reason))
        self._observer.observe(rpc, code, reason, time.monotonic() - began)
        if error is not None and error.code in _NOT_ALLOWED and self._refusals.allows(time.monotonic()):
            withheld = self._refusals.withheld()
            log_event(
                logger,
                logging.WARNING,
                "call refused",
                rpc=rpc,
                code=code,
                reason=reason,
                **call.names,
                withheld=withheld,
            )
        self.took(rpc, code, began, call, came_to, number)

    def received(self, message: bytes) -> bytes:
        """Counts the bytes of a message that came."""
        self._observer.bytes_received += len(message)
        self._memory.took(len(message))
        return message

    def sent(self, message: bytes) -> bytes:
        """Counts the bytes of a message that goes."""
        self._observer.bytes_sent += len(message)
        return message

    def took(
        self,
        rpc: str,
        code: str,
        began: float,
        call: CallContext,
        came_to: CameTo | None,
        number: int | None = None,
    ) -> None:
        """Makes the span of one answered request, and logs it if it was slow, unless there were too many of late.

        Args:
            rpc: the method's name; one on a stream as `Stream/AppendKeys`.
            code: name of the canonical code it was answered with.
            began: `time.monotonic` seconds of its arrival.
            call: who made it.
            came_to: what it came to in the engine, where it got that far.
            number: on a stream, the request's own id in it: its lines are named by both.
        """
        ended = time.monotonic()
        if number is not None:
            call = call._replace(request_id=f"{call.request_id}/{number}")
        if self._tracing is not None and call.trace is not None:
            self._tracing.answered(rpc, code, (began, ended), call.trace, call.request_id, came_to)
        if ended - began > self._slow_seconds and self._slow.allows(ended):
            log_event(
                logger,
                logging.WARNING,
                "slow request",
                rpc=rpc,
                code=code,
                **call.names,
                ms=_milliseconds(ended - began),
                **_engine_fields(came_to),
                withheld=self._slow.withheld(),
            )

    def stream_opened(self, call: CallContext) -> None:
        """Tells of a new stream."""
        self._observer.streams += 1
        self._observer.streams_opened += 1
        if self._opened.allows(time.monotonic()):
            log_event(logger, logging.INFO, "stream opened", **call.names, withheld=self._opened.withheld())

    def stream_closed(self, call: CallContext, seconds: float, requests: int, errors: int) -> None:
        """Tells of a stream's end: how long it was, its requests, and how many of them were not answered OK."""
        self._observer.streams -= 1
        if self._closed.allows(time.monotonic()):
            log_event(
                logger,
                logging.INFO,
                "stream closed",
                **call.names,
                seconds=round(seconds, 3),
                requests=requests,
                errors=errors,
                withheld=self._closed.withheld(),
            )


def _engine_fields(came_to: CameTo | None) -> dict[str, str | float]:
    """What the engine says of a request, if it says anything."""
    if came_to is None or not came_to.stage_seconds:
        return {}
    times = {f"{stage}_ms": _milliseconds(seconds) for stage, seconds in came_to.stage_seconds.items()}
    return {"phase": came_to.phase, **times}


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)
