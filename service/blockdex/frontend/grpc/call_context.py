"""Who calls, and what is told of it: metrics hear of every request, the log of slow ones and of streams."""

from __future__ import annotations

import itertools
import logging
import random
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc

from blockdex.contract.limits import DEFAULT_TENANT, TENANT_KEY, check_tenant
from blockdex.logs import RateLimit, log_event
from blockdex.ring.caller import CameTo

if TYPE_CHECKING:
    from opentelemetry.context import Context as TraceContext

    from blockdex.frontend.grpc.tracing import Tracing

Observe = Callable[[str, str, float], None]
"""Called once per answered request with the RPC's name, the code's name and the seconds it took."""

Context = grpc.aio.ServicerContext[Any, Any]

REQUEST_ID_KEY = "x-request-id"

_REQUEST_ID = re.compile(r"[!-~]{1,128}")
_drawn = itertools.count(random.getrandbits(64))
"""From a random one on: two servers draw the same ids as seldom as two calls would that each drew 64 bits."""

_SLOW_LINES_PER_SECOND = 10

logger = logging.getLogger(__name__)


class CallContext(NamedTuple):
    """Who makes a call.

    Attributes:
        context: of its RPC, which still runs.
        tenant: the identity as its transport proved it, else what its metadata says, else `default`; to be checked.
        request_id: what its metadata says, if that is 1 to 128 visible ASCII characters, else drawn.
        trace: what its spans are part of, where requests are traced.
    """

    context: Context
    tenant: str
    request_id: str
    trace: TraceContext | None = None

    @property
    def names(self) -> dict[str, str]:
        """What the log calls it; the peer is its address, as gRPC writes it."""
        return {"peer": self.context.peer(), "tenant": self.tenant, "request_id": self.request_id}

    def checked_tenant(self) -> str:
        """The tenant.

        Raises:
            InvalidArgumentError: it is empty, too long, or not printable ASCII.
        """
        check_tenant(self.tenant)
        return self.tenant


def call_of(context: Context) -> CallContext:
    """Who makes the call; where an entry comes twice, the first one counts."""
    tenant = request_id = None
    for key, value in context.invocation_metadata() or ():
        if key == TENANT_KEY and tenant is None:
            tenant = str(value)
        elif key == REQUEST_ID_KEY and request_id is None:
            request_id = str(value)
    if identities := context.peer_identities():
        tenant = str(next(iter(identities)), "utf-8")
    if request_id is None or not _REQUEST_ID.fullmatch(request_id):
        request_id = f"{next(_drawn) % (1 << 64):016x}"
    return CallContext(context, DEFAULT_TENANT if tenant is None else tenant, request_id)


class RequestLog:
    """Tells of requests and streams; used on one asyncio loop.

    Args:
        observe: told of every answered request.
        slow_seconds: a request that takes longer is logged.
        tracing: makes a span of every request; None where that is off.
    """

    def __init__(self, observe: Observe, slow_seconds: float, tracing: Tracing | None) -> None:
        self._observe = observe
        self._slow_seconds = slow_seconds
        self._tracing = tracing
        self._limit = RateLimit(_SLOW_LINES_PER_SECOND)

    def call_of(self, context: Context) -> CallContext:
        """Who makes the call, and what its spans are to be part of."""
        call = call_of(context)
        if self._tracing is None:
            return call
        return call._replace(trace=self._tracing.parent_of(context.invocation_metadata() or ()))

    def answered(
        self,
        rpc: str,
        code: str,
        began: float,
        call: CallContext,
        came_to: CameTo | None = None,
        number: int | None = None,
    ) -> None:
        """Tells of one answered request that is not counted yet; otherwise as `took`."""
        self._observe(rpc, code, time.monotonic() - began)
        self.took(rpc, code, began, call, came_to, number)

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
        if ended - began > self._slow_seconds and self._limit.allows(ended):
            log_event(
                logger,
                logging.WARNING,
                "slow request",
                rpc=rpc,
                code=code,
                **call.names,
                ms=_milliseconds(ended - began),
                **_engine_fields(came_to),
                withheld=self._limit.withheld(),
            )

    def stream_opened(self, call: CallContext) -> None:
        """Tells of a new stream."""
        log_event(logger, logging.INFO, "stream opened", **call.names)

    def stream_closed(self, call: CallContext, seconds: float, requests: int, errors: int) -> None:
        """Tells of a stream's end: how long it was, its requests, and how many of them were not answered OK."""
        log_event(
            logger,
            logging.INFO,
            "stream closed",
            **call.names,
            seconds=round(seconds, 3),
            requests=requests,
            errors=errors,
        )


def _engine_fields(came_to: CameTo | None) -> dict[str, str | float]:
    """What the engine says of a request, if it says anything."""
    if came_to is None or not came_to.stage_seconds:
        return {}
    times = {f"{stage}_ms": _milliseconds(seconds) for stage, seconds in came_to.stage_seconds.items()}
    return {"phase": came_to.phase, **times}


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)
