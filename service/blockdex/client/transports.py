"""How the blocking client's calls reach the server: one RPC each, or data calls together on a stream."""

from __future__ import annotations

import itertools
import os
import queue
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import grpc

from blockdex.client import compiled
from blockdex.client.call import Call
from blockdex.client.core import CHANNEL_OPTIONS, Core
from blockdex.client.failures import another, error_of_call, error_of_stream
from blockdex.client.frames import CANCELS, answer_of, cancel_of, closed, frame_of, number_of
from blockdex.client.paths import STREAM_PATH, UNARY_PATHS
from blockdex.errors import BlockdexError, Reason, UnavailableError

_JOIN_SECONDS = 5.0
_SPIN_SECONDS = 0.0003
"""How long a lone caller looks for its answer without pause: most decodes take less, and nobody must wake it then."""

_SPIN_CORES = 4
"""With fewer, whoever spins keeps from running what its answer waits for."""


class Transport(Protocol):
    """Sends calls; safe to share between threads."""

    def send(self, call: Call[Any]) -> bytes:
        """The response to one attempt.

        Raises:
            BlockdexError: the attempt failed.
        """
        ...

    def close(self) -> None:
        """Ends what is in flight and lets go of the connection."""
        ...


class UnaryTransport:
    """Every call is an RPC of its own."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._closed = False
        self.channel = grpc.insecure_channel(core.address, options=CHANNEL_OPTIONS)
        self._methods: dict[str, Any] = {rpc: self.channel.unary_unary(path) for rpc, path in UNARY_PATHS.items()}

    def send(self, call: Call[Any]) -> bytes:
        """The response to one attempt."""
        if self._closed:
            raise closed()
        method = self._methods[call.rpc]
        try:
            answer: bytes = method(call.request, timeout=call.remaining(), metadata=self._core.metadata)
        except grpc.RpcError as failure:
            raise error_of_call(failure, f"{call.rpc} at {self._core.address}") from failure
        return answer

    def close(self) -> None:
        """Ends what is in flight and closes the channel."""
        self._closed = True
        self.channel.close()


class StreamTransport:
    """Data calls share one stream, reopened by the next call after it broke; the others are RPCs of their own."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._unary = UnaryTransport(core)
        self._lock = threading.Lock()
        self._closed = False
        self._exchange: _Exchange | None = None

    def send(self, call: Call[Any]) -> bytes:
        """The response to one attempt."""
        if call.kind is None:
            return self._unary.send(call)
        return self._open_exchange().send(call)

    def close(self) -> None:
        """Ends what is in flight, then stream and channel."""
        with self._lock:
            self._closed = True
        if self._exchange is not None:
            self._exchange.close()
        self._unary.close()

    def _open_exchange(self) -> _Exchange:
        with self._lock:
            if self._closed:
                raise closed()
            if self._exchange is None or self._exchange.broken:
                self._exchange = _Exchange(self._unary.channel, self._core)
            return self._exchange


class _Exchange:
    """One stream, from its opening until it breaks.

    gRPC's own thread drops each answer into its caller's inbox, so that no other thread stands between the two. Callers
    do not read the stream themselves, since gRPC's read cannot be given a timeout; the one thread that does only asks
    gRPC for the next answer, and sees the end.

    A caller that is alone with its request spins for a while before it sleeps, without the interpreter's lock.
    """

    def __init__(self, channel: grpc.Channel, core: Core) -> None:
        self._failure: BlockdexError | None = None
        self._address = core.address
        self._closing = False
        self._lock = threading.Lock()
        self._request_ids = itertools.count(1)
        self._arrival = _new_signal()
        self._outbox: queue.SimpleQueue[tuple[int, bytes] | None] = queue.SimpleQueue()
        self._inboxes: dict[int, queue.SimpleQueue[bytes | BlockdexError]] = {}
        method: Any = channel.stream_stream(STREAM_PATH, response_deserializer=self._deliver)
        self._responses: Any = method(self._requests(), metadata=core.metadata)
        self._reader = threading.Thread(target=self._read, name="blockdex-stream", daemon=True)
        self._reader.start()

    @property
    def broken(self) -> bool:
        return self._failure is not None

    def send(self, call: Call[Any]) -> bytes:
        inbox: queue.SimpleQueue[bytes | BlockdexError] = queue.SimpleQueue()
        timeout = call.remaining()
        with self._lock:
            if self._failure is not None:
                raise another(self._failure)
            request_id = next(self._request_ids)
            self._inboxes[request_id] = inbox
            if self._arrival is not None:
                self._arrival.take_back()
        self._outbox.put((request_id, frame_of(call, request_id, timeout)))
        try:
            if self._arrival is not None and len(self._inboxes) == 1:
                self._arrival.spin(min(_SPIN_SECONDS, timeout))
            frame = inbox.get(timeout=timeout)
        except BaseException as failure:
            del self._inboxes[request_id]
            self._outbox.put((CANCELS, cancel_of(request_id)))
            if isinstance(failure, queue.Empty):
                raise call.late() from None
            raise
        del self._inboxes[request_id]
        if isinstance(frame, BlockdexError):
            raise frame
        assert call.kind is not None
        return answer_of(call.kind, frame)

    def close(self) -> None:
        self._closing = True
        self._responses.cancel()
        self._reader.join(_JOIN_SECONDS)

    def _requests(self) -> Iterator[bytes]:
        while (request := self._outbox.get()) is not None:
            request_id, frame = request
            # A caller that has gone while its request was queued here leaves nothing to send.
            if request_id in self._inboxes or request_id == CANCELS:
                yield frame

    def _deliver(self, frame: bytes) -> bytes:
        inbox = self._inboxes.get(number_of(frame))
        if inbox is not None:
            inbox.put(frame)
            if self._arrival is not None:
                self._arrival.give()
        return frame

    def _read(self) -> None:
        end: BlockdexError = UnavailableError(f"{self._address} ended it", Reason.UNREACHABLE)
        try:
            for _ in self._responses:
                pass
        except grpc.RpcError as failure:
            end = error_of_call(failure, self._address)
        with self._lock:
            self._failure = closed() if self._closing else error_of_stream(end)
            inboxes = list(self._inboxes.values())
        for inbox in inboxes:
            inbox.put(another(self._failure))
        self._outbox.put(None)


def _new_signal() -> Any:
    """What a caller spins on, where it may: given with each answer."""
    if compiled.native is None or len(os.sched_getaffinity(0)) < _SPIN_CORES:
        return None
    return compiled.native.Signal()
