"""A frontend that writes into its ring what it is told to, right or wrong, and reads answers when it is told to."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.ring_messages import Answer, Places, Request, read_answer, request_bytes, write_request
from blockdex.contract.errors import BlockdexError
from blockdex.ring.handshake import Handles
from blockdex.ring.layout import ANSWER_STRUCT, AT, REQUEST_STRUCT, SLOT_BYTES, AnswerSlot, RequestSlot, aligned
from support.ring import Bell, Consumer, Producer


class Told(NamedTuple):
    """An answer: the numbers of its slot, and what they mean."""

    numbers: AnswerSlot
    answer: Answer | BlockdexError


class ForeignFrontend:
    """The frontend's side of a link.

    Attributes:
        handles: the client's side of the link.
        connected: the socket of the link, None where there is none.
        bell: wakes the engine.
        told: answers that were read, by ticket, each of which comes once.
        regions: bytes of the regions that it shares, by number.
    """

    def __init__(
        self,
        handles: Handles,
        connected: socket.socket | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self.handles = handles
        self.connected = connected
        self.told: dict[int, Told] = {}
        self.regions: dict[int, NDArray[np.uint8]] = {}
        self._answered_in: dict[int, dict[str, NDArray[np.uint8]]] = {}
        self._segment = segment = handles.segment
        self.bell = Bell(segment, "engine_sleeps", handles.engine_bell)
        self._requests = Producer(segment, "request", self.bell)
        self._answers = Consumer(segment, "answer")
        self._room = Bell(segment, "engine_waits_for_room", handles.engine_bell)
        self._offset = 0

    @property
    def free(self) -> bool:
        """Whether there is a slot for a request."""
        return not self._requests.full

    @property
    def arena(self) -> NDArray[np.uint8]:
        """What requests carry."""
        segment = self._segment
        return np.frombuffer(segment.memory, np.uint8, segment.request_arena_bytes, segment.request_arena_offset)

    def lay(
        self, request: Request, ticket: int, places: Places = MappingProxyType({}), *, deadline: float = 100.0
    ) -> RequestSlot:
        """Writes what a request carries behind that of the one before, round and round, and answers its slot's numbers.

        Args:
            request: right or wrong.
            ticket: of the request.
            places: what of it lies in regions; keys and queries are written there.
            deadline: seconds from now.
        """
        segment, size = self._segment, aligned(request_bytes(request))
        if self._offset + size > segment.request_arena_bytes:
            self._offset = 0
        now = self._clock()
        assert self.free, "no slot is free"
        slot = segment.request_slots_offset + self._requests._written % segment.request_slots * SLOT_BYTES
        write_request(segment, slot, self._offset, ticket, request, now, now + deadline, places)
        for name in places.keys() & {"keys", "queries"}:
            region, offset = places[name]
            data = np.frombuffer(getattr(request, name).tensor.data, np.uint8)
            self.regions[region][offset : offset + len(data)] = data
        answered = {name: place for name, place in places.items() if name in {"block_ids", "scores"}}
        self._answered_in[ticket] = {name: self.regions[at][offset:] for name, (at, offset) in answered.items()}
        self._offset += size
        return RequestSlot._make(REQUEST_STRUCT.unpack_from(segment.memory, slot))

    def write(self, *slots: RequestSlot | bytes) -> None:
        """Shows the engine requests, all at once."""
        self.put(*slots)
        self._requests.publish()

    def put(self, *slots: RequestSlot | bytes) -> None:
        """Writes requests into slots, without showing them."""
        for slot in slots:
            numbers = slot if isinstance(slot, bytes) else REQUEST_STRUCT.pack(*slot)
            at = self._requests.claim()
            self._segment.memory[at : at + len(numbers)] = numbers

    def send(self, *requests: Request, first_ticket: int = 0) -> None:
        """Asks right requests, with tickets in their order."""
        self.write(*[self.lay(request, ticket) for ticket, request in enumerate(requests, start=first_ticket)])

    def read(self, most: int | None = None) -> int:
        """Takes answers that are there, at most so many, into `told`; answers how many."""
        count = self._answers.check() if most is None else min(most, self._answers.check())
        for _ in range(count):
            segment = self._segment
            slot_at = self._answers.take()
            ticket = AnswerSlot._make(ANSWER_STRUCT.unpack_from(segment.memory, slot_at)).ticket
            numbers, answer = read_answer(segment, slot_at, self._answered_in.get(ticket, {}))
            assert numbers.ticket not in self.told, f"request {numbers.ticket} is answered twice"
            self.told[numbers.ticket] = Told(numbers, answer)
            if numbers.payload_bytes:
                segment.counters[AT["answer_bytes_freed"] // 8] = numbers.payload_end
            self._answers.release()
        self._room.ring()
        return count

    def is_hung_up(self, seconds: float = 0.0) -> bool:
        """Whether the engine has ended the link, within some seconds."""
        assert self.connected is not None
        return bool(select.select([self.connected], [], [], seconds)[0]) and self.connected.recv(1) == b""

    def close(self) -> None:
        """Goes."""
        if self.connected is not None:
            self.connected.close()
        self.handles.close()
