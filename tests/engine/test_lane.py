"""The lane alone: what it takes and what it leaves, its steps on a device, and doors and devices that misbehave."""

from __future__ import annotations

import dataclasses
import os
import queue
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

import lane_without_memory
from bare_lane import EPOCH, HELD, LENGTH, LONGEST, SECONDS_BOUNDS, SIZES, SPEC, BareLane, Seen, bare_lane
from blockdex import _native as native
from blockdex.errors import BlockdexError, Code
from blockdex.messages import TokenAnswer, TokenRequest
from blockdex.transport.layout import AT, SLOT_BYTES, RequestSlot
from blockdex.transport.segment import Sizes
from foreign_door import ForeignDoor
from running_engine import TENANT, TIMEOUT, tokens, values

SIZE = SPEC.block_size
MANY_LINES = 10_000
ALL = [(native.MAX_RUNS, 2, 1000), (128, LONGEST, 1000)]
"""Programs for more than any request of these tests."""


@pytest.fixture
def bare() -> Iterator[BareLane]:
    """A lane that runs its steps at once."""
    with bare_lane() as made:
        yield made


@pytest.fixture
def device_lane() -> Iterator[BareLane]:
    """A lane whose steps are on their way until the test ends them."""
    with bare_lane(replays=ALL) as made:
        yield made


def check_answer(door: ForeignDoor, ticket: int, request: TokenRequest) -> None:
    """Checks that an answer is that of this request: its queries, as the device sends them back."""
    numbers, answer = door.told[ticket]
    assert isinstance(answer, TokenAnswer) and answer.block_ids is not None and answer.scores is None
    assert request.queries is not None
    sent = np.frombuffer(request.queries.tensor.data, np.uint16).reshape(-1, SPEC.num_index_heads, SPEC.head_dim)
    np.testing.assert_array_equal(answer.block_ids, sent[:, :, : SPEC.topk])
    assert (answer.epoch, numbers.phase) == (EPOCH, 2)
    assert min(numbers.queue_seconds, numbers.plan_seconds, numbers.device_seconds, numbers.reply_seconds) >= 0


def usual(bare: BareLane) -> TokenRequest:
    """Goes on with one sequence, and writes the end of another one anew."""
    return bare.both(1, (1, LENGTH, 1, 5), (2, LENGTH - 2, 3))


class Case(NamedTuple):
    """What is changed of the usual request or of the books, so that just one check fails."""

    slot: dict[str, Any] = {}  # noqa: RUF012
    rows: tuple[tuple[int, ...], ...] = ()
    tenant: str = TENANT
    books: Callable[[BareLane], None] = lambda bare: None


def change(name: str, value: int) -> Callable[[BareLane], None]:
    """Changes what a book says of the first sequence, in layer 1."""

    def changed(bare: BareLane) -> None:
        book = getattr(bare, name)
        book[(1, 0) if book.ndim == 2 else 0] = value

    return changed


NEXT = (2, LENGTH, 1)
LEFT = {
    "another kind": Case({"kind": 2}),
    "a cancellation": Case({"kind": 7}),
    "no keys": Case({"keys_dtype": 0}),
    "keys of fp16": Case({"keys_dtype": 2}),
    "no queries": Case({"queries_dtype": 0}),
    "queries of fp16": Case({"queries_dtype": 2}),
    "by score": Case({"order": 2}),
    "no order": Case({"order": 0}),
    "with scores": Case({"flags": 1}),
    "waiting": Case({"flags": 2}),
    "another epoch": Case({"epoch": EPOCH + 1}),
    "too late": Case({"deadline": 0}),
    "no such layer": Case({"layer": SPEC.num_layers}),
    "no spans": Case({"num_spans": 0}),
    "another first head": Case({"first_head": 1}),
    "fewer heads": Case({"num_heads": 1}),
    "an offset that is not aligned": Case({"payload_offset": 8}),
    "an offset beyond the arena": Case({"payload_offset": 1 << 40}),
    "more bytes than the arena has": Case({"payload_bytes": 1 << 40}),
    "a byte less": Case({"payload_bytes": -1}),
    "a byte more": Case({"payload_bytes": 1}),
    "keys beyond the payload": Case({"keys_bytes": 2**64 - 128, "payload_bytes": 0}),
    "queries beyond the payload": Case({"queries_bytes": 2**64 - 64}),
    "keys of another size": Case({"keys_bytes": 2}),
    "queries of another size": Case({"queries_bytes": -2, "payload_bytes": -2}),
    "an unknown tenant": Case(tenant="another"),
    "an unknown sequence": Case(rows=((1000, LENGTH, 1), NEXT)),
    "a sequence that was closed": Case(books=change("generations", 1)),
    "a sequence that is blocked": Case(books=change("blocked", 1)),
    "a start below 0": Case(rows=((1, -1, 1), NEXT), books=change("lengths", 0)),
    "a gap": Case(rows=((1, LENGTH + 1, 1), NEXT)),
    "no tokens": Case(rows=((1, LENGTH, 0), NEXT)),
    "fewer than no tokens": Case(rows=((1, LENGTH, -1), (2, LENGTH, 2))),
    "more tokens than a decode has": Case(rows=((1, LENGTH, LONGEST + 1), NEXT)),
    "a page that is not there": Case(rows=((1, HELD * SIZE - 1, 2), NEXT), books=change("lengths", HELD * SIZE - 1)),
    "a page less": Case(rows=((1, SIZE, SIZE // 2), NEXT)),
    "up to the end of the page before": Case(rows=((1, 2 * SIZE - 1, 1), NEXT)),
    "a page that was shared": Case(books=change("forked", LENGTH // SIZE + 1)),
    "a revision that is there": Case(books=change("revisions", 5)),
    "a revision before": Case(books=change("revisions", 6)),
    "a sequence twice": Case(rows=((1, LENGTH, 1), (2, LENGTH, 1), (1, LENGTH, 1))),
    "the last row": Case(rows=((2, LENGTH, 1), (3, LENGTH, 1), (1, LENGTH + 1, 1))),
}


def snapshot(bare: BareLane) -> list[Any]:
    """What the books hold."""
    return [book.tolist() for book in (bare.lengths, bare.revisions, bare.last_calls)]


@pytest.mark.parametrize("name", LEFT)
def test_whatever_is_unusual_is_left_as_it_is(bare: BareLane, name: str) -> None:
    """Just one thing is wrong with each; beside them are requests that are taken."""
    case = LEFT[name]
    doors = [bare.open_door() for _ in range(3)]
    request = bare.both(1, *case.rows, tenant=case.tenant) if case.rows else usual(bare)
    request = dataclasses.replace(request, tenant=case.tenant)
    numbers = doors[1].lay(request, 1)._asdict()
    for field, value in case.slot.items():
        relative = field.endswith("_bytes") and abs(value) < 64
        numbers[field] = numbers[field] + value if relative else value
    doors[0].send(bare.both(1, (5, LENGTH, 1)))
    doors[1].write(RequestSlot(**numbers))
    doors[2].send(bare.both(1, (6, LENGTH, 1)))
    case.books(bare)
    before = snapshot(bare)
    assert bare.look() == native.FOR_PYTHON
    assert [line.waits for line in bare.lines] == [False, True, False]
    assert [line.filled for line in bare.lines] == [0, 1, 0]
    assert bare.counted["requests"][1] == 2, "those beside it"
    for book, old in zip(snapshot(bare)[:2], before[:2], strict=True):
        others = [4, 5]  # their columns
        assert [column for number, column in enumerate(zip(*book, strict=True)) if number not in others] == [
            column for number, column in enumerate(zip(*old, strict=True)) if number not in others
        ]


TAKEN = {
    "as it is": Case(),
    "of this epoch": Case({"epoch": EPOCH}),
    "the last layer": Case({"layer": SPEC.num_layers - 1}),
    "the longest": Case(rows=((1, LENGTH, LONGEST), NEXT)),
    "up to the last token of the last page": Case(
        rows=((1, HELD * SIZE - 2, 2), NEXT), books=change("lengths", HELD * SIZE - 2)
    ),
    "from the beginning": Case(rows=((1, 0, 2), NEXT), books=change("lengths", 0)),
    "the whole of the last page again": Case(rows=((1, 2 * SIZE, LONGEST), NEXT)),
    "up to the end of the last page but one": Case(
        rows=((1, 2 * SIZE - 1, 1), NEXT), books=change("lengths", 2 * SIZE)
    ),
    "right behind what was shared": Case(books=change("forked", LENGTH // SIZE)),
    "the next revision": Case(books=change("revisions", 4)),
    "no revision": Case(rows=((1, LENGTH, 1), NEXT), books=change("revisions", 4)),
    "two layers of a sequence": Case(rows=((5, LENGTH, 1), NEXT)),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_right_to_the_last_number_is_taken(bare: BareLane, name: str) -> None:
    case = TAKEN[name]
    door = bare.open_door()
    request = bare.both(1, *case.rows) if case.rows else usual(bare)
    case.books(bare)
    last_calls, before = time.monotonic(), bare.lengths.copy()
    other = bare.both(0, (5, LENGTH, 1))
    door.write(door.lay(other, 0), door.lay(request, 1)._replace(**case.slot))
    assert bare.look() == 0
    assert bare.look() == 0  # its answers
    door.read()
    check_answer(door, 0, other)
    check_answer(door, 1, request)
    layer = case.slot.get("layer", 1)
    spans = request.spans
    for sequence, start, length, revision in zip(
        *(column.tolist() for column in (spans.sequence_ids, spans.starts, spans.lengths, spans.revisions)), strict=True
    ):
        assert bare.lengths[layer, sequence - 1] == start + length
        before[layer, sequence - 1] = start + length
        if revision:
            assert bare.revisions[layer, sequence - 1] == revision
        assert last_calls <= bare.last_calls[sequence - 1] <= time.monotonic()
    before[0, 4] += 1
    np.testing.assert_array_equal(bare.lengths, before)
    assert bare.last_calls[10] == 0
    if name == "no revision":
        assert bare.revisions[1, 0] == 4, "as it was"


def test_some_of_the_heads_are_left(bare: BareLane) -> None:
    door = bare.open_door()
    whole = bare.both(0, (1, LENGTH, 1))
    queries = values(np.random.default_rng(1), 1, 1, SPEC.head_dim)
    door.write(door.lay(dataclasses.replace(whole, queries=tokens(0, [(1, LENGTH, 1)], queries=queries).queries), 0))
    assert bare.look() == native.FOR_PYTHON


def test_tensors_that_are_twice_as_long_as_the_spans_are_left(bare: BareLane) -> None:
    """They agree with each other."""
    door = bare.open_door()
    long = bare.both(0, (1, LENGTH, 2))
    door.send(dataclasses.replace(long, spans=bare.both(0, (1, LENGTH, 1)).spans))
    assert bare.look() == native.FOR_PYTHON


@pytest.mark.parametrize("begin", [8, SIZES.request_bytes - 64])
def test_a_payload_where_none_can_be_is_left(bare: BareLane, begin: int) -> None:
    """Not at a multiple of 64, or with its end in the answers' arena, which lies behind that of the requests."""
    door = bare.open_door()
    slot = door.lay(bare.both(0, (1, LENGTH, 1)), 0)
    segment = door.handles.segment
    assert segment.answer_arena_offset == segment.request_arena_offset + segment.request_arena_bytes
    payload = bytes(door.arena[: slot.payload_bytes])
    at = segment.request_arena_offset + begin
    segment.memory[at : at + len(payload)] = payload
    door.write(slot._replace(payload_offset=begin))
    assert bare.look() == native.FOR_PYTHON


def test_an_answer_for_which_there_is_never_room_is_left() -> None:
    with bare_lane() as bare:
        ids = 4 * 2 * SPEC.num_index_heads * SPEC.topk
        exact, small = (
            bare.open_door(Sizes(slots=4, request_bytes=1 << 16, answer_bytes=2 * size)) for size in (ids, ids - 32)
        )
        for number, door in enumerate((exact, small)):
            door.send(bare.both(0, (1 + number, LENGTH, 2)))
        assert bare.look() == native.FOR_PYTHON
        assert [line.waits for line in bare.lines] == [False, True]


def test_the_head_of_a_line_is_for_python_until_it_is_taken(bare: BareLane) -> None:
    door = bare.open_door()
    request = usual(bare)
    door.write(door.lay(request, 0)._replace(flags=1), door.lay(request, 1))
    for _ in range(3):
        assert bare.look() == native.FOR_PYTHON
    (line,) = bare.lines
    assert bare.lane.steps == 0
    line.release()
    assert not line.waits
    assert bare.look() == 0
    assert (bare.lane.steps, line.filled) == (1, 0)


def test_a_number_that_cannot_be_is_for_python(bare: BareLane) -> None:
    door = bare.open_door()
    door.handles.segment.counters[AT["requests_written"] // 8] = 65
    assert bare.look() == native.FOR_PYTHON
    assert (bare.lines[0].filled, bare.lines[0].waits) == (-1, True)


def test_who_goes_leaves_nothing_for_python(bare: BareLane) -> None:
    door = bare.open_door()
    door.write(door.lay(usual(bare), 0)._replace(flags=1))
    assert bare.look() == native.FOR_PYTHON
    bare.lines[0].gone = True
    assert bare.look() == 0


def test_a_whole_ring_is_no_such_number(bare: BareLane) -> None:
    door = bare.open_door(Sizes(slots=4, request_bytes=1 << 16, answer_bytes=1 << 16))
    door.send(*[bare.both(0, (sequence, LENGTH, 1)) for sequence in (1, 2, 3, 4)])
    assert (bare.lines[0].filled, bare.look(), bare.lines[0].filled) == (4, 0, 0)


# --- Steps ---


def columns(seen: Seen, runs: int) -> list[tuple[int, ...]]:
    """The rows of a step, and a check that there are no others."""
    assert not seen.columns[2, runs:].any(), "padding has no tokens"
    return [tuple(column) for column in seen.columns[:, :runs].T.tolist()]


def test_a_step_holds_all_that_came(device_lane: BareLane) -> None:
    bare = device_lane
    first, second = bare.open_door(), bare.open_door()
    requests = [usual(bare), bare.both(2, (3, LENGTH, LONGEST)), bare.both(2, (1, LENGTH - 1, 2))]
    first.send(*requests[:2])
    second.send(requests[2])
    assert bare.look() == 0
    (seen,) = bare.device.begun
    assert columns(seen, 4) == [
        (1, LENGTH, 1, 100),
        (1, LENGTH - 2, 3, 101),
        (2, LENGTH, LONGEST, 102),
        (2, LENGTH - 1, 2, 100),
    ]
    keys, queries = (
        b"".join(bytes(getattr(request, half).tensor.data) for request in requests) for half in ("keys", "queries")
    )
    assert seen.keys[:10].tobytes() == keys
    assert seen.queries[:10].tobytes() == queries
    assert bare.look() == 0
    assert not first.read() and not second.read(), "nothing has ended yet"
    bare.device.end()
    assert bare.look() == 0
    assert (first.read(), second.read()) == (2, 1)
    for door, ticket, request in ((first, 0, requests[0]), (first, 1, requests[1]), (second, 0, requests[2])):
        check_answer(door, ticket, request)


def test_the_smallest_program_that_holds_it() -> None:
    shapes = [(1, 1, 3), (2, 1, 3), (2, LONGEST, 3), (4, 2, 4)]
    with bare_lane(replays=shapes) as bare:
        door = bare.open_door()
        for number, (rows, runs, length) in enumerate(
            [
                ([(1, LENGTH, 1)], 1, 1),
                ([(1, LENGTH, 1), (2, LENGTH, 1)], 2, 1),
                ([(1, LENGTH, 2)], 2, LONGEST),
                ([(1, LENGTH, 3), (2, LENGTH, 1)], 2, LONGEST),
                ([(1, 24, 1)], 4, 2),  # the fourth block
                ([(1, 23, 1)], 1, 1),
                ([(1, LENGTH, 1), (2, LENGTH, 1), (3, LENGTH, 2)], 4, 2),
            ]
        ):
            bare.lengths[:] = 24
            request = bare.both(0, *rows)
            door.send(request, first_ticket=number)
            assert bare.look() == 0
            assert bare.device.begun[0].columns.shape[1] == runs
            assert len(bare.device.begun[0].keys) == runs * length
            bare.device.end()
            bare.look()
            door.read()
            check_answer(door, number, request)


@pytest.mark.parametrize(
    "rows",
    [
        [(1, LENGTH, 1), (2, LENGTH, 1), (3, LENGTH, 1)],  # more runs
        [(1, LENGTH, 2)],  # longer
        [(1, LENGTH + 4, 1)],  # wider
    ],
)
def test_what_no_program_holds_is_left(rows: list[tuple[int, ...]]) -> None:
    with bare_lane(replays=[(2, 1, 3)]) as bare:
        bare.lengths[:] = 24
        bare.open_door().send(bare.both(0, *rows))
        assert bare.look() == native.FOR_PYTHON
        assert not bare.device.begun


def test_what_no_program_holds_together_is_in_two_steps() -> None:
    with bare_lane(replays=[(2, 1, 3), (1, LONGEST, 3)]) as bare:
        door = bare.open_door()
        requests = [bare.both(0, (1, LENGTH, 1)), bare.both(0, (2, LENGTH, 2)), bare.both(0, (3, LENGTH, 1))]
        door.send(*requests)
        assert bare.look() == 0
        assert bare.look() == 0
        assert [columns(seen, 1) for seen in bare.device.begun] == [[(0, LENGTH, 1, 100)], [(0, LENGTH, 2, 101)]]
        bare.device.end()
        assert bare.look() == 0
        bare.device.end()
        bare.device.end()
        bare.look()
        door.read()
        for ticket, request in enumerate(requests):
            check_answer(door, ticket, request)


def test_what_is_long_and_what_is_wide_is_not_put_together_where_no_program_is_both() -> None:
    with bare_lane(replays=[(1, 1, 4), (2, 1, 3), (1, LONGEST, 3)]) as bare:
        bare.lengths[:] = 24
        door = bare.open_door()
        door.send(
            bare.both(0, (1, 24, 1)), bare.both(0, (2, 23, 1)), bare.both(0, (3, 20, 4)), bare.both(0, (4, 23, 1))
        )
        widths = []
        for _ in range(4):
            bare.look()
            widths.append(bare.device.end().columns[1].tolist())
        assert widths == [[24], [23], [20], [23]]


def test_the_last_token_of_a_step() -> None:
    with bare_lane(sequences=200) as bare:
        door = bare.open_door()
        rows = [(sequence, LENGTH, LONGEST) for sequence in range(1, 128)]
        door.send(bare.both(0, *rows), bare.both(0, (150, LENGTH, 4)), bare.both(0, (151, LENGTH, 1)))
        bare.look()
        assert (bare.lane.steps, bare.counted["num_tokens"]) == (1, native.MAX_TOKENS)
        bare.look()
        assert (bare.lane.steps, bare.counted["num_tokens"]) == (2, native.MAX_TOKENS + 1)


@pytest.mark.parametrize("replays", [None, ALL])
def test_as_many_runs_and_tokens_as_a_step_holds(replays: list[tuple[int, int, int]] | None) -> None:
    """The 256th run, or the 512th token, is still in; the next one is in the next step."""
    with bare_lane(sequences=600, replays=replays) as bare:
        door = bare.open_door()
        halves = [
            [(sequence, LENGTH, length) for sequence in range(first, first + count)]
            for first, count, length in (
                (1, 100, 1),
                (101, 156, 1),
                (257, 1, 1),
                (300, 255, 2),
                (555, 1, 2),
                (556, 1, 1),
            )
        ]
        requests = [bare.both(0, *rows) for rows in halves]
        door.send(*requests)
        runs, tokens = [], []
        for _ in range(8):
            bare.look()
            if bare.device.begun:
                seen = bare.device.end()
                runs.append(int((seen.columns[2] > 0).sum()))
                tokens.append(int(seen.columns[2].sum()))
        door.read()
        for ticket, request in enumerate(requests):
            check_answer(door, ticket, request)
        assert bare.lane.steps == 3
        if replays:
            assert (runs, tokens) == ([256, 256, 2], [256, 511, 3]) or (runs, tokens) == ([256, 257, 1], [256, 512, 1])


def test_a_request_of_more_runs_than_a_step_is_left() -> None:
    with bare_lane(sequences=300) as bare:
        bare.open_door().send(bare.both(0, *[(sequence, LENGTH, 1) for sequence in range(1, native.MAX_RUNS + 2)]))
        assert bare.look() == native.FOR_PYTHON


def test_a_request_of_more_tokens_than_a_step_is_left() -> None:
    with bare_lane(sequences=300) as bare:
        rows = [(sequence, LENGTH, LONGEST) for sequence in range(1, native.MAX_TOKENS // LONGEST + 1)]
        door = bare.open_door()
        door.send(bare.both(0, *rows), bare.both(1, *rows, (250, LENGTH, 1)))
        assert bare.look() == 0
        assert bare.look() == native.FOR_PYTHON
        assert (bare.lane.steps, bare.counted["num_tokens"]) == (1, native.MAX_TOKENS)


def test_one_layer_of_a_sequence_is_once_in_a_step(device_lane: BareLane) -> None:
    """What goes on with it is in the next one; its other layers, and other sequences, are not held up."""
    bare = device_lane
    doors = [bare.open_door() for _ in range(3)]
    doors[0].send(bare.both(0, (1, LENGTH, 1)))
    doors[1].send(bare.both(0, (2, LENGTH, 1), (1, LENGTH + 1, 1)), bare.both(0, (3, LENGTH, 1)))
    doors[2].send(bare.both(1, (1, LENGTH, 1)), bare.both(0, (2, LENGTH, 1)))
    bare.look()
    bare.look()
    first, second = bare.device.begun
    assert columns(first, 3) == [(0, LENGTH, 1, 100), (1, LENGTH, 1, 100), (0, LENGTH, 1, 101)]
    assert bare.lines[1].waits is False
    # The lines take turns: the second one comes first now. Its first row writes anew what another has written since.
    assert columns(second, 3) == [(0, LENGTH, 1, 101), (0, LENGTH + 1, 1, 100), (0, LENGTH, 1, 102)]


def test_more_marks_than_there_are_places_near_each_other() -> None:
    """Undone and made again, in any order, marks stay what they are."""
    with bare_lane(sequences=256, replays=ALL) as bare:
        first, second = bare.open_door(), bare.open_door()
        names = list(range(1, 201))
        first.send(bare.both(0, *[(sequence, LENGTH, 1) for sequence in names]))
        second.send(
            bare.both(0, *[(sequence, LENGTH, 1) for sequence in range(201, 240)], (200, LENGTH + 1, 1)),
        )
        bare.look()
        assert len(bare.device.begun) == 1
        bare.look()
        assert bare.device.begun[1].columns[2].sum() == 40


def test_the_lines_take_turns() -> None:
    """One of them always has a step's worth of requests; nobody waits for longer than a step."""
    with bare_lane(sequences=600) as bare:
        greedy, modest = bare.open_door(), bare.open_door()
        whole = [[(sequence, LENGTH, 1) for sequence in range(first, first + 256)] for first in (1, 257)]
        greedy.send(*[bare.both(0, *whole[number % 2]) for number in range(6)])
        for ticket in range(3):
            modest.send(bare.both(0, (590 + ticket, LENGTH, 1)), first_ticket=ticket)
            for _ in range(3):
                bare.look()
            assert modest.read() == 1, ticket
        greedy.read()
        assert len(greedy.told) >= 3


def test_answers_come_when_every_block_id_is_there(device_lane: BareLane) -> None:
    bare = device_lane
    door = bare.open_door()
    request = bare.both(0, (1, LENGTH, 1), (2, LENGTH, 1))
    door.send(request)
    bare.look()
    ids = bare.device.rooms[0][1]
    untouched = ids.copy()
    seen = bare.device.begun[0]
    bare.device.end()
    ended = ids.copy()
    size = len(seen.queries) * SPEC.num_index_heads * SPEC.topk
    for missing in (0, size // 2, size - 1):
        ids[:] = ended
        ids[missing] = untouched[missing]
        bare.look()
        assert not door.read(), missing
    ids[:] = ended
    bare.look()
    door.read()
    check_answer(door, 0, request)


def test_two_steps_are_on_their_way_and_no_third(device_lane: BareLane) -> None:
    bare = device_lane
    door = bare.open_door()
    requests = [bare.both(0, (1, LENGTH + number, 1)) for number in range(5)]
    for ticket, request in enumerate(requests[:3]):
        door.send(request, first_ticket=ticket)
        bare.look()
    assert [seen.room for seen in bare.device.begun] == [0, 1]
    assert (bare.lane.in_flight, bare.lane.steps) == (2, 2)
    bare.device.end()
    bare.look()  # answers the first, begins the third in its room
    assert [seen.room for seen in bare.device.begun] == [1, 0]
    assert door.read() == 1
    for ticket, request in enumerate(requests[3:], start=3):
        door.send(request, first_ticket=ticket)
    while len(door.told) < 5:
        bare.device.end()
        bare.look()
        door.read()
    for ticket, request in enumerate(requests):
        check_answer(door, ticket, request)
    assert (bare.lane.in_flight, bare.lane.launched) == (0, 0.0)


def test_what_cannot_be_set_is_refused(device_lane: BareLane) -> None:
    bare = device_lane
    host, ids = bare.device.rooms[0]
    with pytest.raises(ValueError, match=r"host has \d+ bytes, \d+ are needed"):
        bare.lane.set_step(0, host[:-1], ids)
    with pytest.raises(ValueError, match="no room for 257 runs of 1 tokens"):
        bare.lane.set_replays([(257, 1, 1, 1, 2)], 1, 1)
    with pytest.raises(ValueError, match="no room for 129 runs of 4 tokens"):
        bare.lane.set_replays([(129, 4, 1, 1, 2)], 1, 1)
    with pytest.raises(ValueError, match="a column for each sequence"):
        bare.lane.learn(TENANT, np.array([1], np.uint64), np.array([16]))
    with pytest.raises(ValueError, match="a column for each sequence"):
        bare.lane.learn(TENANT, np.array([1, 2], np.uint64), np.array([1]))
    bare.open_door().send(bare.both(0, (1, LENGTH, 1)))
    bare.look()
    for number in (0, 2):
        with pytest.raises(ValueError, match=f"step {number} of 2, 1 in flight"):
            bare.lane.set_step(number, host, ids)


# --- Faults ---


def check_refused(door: ForeignDoor, *tickets: int) -> None:
    """Checks that just these were answered, all with the fault."""
    door.read()
    assert sorted(door.told) == list(tickets)
    for told in door.told.values():
        assert isinstance(told.answer, BlockdexError)
        assert (told.answer.code, told.answer.reason, told.answer.message) == (Code.INTERNAL, "INTERNAL", "a fault")
        assert told.numbers.queue_seconds == told.numbers.reply_seconds == -1


def abandon(bare: BareLane) -> None:
    """Gives up what is on its way."""
    bare.lane.abandon(int(Code.INTERNAL), len(b"INTERNAL"), b"INTERNALa fault")


def test_a_device_that_takes_no_step_while_another_is_on_its_way(device_lane: BareLane) -> None:
    bare = device_lane
    door, other = bare.open_door(), bare.open_door()
    door.send(bare.both(0, (1, LENGTH, 1)))
    bare.look()
    door.send(bare.both(0, (1, LENGTH + 1, 1)), first_ticket=1)
    other.send(bare.both(0, (2, LENGTH, 1)), bare.both(0, (2, LENGTH + 1, 1)))
    bare.device.error = 700
    with pytest.raises(RuntimeError, match="device: it takes no step, CUDA error 700"):
        bare.look()
    assert bare.lane.in_flight == 2
    abandon(bare)
    check_refused(door, 0, 1)
    check_refused(other, 0)
    assert bare.lane.in_flight == 0
    abandon(bare)  # nothing is left
    check_refused(door, 0, 1)
    bare.device.begun.clear()
    # What had not been taken is served as if nothing had been: the error is forgotten.
    request = bare.both(1, (1, LENGTH, 1))
    door.send(request, first_ticket=2)
    bare.look()
    bare.device.end()
    bare.look()
    door.read()
    check_answer(door, 2, request)


def test_a_step_in_python_that_fails(bare: BareLane) -> None:
    door = bare.open_door()
    door.send(bare.both(0, (1, LENGTH, 1)), bare.both(1, (1, LENGTH, 1)))
    bare.device.error = 3
    with pytest.raises(RuntimeError, match="error 3, made for this test"):
        bare.look()
    assert (bare.lane.in_flight, bare.lane.steps) == (1, 0)
    abandon(bare)
    check_refused(door, 0, 1)
    bare.device.error = 0
    request = bare.both(0, (2, LENGTH, 1))
    door.send(request, first_ticket=2)
    bare.look()
    bare.look()
    door.read()
    check_answer(door, 2, request)


def test_a_step_that_hangs_is_asked_after_and_given_up_with_those_behind_it(device_lane: BareLane) -> None:
    bare = device_lane
    door = bare.open_door()
    door.send(bare.both(0, (1, LENGTH, 1)))
    began = time.monotonic()
    assert bare.lane.run(TIMEOUT) == native.LATE
    assert 0.001 <= time.monotonic() - began < 1
    assert began <= bare.lane.launched <= time.monotonic()
    door.send(bare.both(0, (1, LENGTH + 1, 1)), first_ticket=1)
    launched = bare.lane.launched
    asked = time.monotonic()
    for _ in range(5):
        assert bare.lane.run(TIMEOUT) == native.LATE
    assert time.monotonic() - asked >= 0.004, "it is not asked after all the time"
    assert bare.lane.in_flight == 2
    assert bare.lane.launched == launched, "the oldest one's"
    began = time.monotonic()
    assert bare.lane.drain(0.01) is False
    assert 0.01 <= time.monotonic() - began < 1
    abandon(bare)
    check_refused(door, 0, 1)
    assert bare.lane.drain(TIMEOUT) is True


def test_what_is_on_its_way_is_drained(device_lane: BareLane) -> None:
    bare = device_lane
    door = bare.open_door()
    request = bare.both(0, (1, LENGTH, 1))
    door.send(request)
    bare.look()
    door.send(bare.both(0, (2, LENGTH, 1)), first_ticket=1)
    later = threading.Timer(0.05, bare.device.end)
    later.start()
    assert bare.lane.drain(TIMEOUT) is True
    later.join()
    door.read()
    check_answer(door, 0, request)
    assert (bare.lane.steps, bare.lines[0].filled) == (1, 1), "it begins nothing"


@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="it ends the process instead")
def test_nobody_is_answered_twice_where_no_memory_is_left() -> None:
    """In a process of its own, in which no memory was given back that could be had again."""
    subprocess.run([sys.executable, lane_without_memory.__file__], check=True, timeout=60)


# --- Doors that go, or do not read ---


def test_a_door_that_goes_with_requests_and_answers_on_their_way(device_lane: BareLane) -> None:
    bare = device_lane
    small = Sizes(slots=2, request_bytes=1 << 16, answer_bytes=1 << 16)
    gone, other = bare.open_door(small), bare.open_door()
    gone.send(*[bare.both(layer, (1, LENGTH, 1)) for layer in (0, 1)])
    bare.look()
    bare.device.end()
    gone.send(*[bare.both(layer, (1, LENGTH + 1, 1)) for layer in (0, 1)], first_ticket=2)
    request = bare.both(2, (1, LENGTH, 1))
    other.send(request)
    bare.look()  # two answers fill its ring; two requests are on their way
    gone.send(bare.both(0, (3, LENGTH, 1)), first_ticket=4)
    bare.lane.drop(bare.lines[0])
    bare.device.end()
    bare.look()
    other.read()
    check_answer(other, 0, request)
    assert gone.handles.segment.counters[AT["answers_written"] // 8] == 2, "nothing is written for it"
    assert not bare.lines[0].has_unwritten
    assert bare.lines[0].gone
    assert sum(bare.counted["stages"][0][0]) == 3, "those that were answered"
    with pytest.raises(ValueError, match="is not one of its lines"):
        bare.lane.drop(bare.lines[0])


def test_a_line_that_is_gone_is_not_served_until_it_is_dropped(bare: BareLane) -> None:
    door, other = bare.open_door(), bare.open_door()
    bare.lines[0].gone = True
    door.send(bare.both(0, (1, LENGTH, 1)))
    other.send(bare.both(0, (2, LENGTH, 1)))
    for _ in range(2):
        bare.look()
    assert (door.read(), other.read()) == (0, 1)
    assert (bare.lines[0].filled, bare.lane.steps) == (1, 1)
    bare.lane.run(0.02)
    assert not door.handles.segment.flags[AT["engine_sleeps"] // 4], "it is not told that it should ring"
    bare.lane.notice()
    assert bare.lane.run(TIMEOUT) == native.NOTICED


def test_nothing_is_written_for_who_is_gone(device_lane: BareLane) -> None:
    bare = device_lane
    door = bare.open_door()
    door.send(bare.both(0, (1, LENGTH, 1)))
    bare.look()
    bare.lines[0].gone = True
    bare.device.end()
    bare.look()
    segment = door.handles.segment
    assert not any(segment.memory[segment.answer_slots_offset :][:SLOT_BYTES])


def test_a_short_answer_does_not_overtake_a_long_one_that_waits_for_room(bare: BareLane) -> None:
    door = bare.open_door(Sizes(8, 1 << 16, 256))
    rows = [(1, LENGTH, 3), (2, LENGTH, 1)]
    door.send(*[bare.both(layer, row) for layer in (0, 1) for row in rows])
    bare.look()
    bare.look()
    assert bare.lines[0].has_unwritten, "of 256 bytes 64 are left, of which the third one needs twice as many"
    while len(door.told) < 4:
        bare.look()
        door.read(1)
    assert list(door.told) == [0, 1, 2, 3]


def test_answers_that_wait_for_room_go_with_who_goes(bare: BareLane) -> None:
    door = bare.open_door(Sizes(2, 1 << 16, 1 << 16))
    for ticket in range(3):
        door.send(bare.both(0, (1, LENGTH + ticket, 1)), first_ticket=ticket)
        bare.look()
        bare.look()
    assert bare.lines[0].has_unwritten
    bare.lines[0].gone = True
    bare.look()
    assert not bare.lines[0].has_unwritten


@pytest.mark.parametrize("sizes", [Sizes(2, 1 << 16, 1 << 16), Sizes(64, 1 << 16, 256)], ids=["slots", "arena"])
def test_who_does_not_read_is_served_no_more_and_harms_nobody(bare: BareLane, sizes: Sizes) -> None:
    door, other = bare.open_door(sizes), bare.open_door()
    requests = [bare.both(layer, (sequence, LENGTH, 1)) for sequence in (1, 2, 3, 4) for layer in range(3)]
    sent = 0
    while sent < len(requests) and door.free:
        door.send(requests[sent], first_ticket=sent)
        bare.look()
        bare.look()
        sent += 1
    (line, _) = bare.lines
    assert line.has_unwritten and line.filled > 0, "what there is no room for stays where it is"
    steps, flag = bare.lane.steps, AT["engine_waits_for_room"] // 4
    assert door.handles.segment.flags[flag] == 1
    request = bare.both(0, (9, LENGTH, 1))
    other.send(request)
    bare.look()
    bare.look()
    other.read()
    check_answer(other, 0, request)
    assert bare.lane.steps == steps + 1
    # One answer is read: there is room for another one, and the engine is told so.
    assert door.read(1) == 1
    assert door.handles.segment.flags[flag] == 0
    while len(door.told) < len(requests):
        bare.look()
        door.read(1)
        if sent < len(requests) and door.free:
            door.send(requests[sent], first_ticket=sent)
            sent += 1
    for ticket, asked in enumerate(requests):
        check_answer(door, ticket, asked)
    assert list(door.told) == sorted(door.told), "in their order"
    assert not line.has_unwritten


def test_python_is_asked_nothing_by_who_does_not_read(bare: BareLane) -> None:
    door = bare.open_door(Sizes(2, 1 << 16, 1 << 16))
    (line,) = bare.lines
    for ticket in range(2):
        door.send(bare.both(0, (1, LENGTH + ticket, 1)), first_ticket=ticket)
        bare.look()
        bare.look()
    door.write(door.lay(bare.both(0, (2, LENGTH, 1)), 2), door.lay(usual(bare), 3)._replace(flags=1))
    bare.look()
    bare.look()
    assert line.has_unwritten and line.filled == 1
    assert not line.waits
    assert bare.look() == 0
    assert door.read() == 2
    assert bare.look() == native.FOR_PYTHON
    assert line.waits and not line.has_unwritten


def test_python_is_told_when_there_is_room_for_its_answers(bare: BareLane) -> None:
    door = bare.open_door(Sizes(2, 1 << 16, 1 << 16))
    (line,) = bare.lines
    for _ in range(2):
        assert line.claim(0) is not None
    assert line.claim(0) is None
    line.publish()
    line.wait_for_room()
    assert bare.look() == 0
    door.handles.segment.counters[AT["answers_read"] // 8] = 1
    door._room.ring()
    assert bare.look() == native.ROOM
    assert bare.look() == 0, "once"
    assert line.claim(0) is not None


# --- Whose column it is ---


def test_a_column_that_was_given_to_another_sequence(bare: BareLane) -> None:
    door = bare.open_door()
    bare.generations[0] += 1
    door.send(bare.both(0, (1, LENGTH, 1)))
    assert bare.look() == native.FOR_PYTHON
    bare.lines[0].release()
    bare.lane.learn(TENANT, np.array([500], np.uint64), np.array([0]))
    door.send(bare.both(0, (500, LENGTH, 1)), first_ticket=1)
    assert bare.look() == 0
    bare.lane.learn(TENANT, np.array([1], np.uint64), np.array([3]))
    request = bare.both(0, (1, LENGTH, 1))
    door.send(request, first_ticket=2)
    assert bare.look() == 0
    assert bare.look() == 0
    assert (bare.lengths[0, 0], bare.lengths[0, 3]) == (LENGTH + 1, LENGTH + 1)
    door.read()
    check_answer(door, 2, request)


def test_thousands_of_tenants() -> None:
    """Names that begin alike, with sequences of the same ids; what is too many is forgotten, never mixed up."""
    with bare_lane(sequences=4096) as bare:
        door = bare.open_door()
        tenants = [f"{'t' * (number % 7)}{number}" for number in range(4096)]
        for column, tenant in enumerate(tenants):
            bare.lane.learn(tenant, np.array([1], np.uint64), np.array([column]))
        for ticket, column in enumerate((0, 1, 7, 4095, 2048)):
            door.send(bare.both(0, (1, LENGTH, 1), tenant=tenants[column]), first_ticket=ticket)
            assert bare.look() == 0
            assert bare.lengths[0, column] == LENGTH + 1
        assert bare.lengths.sum() == SPEC.num_layers * 4096 * LENGTH + 5
        door.send(bare.both(0, (1, LENGTH, 1), tenant="t"), first_ticket=9)
        assert bare.look() == native.FOR_PYTHON


def test_a_tenant_whose_name_begins_like_others_is_another_one(bare: BareLane) -> None:
    door = bare.open_door()
    for length in range(2, 220, 2):
        bare.lane.learn("a" * length, np.array([1], np.uint64), np.array([0]))
    for ticket, length in enumerate(range(1, 120, 2)):
        door.send(bare.both(0, (1, LENGTH, 1), tenant="a" * length), first_ticket=ticket)
        assert bare.look() == native.FOR_PYTHON
        bare.lines[0].release()
    door.send(bare.both(0, (1, LENGTH, 1), tenant="a" * 218), first_ticket=1000)
    assert bare.look() == 0


def test_what_is_learnt_again_is_no_more_than_it_was(bare: BareLane) -> None:
    door = bare.open_door()
    for _ in range(500):
        bare.lane.learn(TENANT, np.array([1], np.uint64), np.array([0]))
    door.send(bare.both(0, (2, LENGTH, 1)))
    assert bare.look() == 0


def test_more_sequences_than_there_is_room_for_are_forgotten(bare: BareLane) -> None:
    door = bare.open_door()
    for name in range(1000, 1200):  # one after another in the same column, as they are opened and closed
        bare.generations[0] += 1
        bare.lane.learn(f"tenant {name}", np.array([name], np.uint64), np.array([0]))
    door.send(bare.both(0, (1199, LENGTH, 1), tenant="tenant 1199"))
    assert bare.look() == 0
    door.send(bare.both(0, (2, LENGTH, 1)), first_ticket=1)
    assert bare.look() == native.FOR_PYTHON, "it was forgotten with the rest"
    bare.lines[0].release()
    bare.lane.learn(TENANT, np.array([3], np.uint64), np.array([2]))
    door.send(bare.both(0, (2, LENGTH, 1)), first_ticket=9)
    assert bare.look() == native.FOR_PYTHON, "of its tenant just the other one is known again"
    bare.lines[0].release()
    bare.learn()
    door.send(bare.both(0, (2, LENGTH, 1)), first_ticket=2)
    assert bare.look() == 0


def test_books_that_are_shared_anew_are_nobody_s(bare: BareLane) -> None:
    door = bare.open_door()
    bare.share_books()
    bare.lane.learn(TENANT, np.array([2], np.uint64), np.array([1]))
    door.send(bare.both(0, (1, LENGTH, 1)))
    assert bare.look() == native.FOR_PYTHON


# --- Statistics ---


def test_what_is_counted(device_lane: BareLane) -> None:
    bare = device_lane
    door = bare.open_door()
    door.send(bare.both(0, (1, LENGTH, 1)), bare.both(0, (2, LENGTH, 2), (3, LENGTH, 1)), bare.both(1, (1, LENGTH, 4)))
    bare.look()
    time.sleep(0.01)
    door.send(bare.both(2, (1, LENGTH, 1)), first_ticket=3)
    bare.look()
    time.sleep(0.03)
    bare.device.end()
    bare.look()
    time.sleep(0.02)
    bare.device.end()
    bare.look()
    counted = bare.counted
    assert (counted["steps"], counted["num_tokens"]) == (2, 9)
    assert counted["requests"] == ([1, 0, 1, 0], 4.0)
    assert counted["tokens"] == ([1, 0, 1, 0], 9.0)
    assert 0.04 + 0.05 <= counted["device_seconds"] < 1
    assert 0.06 <= counted["device_busy_seconds"] < counted["device_seconds"] - 0.025, "for 0.03 s both were there"
    door.read()
    told = np.array([door.told[ticket].numbers[-4:] for ticket in range(4)])
    assert (told[:, 2] >= [0.04, 0.04, 0.04, 0.05]).all() and (told > 0).all()
    for (counts, total), seconds in zip(counted["stages"], told.T, strict=True):
        assert total == pytest.approx(seconds.sum())
        assert counts == np.bincount(np.searchsorted(SECONDS_BOUNDS, seconds), minlength=3).tolist()


def test_a_bound_belongs_to_the_bucket_below_it(bare: BareLane) -> None:
    door = bare.open_door()
    for ticket, count in enumerate((1, 2, 3)):
        door.send(bare.both(0, *[(sequence, LENGTH, 1) for sequence in range(1, count + 1)]), first_ticket=ticket)
        bare.lengths[:] = LENGTH
        bare.look()
    assert bare.counted["tokens"] == ([1, 1, 1, 0], 6.0)


def test_a_step_that_is_given_up_was_on_the_device(device_lane: BareLane) -> None:
    bare = device_lane
    door = bare.open_door()
    door.send(bare.both(0, (1, LENGTH, 1)))
    bare.look()
    time.sleep(0.02)
    abandon(bare)
    assert 0.02 <= bare.counted["device_busy_seconds"] < 1
    abandon(bare)
    time.sleep(0.02)
    abandon(bare)
    assert bare.counted["device_busy_seconds"] < 0.04


def test_a_request_from_the_future_has_waited_for_no_time(bare: BareLane) -> None:
    door = bare.open_door()
    door.write(door.lay(bare.both(0, (1, LENGTH, 1)), 0)._replace(received=2**62))
    bare.look()
    bare.look()
    door.read()
    assert door.told[0].numbers.queue_seconds == 0
    assert bare.counted["stages"][0][1] == 0


# --- Sleeping ---


def test_it_sleeps_until_the_time_is_up(bare: BareLane) -> None:
    bare.open_door()
    began, busy = time.monotonic(), time.thread_time()
    assert bare.lane.run(0.3) == 0
    assert 0.3 <= time.monotonic() - began < 1
    assert time.thread_time() - busy < 0.05
    assert bare.doors[0].handles.segment.flags[AT["engine_sleeps"] // 4] == 0, "it is awake again"


def test_it_spins_for_as_long_as_it_is_told_to() -> None:
    with bare_lane(spin_seconds=0.1) as bare:
        bare.open_door()
        bare.lane.touch()
        busy = time.thread_time()
        bare.lane.run(0.4)
        assert 0.01 < time.thread_time() - busy < 0.2


def test_it_spins_after_an_answer() -> None:
    with bare_lane(spin_seconds=TIMEOUT, replays=ALL) as bare:
        bare.open_door().send(bare.both(0, (1, LENGTH, 1)))
        bare.look()
        bare.device.end()
        busy = time.thread_time()
        bare.lane.run(0.2)
        assert time.thread_time() - busy > 0.01


@pytest.mark.parametrize("what", ["request", "notice"])
def test_a_sleeper_is_woken(bare: BareLane, what: str) -> None:
    door, quiet = bare.open_door(), bare.open_door()
    flags = door.handles.segment.flags
    sleeping = AT["engine_sleeps"] // 4

    def wake() -> None:
        while not flags[sleeping]:
            time.sleep(0)
        time.sleep(0.01)
        if what == "notice":
            bare.lane.notice()
        else:
            door.write(door.lay(bare.both(0, (1, LENGTH, 1)), 0)._replace(flags=1))

    waker = threading.Thread(target=wake)
    waker.start()
    began = time.monotonic()
    assert bare.lane.run(TIMEOUT) == (native.NOTICED if what == "notice" else native.FOR_PYTHON)
    assert time.monotonic() - began < 1
    waker.join()
    if bare.lines[0].waits:
        bare.lines[0].release()
    busy = time.thread_time()
    assert bare.lane.run(0.2) == 0
    assert time.thread_time() - busy < 0.05, "it sleeps again"
    assert not quiet.read()


def test_a_request_that_is_written_while_it_lies_down_is_seen() -> None:
    """No bell rings for it, since its line does not sleep yet when it comes; the last look before was too early.

    Lines lie down one after another. The first one is in the lane many times over, which takes long enough for the last
    one's request to be written in between.
    """
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < MANY_LINES + 2:  # poll takes as many
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(MANY_LINES + 2, most), most))
    with bare_lane(spin_seconds=0.0005) as bare:  # this thread is awake by then
        first, last = bare.open_door(), bare.open_door()
        bare.lane.drop(bare.lines[1])
        bare.lines[1].gone = False
        for _ in range(min(MANY_LINES, most) - 2):
            bare.lane.add(bare.lines[0])
        bare.lane.add(bare.lines[1])
        sleeping = AT["engine_sleeps"] // 4
        flags = [door.handles.segment.flags for door in (first, last)]
        counters = last.handles.segment.counters
        turns: queue.SimpleQueue[bool] = queue.SimpleQueue()
        barrier = threading.Lock()

        def serve() -> None:
            while turns.get():
                bare.lane.touch()
                bare.lane.run(TIMEOUT)
                bare.lines[1].release()

        serving = threading.Thread(target=serve)
        serving.start()
        slot = last.lay(bare.both(0, (1, LENGTH, 1)), 0)._replace(flags=1)
        hits = number = 0
        end = time.monotonic() + 5  # where both cores are busy, few are in time
        try:
            while hits < 5 and time.monotonic() < end:
                number += 1
                last.put(slot)
                turns.put(True)
                while not flags[0][sleeping]:
                    pass
                counters[AT["requests_written"] // 8] = number
                with barrier:
                    hits += not flags[1][sleeping]
                last.bell.ring()
                deadline = time.monotonic() + 2
                while counters[AT["requests_read"] // 8] != number:
                    assert time.monotonic() < deadline, f"request {number} is slept through"
                    time.sleep(0)
        finally:
            turns.put(False)
            bare.lane.notice()
            serving.join()
