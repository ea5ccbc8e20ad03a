"""What waits for room on a link, what is given up, and that all room comes back."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.ring_messages import TokenAnswer, TokenRequest
from blockdex._native import MORE_TO_COPY, NOTHING_LEFT, QUEUED, SENT, WAITS_FOR_ROOM, set_weight
from blockdex.contract.errors import Reason
from blockdex.ring import layout
from blockdex.ring.caller import STREAM
from blockdex.ring.layout import AT, aligned
from blockdex.v1 import indexer_pb2 as pb
from support.client_link import LARGE, ME, ROOMY, SLOTS, TENANT, Core, append, check_sent, in_stream, large, opened


def fill(core: Core, count: int) -> list[Any]:
    """What became of so many appends of one stream."""
    return [core.send(STREAM, in_stream(0, append(), number).SerializeToString()) for number in range(count)]


def test_one_more_than_may_wait_is_refused() -> None:
    with opened(max_waiting=3) as core:
        *sent, refused = fill(core, 4)
        assert sent == 3 * [SENT]
        assert refused[1:] == (3, 8, Reason.OVERLOADED, "queue: at most 3 requests may wait, 3 do")


def test_numbers_in_flight_twice_are_refused() -> None:
    wire = in_stream(0, append(), 5).SerializeToString()
    with opened() as core:
        assert core.send(STREAM, wire) == SENT
        twice = core.send(STREAM, wire)
        assert twice[1:] == (5, 3, Reason.DUPLICATE_REQUEST_ID, "request_id: 5 is in flight already")
        assert core.send(STREAM, wire, object()) == SENT, "another one's"
        core.answer(core.take().ticket, TokenAnswer(9))
        assert [(asker, number) for asker, number, *_ in core.link.take()] == [(ME, 5)]
        assert core.send(STREAM, wire) == SENT


def test_who_finds_no_slot_waits_and_so_do_all_behind() -> None:
    with opened(max_waiting=100) as core:
        assert fill(core, SLOTS + 2) == SLOTS * [SENT] + 2 * [QUEUED]
        assert core.link.flush() == WAITS_FOR_ROOM
        core.take()
        assert core.send(0, append().SerializeToString(), object()) == QUEUED, "it does not overtake them"
        core.take()
        assert core.link.flush() == WAITS_FOR_ROOM and core.written == SLOTS + 2
        core.take()
        assert core.link.flush() == NOTHING_LEFT and core.written == SLOTS + 3
        numbers = [core.numbers(slot).ticket for slot in range(SLOTS + 3)]
        assert len(set(numbers[-SLOTS:])) == SLOTS


def test_who_finds_no_room_waits_and_says_the_same_later() -> None:
    with opened(requests=3 * 128 + 64, max_waiting=100) as core:
        assert fill(core, 4) == 3 * [SENT] + [QUEUED]
        assert core.ask(number=4) == QUEUED
        first = core.take().ticket
        core.answer(first, TokenAnswer(9))
        assert len(core.link.take()) == 1
        assert core.link.flush() == NOTHING_LEFT and core.written == 5
        for _ in range(2):
            core.take()
        check_sent(core, append(), 7.0)
        assert core.numbers(4).kind == layout.GET


def test_who_waits_too_long_is_given_up() -> None:
    with opened(requests=2 * 128, max_waiting=100) as core:
        assert fill(core, 4) == 2 * [SENT] + 2 * [QUEUED]
        assert core.link.overdue(60.0) == []
        late = core.link.overdue(0.0)
        assert [(each[0], each[1], each[2]) for each in late] == [(ME, 2, 3), (ME, 3, 3)]
        assert all(each[7] == 128 for each in late), "bytes that there was no room for"
        assert core.link.flush() == NOTHING_LEFT
        assert (core.written, core.link.waiting) == (2, 2)


def test_one_tenant_leaves_room_and_places_for_others() -> None:
    with opened(requests=36 * 128, slots=64, max_waiting=54) as core:
        greedy = [core.send(0, append().SerializeToString(), object(), "greedy") for _ in range(60)]
        sent, queued = greedy.count(SENT), greedy.count(QUEUED)
        assert (sent, queued) == (32, 16), "of 36 that there is room for, and of 54 that may wait"
        number, code, reason, text = greedy[-1][1:]
        assert (number, code, reason) == (0, 8, Reason.OVERLOADED)
        assert text == "queue: the tenant's share of it is used up: 48 requests, 6144 bytes"
        assert not core.link.may_begin("greedy", 0) and core.link.may_begin("modest", 4 * 128)
        assert core.send(0, append().SerializeToString(), object(), "modest") == SENT, "what waits is another one's"
        for _ in range(2):
            core.answer(core.take().ticket, TokenAnswer(9))
        assert len(core.link.take()) == 2
        assert core.link.flush() == WAITS_FOR_ROOM and core.written == 34, "one less than before: another one asks too"


def test_who_has_its_share_holds_up_nobody_behind_it() -> None:
    with opened(requests=36 * 128, slots=64, max_waiting=54) as core:
        for _ in range(40):
            core.send(0, append().SerializeToString(), object(), "greedy")
        modest = [core.send(0, append().SerializeToString(), object(), "modest") for _ in range(5)]
        assert modest == 4 * [SENT] + [QUEUED], "the room is used up, and others wait before it"
        tickets = [core.take().ticket for _ in range(36)]
        core.answer(tickets[32], TokenAnswer(9))
        assert len(core.link.take()) == 1
        assert core.link.flush() == WAITS_FOR_ROOM and core.written == 37
        assert core.numbers(36).tenant_bytes == len("modest")


def test_what_was_given_up_counts_until_it_is_answered() -> None:
    with opened(requests=36 * 128, slots=64, max_waiting=9) as core:
        for _ in range(8):
            owner = object()
            assert core.send(0, append().SerializeToString(), owner, "greedy") == SENT
            assert core.link.give_up(owner, 0) is not None
        assert core.link.waiting == 0
        many = [core.send(0, append().SerializeToString(), object(), "greedy") for _ in range(64)]
        assert SENT in many and many[-1][3] == Reason.OVERLOADED


def test_weights_are_shares_of_room() -> None:
    set_weight("heavy", 2.0)
    with opened(requests=1 << 20, slots=256, max_waiting=170) as core:
        counts = {}
        for tenant in ("light", "heavy"):
            became = [core.send(0, append().SerializeToString(), object(), tenant) for _ in range(170)]
            counts[tenant] = became.count(SENT)
    assert counts == {"light": 152, "heavy": 17}, "eight ninths of all, then sixteen seventeenths of what was left"


def test_long_requests_are_copied_in_slices_beside_those_of_others() -> None:
    other = object()
    with opened(**ROOMY) as core:
        assert core.send(STREAM, large(1)) == QUEUED
        assert core.send(STREAM, in_stream(0, append(), 2).SerializeToString()) == QUEUED, "behind its own"
        for step in range(LARGE // (1 << 19) - 1):
            assert core.link.flush() == MORE_TO_COPY
            assert core.send(0, append().SerializeToString(), other) == SENT
            assert core.written == step + 1
            core.answer(core.take().ticket, TokenAnswer(9))
            assert [each[0] for each in core.link.take()] == [other]
        before = core.written
        assert core.link.flush() == NOTHING_LEFT
        assert core.written == before + 2
        request = core.take().request
        assert isinstance(request, TokenRequest) and request.keys is not None
        assert bytes(request.keys.tensor.data) == np.arange(LARGE // 4, dtype=np.uint32).tobytes()
        check_sent(core, append(), 7.0)


def test_no_slice_takes_longer_than_its_share() -> None:
    """One after the other, so that what else this machine does counts for both."""
    with opened(requests=1 << 28, max_waiting=100, max_message_bytes=80 << 20) as core:
        keys = pb.Tensor(dtype=pb.DTYPE_BF16, data=bytes(80 << 20))
        spans = pb.Spans(sequence_ids=[1], starts=[0], lengths=[10 << 20])
        message = pb.AppendKeysRequest(spans=spans, keys=keys).SerializeToString()
        began = time.thread_time()
        assert core.send(0, message) == QUEUED
        took = [time.thread_time() - began]
        while core.written == 0:
            began = time.thread_time()
            core.link.flush()
            took.append(time.thread_time() - began)
        assert len(took) == 1 + 160
        assert max(took) < sum(took) / 10, "at most a tenth of 80 MiB, where a slice is a 160th"


@pytest.mark.parametrize("flushes", [0, 1])
def test_giving_up_what_is_being_copied_gives_all_back(flushes: int) -> None:
    with opened(**ROOMY) as core:
        for number in range(3):
            assert core.send(STREAM, large(number)) == QUEUED
        for _ in range(flushes):
            core.link.flush()
        assert [each[1] for each in core.link.give_up_all(ME)] == [0, 1, 2]
        assert core.link.flush() == NOTHING_LEFT
        assert (core.written, core.link.waiting) == (0, 0)
        assert core.ask() == SENT and core.numbers(0).payload_offset == 0


def test_who_gives_up_is_told_of_no_answer_and_the_engine_hears_of_it() -> None:
    with opened() as core:
        other = object()
        for owner, number in ((ME, 1), (ME, 2), (other, 1)):
            assert core.send(STREAM, in_stream(0, append(), number).SerializeToString(), owner) == SENT
        tickets = [core.take().ticket for _ in range(3)]
        assert core.link.give_up(ME, 3) is None
        assert core.link.give_up(ME, 2)[:3] == (ME, 2, 3)
        assert core.take()[:2] == (tickets[1], None)
        assert core.link.waiting == 2
        assert [each[0] for each in core.link.give_up_all(other)] == [other]
        assert [each[:2] for each in core.link.give_up_all(None)] == [(ME, 1)]
        for ticket in tickets:
            core.answer(ticket, TokenAnswer(9))
        assert core.link.take() == []
        assert core.segment.flags[AT["client_sleeps"] // 4] == 1, "it looked again before it lay down"
        assert core.link.waiting == 0


def test_cancellations_wait_for_slots_and_requests_wait_behind_them() -> None:
    with opened(max_waiting=100) as core:
        assert fill(core, SLOTS) == SLOTS * [SENT]
        tickets = [core.numbers(slot).ticket for slot in range(SLOTS)]
        for number in (0, 1):
            assert core.link.give_up(ME, number) is not None
        assert core.link.flush() == WAITS_FOR_ROOM
        for _ in range(SLOTS):
            core.take()
        assert core.link.flush() == NOTHING_LEFT
        assert [core.take()[:2] for _ in range(2)] == [(ticket, None) for ticket in tickets[:2]]


ARENA = 4096


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 249), st.integers(0, 100)), max_size=120))
def test_extents_never_overlap_and_all_room_comes_back(steps: list[tuple[bool, int, int]]) -> None:
    with opened(requests=ARENA, slots=256, max_waiting=200) as core:
        taken: dict[int, tuple[int, int]] = {}
        numbers = itertools.count()

        def give_back(offset: int) -> None:
            core.answer(taken.pop(offset)[0], TokenAnswer(9))
            assert len(core.link.take()) == 1

        for gives_back, size, which in steps:
            if gives_back and taken:
                give_back(sorted(taken)[which % len(taken)])
                continue
            wanted = aligned(64 + 8 * size)
            used = sorted((offset, offset + length) for offset, (_, length) in taken.items())
            edges = [0, *(edge for extent in used for edge in extent), ARENA]
            holes = [(begin, end) for begin, end in zip(edges[::2], edges[1::2], strict=True) if end - begin >= wanted]
            owner = object()
            # A tenant of its own, who may have any room that there is.
            tenant = f"{next(numbers):0{len(TENANT)}}"
            became = core.send(0, append(size).SerializeToString(), owner, tenant)
            assert became == (SENT if holes else QUEUED)
            if holes:
                ticket, offset = core.take().ticket, core.numbers(core.written - 1).payload_offset
                assert offset == holes[0][0], "the lowest hole that is wide enough"
                taken[offset] = (ticket, wanted)
            else:
                core.link.give_up(owner, 0)
        for offset in list(taken):
            give_back(offset)
        assert core.ask() == SENT and core.numbers(core.written - 1).payload_offset == 0
