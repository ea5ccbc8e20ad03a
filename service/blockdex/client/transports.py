"""How the blocking client's calls reach the server: one RPC each, or over streams."""

from __future__ import annotations

import threading
from typing import Any, Protocol

import grpc

from blockdex.client.alarm import Alarm
from blockdex.client.call import Call
from blockdex.client.core import Core
from blockdex.client.failures import error_of_call
from blockdex.client.frames import answer_of, closed, milliseconds_of, response_of
from blockdex.client.paths import UNARY_PATHS
from blockdex.client.stream import Stream
from blockdex.contract.errors import BlockdexError


class Transport(Protocol):
    """Sends calls; safe to share between threads."""

    def send(self, call: Call[Any]) -> Any:
        """What the response to one attempt holds.

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
        self.channel = core.endpoint.channel()
        self._methods: dict[str, Any] = {rpc: self.channel.unary_unary(path) for rpc, path in UNARY_PATHS.items()}

    def send(self, call: Call[Any]) -> Any:
        """What the response to one attempt holds."""
        if self._closed:
            raise closed()
        rpc = call.kind.rpc
        method = self._methods[rpc]
        try:
            answer: bytes = method(call.request.message(), timeout=call.remaining(), metadata=self._core.metadata)
        except grpc.RpcError as failure:
            raise error_of_call(failure, f"{rpc} at {self._core.address}") from failure
        return response_of(call.kind, answer, self._core.codec)

    def close(self) -> None:
        """Ends what is in flight and closes the channel."""
        self._closed = True
        self.channel.close()


class StreamTransport:
    """Calls go over streams, each of which is one caller's at a time; what the server says of itself does not.

    A caller reads its answer itself, so that no other thread stands between the two. Streams are opened as callers
    come that find none free, and stay open.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._unary = UnaryTransport(core)
        self._lock = threading.Lock()
        self._alarm = Alarm()
        self._closed = False
        self._free: list[Stream] = []
        self._all: set[Stream] = set()

    def send(self, call: Call[Any]) -> Any:
        """What the response to one attempt holds."""
        if not call.kind.field:
            return self._unary.send(call)
        timeout = call.remaining()
        stream = self._take()
        try:
            frame = stream.ask(call.request.frame(stream.number(), milliseconds_of(timeout)), call.deadline)
        except TimeoutError:
            raise call.late() from None
        except BlockdexError as failure:
            raise closed() if self._closed else failure from None
        finally:
            self._give_back(stream)
        return answer_of(call.kind, frame, self._core.codec)

    def close(self) -> None:
        """Ends what is in flight, then streams and channel."""
        with self._lock:
            self._closed = True
            streams = list(self._all)
        for stream in streams:
            stream.end()
        self._alarm.close()
        self._unary.close()

    def _take(self) -> Stream:
        with self._lock:
            if self._closed:
                raise closed()
            while self._free:
                stream = self._free.pop()
                if not stream.ended:
                    return stream
                self._all.discard(stream)
            stream = Stream(self._unary.channel, self._core, self._alarm)
            self._all.add(stream)
            return stream

    def _give_back(self, stream: Stream) -> None:
        with self._lock:
            if stream.ended:
                self._all.discard(stream)
            else:
                self._free.append(stream)
