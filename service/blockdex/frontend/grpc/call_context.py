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

from blockdex.contract.limits import TENANT_KEY, check_tenant
from blockdex.logs import RateLimit, log_event
from blockdex.ring.channel import CameTo, PendingAnswer

if TYPE_CHECKING:
    from opentelemetry.context import Context as TraceContext

    from blockdex.frontend.grpc.tracing import Tracing

Observe = Callable[[str, str, float], None]
"""Called once per answered request with the RPC's name, the code's name and the seconds it took."""

Context = grpc.aio.ServicerContext[Any, Any]

DEFAULT_TENANT = "default"
REQUEST_ID_KEY = "x-request-id"

_REQUEST_ID = re.compile(r"[!-~]{1,128}")
_drawn = itertools.count(random.getrandbits(64))
"""From a random one on: two servers draw the same ids as seldom as two calls would that each drew 64 bits."""

_SLOW_LINES_PER_SECOND = 10

logger = logging.getLogger(__name__)


class Caller(NamedTuple):
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


def caller_of(context: Context) -> Caller:
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
    return Caller(context, DEFAULT_TENANT if tenant is None else tenant, request_id)


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

    @property
    def traces(self) -> bool:
        """Whether spans are made of requests, which takes more of them than their answers' bytes."""
        return self._tracing is not None

    def caller_of(self, context: Context) -> Caller:
        """Who makes the call, and what its spans are to be part of."""
        caller = caller_of(context)
        if self._tracing is None:
            return caller
        return caller._replace(trace=self._tracing.parent_of(context.invocation_metadata() or ()))

    def answered(
        self,
        rpc: str,
        code: str,
        began: float,
        caller: Caller,
        pending: PendingAnswer | CameTo | None = None,
        number: int | None = None,
    ) -> None:
        """Tells of one answered request.

        Args:
            rpc: the method's name; one on a stream as `Stream/AppendKeys`.
            code: name of the canonical code it was answered with.
            began: `time.monotonic` seconds of its arrival.
            caller: who made it.
            pending: its answer from the engine, or what it came to there, where it got that far.
            number: on a stream, the request's own id in it: its lines are named by both.
        """
        ended = time.monotonic()
        self._observe(rpc, code, ended - began)
        if self._tracing is not None and caller.trace is not None:
            request_id = caller.request_id if number is None else f"{caller.request_id}/{number}"
            assert pending is None or isinstance(pending, PendingAnswer)
            self._tracing.answered(rpc, code, (began, ended), caller.trace, request_id, pending)
        if ended - began > self._slow_seconds:
            self.was_slow(rpc, code, (began, ended), caller, pending, number)

    def was_slow(
        self,
        rpc: str,
        code: str,
        times: tuple[float, float],
        caller: Caller,
        came_to: PendingAnswer | CameTo | None,
        number: int | None = None,
    ) -> None:
        """Logs a slow request, unless there were too many of late; `times` are those of its arrival and its answer."""
        began, ended = times
        if self._limit.allows(ended):
            if number is not None:
                caller = caller._replace(request_id=f"{caller.request_id}/{number}")
            log_event(
                logger,
                logging.WARNING,
                "slow request",
                rpc=rpc,
                code=code,
                **caller.names,
                ms=_milliseconds(ended - began),
                **_engine_fields(came_to),
                withheld=self._limit.withheld(),
            )

    def stream_opened(self, caller: Caller) -> None:
        """Tells of a new stream."""
        log_event(logger, logging.INFO, "stream opened", **caller.names)

    def stream_closed(self, caller: Caller, seconds: float, requests: int, errors: int) -> None:
        """Tells of a stream's end: how long it was, its requests, and how many of them were not answered OK."""
        log_event(
            logger,
            logging.INFO,
            "stream closed",
            **caller.names,
            seconds=round(seconds, 3),
            requests=requests,
            errors=errors,
        )


def _engine_fields(came_to: PendingAnswer | CameTo | None) -> dict[str, str | float]:
    """What the engine says of a request, if it says anything."""
    if came_to is None or not came_to.stage_seconds:
        return {}
    times = {f"{stage}_ms": _milliseconds(seconds) for stage, seconds in came_to.stage_seconds.items()}
    return {"phase": came_to.phase, **times}


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)
