"""A frontend's side of a link whose engine does nothing but what the test does in its place."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import pytest

from blockdex.contract.errors import (
    Code,
    InternalError,
    InvalidArgumentError,
    Reason,
)
from blockdex.ring import client as door
from blockdex.ring.channel import STREAM, PendingAnswer
from blockdex.ring.handshake import new_link
from blockdex.ring.layout import ANSWER_STRUCT, REQUEST_STRUCT, SLOT_BYTES, AnswerSlot, RequestSlot
from blockdex.ring.segment import Segment, Sizes
from support.asking import Asked, eventually, waiting_selection
from support.ring import Bell, Producer
from support.running_engine import (
    LIMITS,
    SPEC,
    TENANT,
    TIMEOUT,
    get,
    refusal,
)

ENGINE_BELLS: WeakKeyDictionary[door.Link, int] = WeakKeyDictionary()
"""The engine's ends of the pairs that links sleep on."""


@pytest.fixture
async def dead_end() -> AsyncIterator[door.Link]:
    """A link to an engine that takes nothing, with four slots."""
    engine, client = new_link(Sizes(4, 1 << 20, 1 << 20), epoch=1)
    link = door.Link(client, lambda: None, None)
    ENGINE_BELLS[link] = engine.client_bell
    info: Any = SimpleNamespace(spec=SPEC, limits=LIMITS)
    link.open_short_way(info, slow_seconds=TIMEOUT)
    yield link
    if not link._closed:
        link.close()
    engine.close()


def begin(link: door.Link) -> PendingAnswer:
    """A request of a channel."""
    pending = PendingAnswer(get(1))
    outgoing = door.Outgoing(pending, pending.request, pending.received + TIMEOUT)
    pending.add_done_callback(lambda done: link.withdraw(outgoing) if done.cancelled() else None)
    link.send(outgoing)
    return pending


async def test_who_waits_behind_a_cancellation_is_refused_in_time(
    dead_end: door.Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "ROOM_SECONDS", 0.2)
    sent = [begin(dead_end) for _ in range(4)]
    sent[0].cancel()
    error = await refusal(begin(dead_end))
    assert (error.reason, error.message) == (
        Reason.OVERLOADED,
        "queue: waited 0.2 s for 6 bytes and a slot among 1048576 and 4",
    )


async def test_nothing_is_kept_of_who_has_gone_without_being_sent(dead_end: door.Link) -> None:
    sent = [begin(dead_end) for _ in range(6)]
    sent[0].cancel()
    for pending in sent[5:]:
        pending.cancel()
    await eventually(lambda: len(dead_end._outbox) == 1)
    assert dead_end._outbox[0].pending is sent[4]


async def test_an_answer_that_means_nothing_takes_no_other_with_it(dead_end: door.Link) -> None:
    asker, segment = Asked(), dead_end._segment
    pending = begin(dead_end)
    for number in (1, 2):
        assert dead_end.send_message(asker, STREAM, TENANT, TIMEOUT, waiting_selection(number))
    tickets = [RequestSlot._make(REQUEST_STRUCT.unpack_from(segment.memory, at)).ticket for at in _slots(segment, 3)]
    answers = Producer(segment, "answer", Bell(segment, "client_sleeps", ENGINE_BELLS[dead_end]))
    segment.memory[segment.answer_arena_offset] = 0xFF  # no UTF-8
    for ticket in tickets:
        slot = AnswerSlot(ticket=ticket, code=3, reason_bytes=1, payload_bytes=1, payload_end=64)
        if ticket == tickets[2]:
            slot = AnswerSlot(ticket=ticket, code=3)
        ANSWER_STRUCT.pack_into(segment.memory, answers.claim(), *slot)
    answers.publish()
    assert (await asker.error(1)).reason == Reason.UNREACHABLE
    assert type(await asker.error(2)) is InvalidArgumentError
    assert not pending.done(), "the channel tells it that the link has ended"


async def test_what_was_answered_at_the_end_is_told(dead_end: door.Link) -> None:
    """An engine that ends for a reason says so last."""
    pending, segment = begin(dead_end), dead_end._segment
    (ticket,) = [RequestSlot._make(REQUEST_STRUCT.unpack_from(segment.memory, at)).ticket for at in _slots(segment, 1)]
    answers = Producer(segment, "answer", Bell(segment, "client_sleeps", ENGINE_BELLS[dead_end]))
    ANSWER_STRUCT.pack_into(segment.memory, answers.claim(), *AnswerSlot(ticket=ticket, code=int(Code.INTERNAL)))
    answers.publish()
    dead_end.close()
    assert isinstance(pending.exception(), InternalError)


def _slots(segment: Segment, count: int) -> list[int]:
    return [segment.request_slots_offset + number * SLOT_BYTES for number in range(count)]
