"""A frontend's side of a link whose engine does nothing but what the test does in its place."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from blockdex.contract.errors import (
    BlockdexError,
    Code,
    InternalError,
    InvalidArgumentError,
    Reason,
)
from blockdex.ring import client
from blockdex.ring.caller import STREAM
from blockdex.ring.handshake import new_link
from blockdex.ring.layout import ANSWER_STRUCT, AT, CANCEL, REQUEST_STRUCT, SLOT_BYTES, AnswerSlot, RequestSlot
from blockdex.ring.segment import Sizes
from support.asking import Asked, PendingAnswer, eventually, waiting_selection
from support.ring import Bell, Producer
from support.running_engine import (
    LIMITS,
    SPEC,
    TENANT,
    TIMEOUT,
    get,
    refusal,
)

ROOM = 1 << 22


class DeadEnd:
    """A link to an engine that takes nothing, with four slots."""

    def __init__(self) -> None:
        self.engine, handles = new_link(Sizes(4, ROOM, 1 << 20), epoch=1)
        self.segment = handles.segment
        info: Any = SimpleNamespace(spec=SPEC, limits=replace(LIMITS, max_queue_ms=200))
        self.breaks = 0
        self.link = client.ClientLink(handles, info, self._broken, TIMEOUT, None)
        self.answers = Producer(self.segment, "answer", Bell(self.segment, "client_sleeps", self.engine.client_bell))

    def _broken(self) -> None:
        self.breaks += 1

    def begin(self) -> PendingAnswer:
        """Asks for the state of a sequence."""
        pending = PendingAnswer(get(1))
        self.link.send_sequence(pending, 0, "GetSequence", get(1), TIMEOUT)
        return pending

    def slots(self) -> list[RequestSlot]:
        """Requests that were sent, in their order, as far as they are not written over."""
        segment = self.segment
        first = segment.request_slots_offset
        count = segment.counters[AT["requests_written"] // 8]
        return [
            RequestSlot._make(REQUEST_STRUCT.unpack_from(segment.memory, first + number % 4 * SLOT_BYTES))
            for number in range(count)
        ]

    def free_slots(self) -> None:
        """Says that all were read."""
        counters = self.segment.counters
        counters[AT["requests_read"] // 8] = counters[AT["requests_written"] // 8]

    def answer(self, *slots: AnswerSlot) -> None:
        """Shows answers."""
        for slot in slots:
            ANSWER_STRUCT.pack_into(self.segment.memory, self.answers.claim(), *slot)
        self.answers.publish()


@pytest.fixture
async def dead_end() -> AsyncIterator[DeadEnd]:
    end = DeadEnd()
    yield end
    if not end.link._closed:
        end.link.close()
    end.engine.close()


async def test_who_waits_behind_a_cancellation_is_refused_in_time(dead_end: DeadEnd) -> None:
    sent = [dead_end.begin() for _ in range(4)]
    assert dead_end.link.give_up(sent[0], 0)
    error = await refusal(dead_end.begin())
    assert (error.reason, error.message) == (
        Reason.OVERLOADED,
        f"queue: waited 0.2 s for 6 bytes and a slot among {ROOM} and 4",
    )
    dead_end.free_slots()
    await eventually(lambda: len(dead_end.slots()) == 5)
    assert dead_end.slots()[4].kind == CANCEL, "the cancellation was not forgotten"


async def test_nothing_is_kept_of_who_has_gone_without_being_sent(dead_end: DeadEnd) -> None:
    sent = [dead_end.begin() for _ in range(6)]
    assert dead_end.link.give_up(sent[4], 0)
    dead_end.free_slots()
    await eventually(lambda: len(dead_end.slots()) == 5)
    assert dead_end.link.waiting == 5
    assert dead_end.slots()[4].kind != CANCEL, "nobody has to be told of what was not sent"


async def test_an_answer_that_means_nothing_takes_no_other_with_it(dead_end: DeadEnd) -> None:
    asker, segment = Asked(), dead_end.segment
    for number in range(3):
        assert dead_end.link.send(asker, STREAM, TENANT, TIMEOUT, waiting_selection(number))
    tickets = [slot.ticket for slot in dead_end.slots()]
    segment.memory[segment.answer_arena_offset] = 0xFF  # no UTF-8
    wrong = AnswerSlot(code=3, reason_bytes=1, payload_bytes=1, payload_end=64)
    dead_end.answer(wrong._replace(ticket=tickets[1]), AnswerSlot(ticket=tickets[2], code=3))
    assert (await asker.error(1)).reason == Reason.UNREACHABLE
    assert type(await asker.error(2)) is InvalidArgumentError
    assert dead_end.breaks == 1
    assert 0 not in asker.told, "the channel tells it that the link has ended"


async def test_an_answer_of_another_kind_breaks_the_link(dead_end: DeadEnd) -> None:
    pending = dead_end.begin()
    dead_end.answer(AnswerSlot(ticket=dead_end.slots()[0].ticket))
    assert (await refusal(pending)).reason == Reason.UNREACHABLE
    assert dead_end.breaks == 1


async def test_what_was_answered_at_the_end_is_told(dead_end: DeadEnd) -> None:
    """An engine that ends for a reason says so last."""
    pending = dead_end.begin()
    dead_end.answer(AnswerSlot(ticket=dead_end.slots()[0].ticket, code=int(Code.INTERNAL)))
    dead_end.link.close()
    assert isinstance(pending.exception(), InternalError)


async def test_a_closed_link_writes_nothing(dead_end: DeadEnd) -> None:
    """Its ends of the pairs are closed, and may be anybody's by now."""
    waiting = [dead_end.begin() for _ in range(5)]
    dead_end.free_slots()
    dead_end.link.close()
    for pending in waiting:
        dead_end.link.give_up(pending, 0)
    assert len(dead_end.slots()) == 4
    assert dead_end.link.waiting == 0


class Meddler:
    """Runs some code when the collector ends it: it is in a circle."""

    def __init__(self, does: Callable[[], object]) -> None:
        self._does = does
        self._circle = self

    def __del__(self) -> None:
        self._does()


async def test_whoever_is_run_by_the_collector_may_give_up_what_is_being_told(dead_end: DeadEnd) -> None:
    """It runs where answers are made, in the midst of the table; nobody is told twice, and nothing is sent twice."""
    asker = Asked()
    gc.collect()
    gc.freeze()  # What is there already need not be looked at each time, which would take a second.
    for round_ in range(5):
        for number in range(3):
            assert dead_end.link.send(asker, STREAM, TENANT, TIMEOUT, waiting_selection(3 * round_ + number))
        slots = dead_end.slots()[-3:]
        dead_end.free_slots()
        given_up: list[object] = []

        def give_up(given_up: list[object] = given_up) -> None:
            given_up.extend(dead_end.link.give_up_all(asker))
            assert dead_end.link._ring.take() == []

        dead_end.answer(*(AnswerSlot(ticket=slot.ticket, code=3) for slot in slots))
        before = gc.get_threshold()
        gc.collect()
        gc.disable()
        try:
            Meddler(give_up)
            # So that it is the next but so many object that is made which runs the collector.
            gc.set_threshold(gc.get_count()[0] + round_)
            gc.enable()
            dead_end.link._look()
        finally:
            gc.enable()
            gc.set_threshold(*before)
        gc.collect()
        numbers = [each.number for each in given_up]  # type: ignore[attr-defined]
        assert sorted([*numbers, *asker.told]) == [3 * round_ + number for number in range(3)]
        assert all(isinstance(error, BlockdexError) for error in asker.told.values())
        asker.told.clear()
        dead_end.free_slots()
    gc.unfreeze()
    assert dead_end.link.waiting == 0 and dead_end.breaks == 0
