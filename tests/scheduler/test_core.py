"""The core alone: what it takes, what it leaves to Python, and whose columns it knows."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from blockdex import _native as native
from blockdex.ring.layout import AT, RequestSlot
from blockdex.ring.segment import Sizes
from support.bare_core import (
    EPOCH,
    HELD,
    LENGTH,
    LONGEST,
    SIZES,
    SPEC,
    BareLane,
    bare_core,
    check_answer,
    usual,
)
from support.running_engine import TENANT, tokens, values

SIZE = SPEC.block_size


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


def long_sequence(length: int) -> Callable[[BareLane], None]:
    """Gives the first sequence so many tokens in layer 1, and a page more than the others: its last may not be full."""

    def changed(bare: BareLane) -> None:
        bare.lengths[1, 0], bare.held[0] = length, HELD + 1

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
    "a token more than a sequence has": Case(
        rows=((1, SPEC.max_sequence_tokens - 1, 2), NEXT), books=long_sequence(SPEC.max_sequence_tokens - 1)
    ),
    "a start before the end, without a word": Case({"flags": 0}, rows=((1, LENGTH - 1, 1), NEXT)),
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
    doors = [bare.open_client() for _ in range(3)]
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
    "up to the last token of a sequence": Case(
        rows=((1, SPEC.max_sequence_tokens - 2, 2), NEXT), books=long_sequence(SPEC.max_sequence_tokens - 2)
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
    door = bare.open_client()
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
    door = bare.open_client()
    whole = bare.both(0, (1, LENGTH, 1))
    queries = values(np.random.default_rng(1), 1, 1, SPEC.head_dim)
    door.write(door.lay(dataclasses.replace(whole, queries=tokens(0, [(1, LENGTH, 1)], queries=queries).queries), 0))
    assert bare.look() == native.FOR_PYTHON


def test_tensors_that_are_twice_as_long_as_the_spans_are_left(bare: BareLane) -> None:
    """They agree with each other."""
    door = bare.open_client()
    long = bare.both(0, (1, LENGTH, 2))
    door.send(dataclasses.replace(long, spans=bare.both(0, (1, LENGTH, 1)).spans))
    assert bare.look() == native.FOR_PYTHON


@pytest.mark.parametrize("begin", [8, SIZES.request_bytes - 64])
def test_a_payload_where_none_can_be_is_left(bare: BareLane, begin: int) -> None:
    """Not at a multiple of 64, or with its end in the answers' arena, which lies behind that of the requests."""
    door = bare.open_client()
    slot = door.lay(bare.both(0, (1, LENGTH, 1)), 0)
    segment = door.handles.segment
    assert segment.answer_arena_offset == segment.request_arena_offset + segment.request_arena_bytes
    payload = bytes(door.arena[: slot.payload_bytes])
    at = segment.request_arena_offset + begin
    segment.memory[at : at + len(payload)] = payload
    door.write(slot._replace(payload_offset=begin))
    assert bare.look() == native.FOR_PYTHON


def test_what_is_beyond_a_limit_is_left() -> None:
    """A span too many, and a byte too many of keys and queries together."""
    token_bytes = 2 * SPEC.head_dim * (1 + SPEC.num_index_heads)
    for max_spans, max_message_bytes, why in (
        (2, 4 * token_bytes, 0),
        (1, 4 * token_bytes, native.FOR_PYTHON),
        (2, 4 * token_bytes - 1, native.FOR_PYTHON),
    ):
        with bare_core(max_spans=max_spans, max_message_bytes=max_message_bytes) as bare:
            bare.open_client().send(usual(bare))
            assert bare.look() == why


def test_an_answer_for_which_there_is_never_room_is_left() -> None:
    with bare_core() as bare:
        ids = 4 * 2 * SPEC.num_index_heads * SPEC.topk
        exact, small = (
            bare.open_client(Sizes(slots=4, request_bytes=1 << 16, answer_bytes=2 * size)) for size in (ids, ids - 32)
        )
        for number, door in enumerate((exact, small)):
            door.send(bare.both(0, (1 + number, LENGTH, 2)))
        assert bare.look() == native.FOR_PYTHON
        assert [line.waits for line in bare.lines] == [False, True]


def test_the_head_of_a_line_is_for_python_until_it_is_taken(bare: BareLane) -> None:
    door = bare.open_client()
    request = usual(bare)
    door.write(door.lay(request, 0)._replace(flags=1), door.lay(request, 1))
    for _ in range(3):
        assert bare.look() == native.FOR_PYTHON
    (line,) = bare.lines
    assert bare.core.steps == 0
    line.release()
    assert not line.waits
    assert bare.look() == 0
    assert (bare.core.steps, line.filled) == (1, 0)


def test_a_number_that_cannot_be_is_for_python(bare: BareLane) -> None:
    door = bare.open_client()
    door.handles.segment.counters[AT["requests_written"] // 8] = 65
    assert bare.look() == native.FOR_PYTHON
    assert (bare.lines[0].filled, bare.lines[0].waits) == (-1, True)


def test_who_goes_leaves_nothing_for_python(bare: BareLane) -> None:
    door = bare.open_client()
    door.write(door.lay(usual(bare), 0)._replace(flags=1))
    assert bare.look() == native.FOR_PYTHON
    bare.lines[0].gone = True
    assert bare.look() == 0


def test_a_whole_ring_is_no_such_number(bare: BareLane) -> None:
    door = bare.open_client(Sizes(slots=4, request_bytes=1 << 16, answer_bytes=1 << 16))
    door.send(*[bare.both(0, (sequence, LENGTH, 1)) for sequence in (1, 2, 3, 4)])
    assert (bare.lines[0].filled, bare.look(), bare.lines[0].filled) == (4, 0, 0)


# --- Whose column it is ---


def test_a_column_that_was_given_to_another_sequence(bare: BareLane) -> None:
    door = bare.open_client()
    bare.generations[0] += 1
    door.send(bare.both(0, (1, LENGTH, 1)))
    assert bare.look() == native.FOR_PYTHON
    bare.lines[0].release()
    bare.core.learn(TENANT, np.array([500], np.uint64), np.array([0]))
    door.send(bare.both(0, (500, LENGTH, 1)), first_ticket=1)
    assert bare.look() == 0
    bare.core.learn(TENANT, np.array([1], np.uint64), np.array([3]))
    request = bare.both(0, (1, LENGTH, 1))
    door.send(request, first_ticket=2)
    assert bare.look() == 0
    assert bare.look() == 0
    assert (bare.lengths[0, 0], bare.lengths[0, 3]) == (LENGTH + 1, LENGTH + 1)
    door.read()
    check_answer(door, 2, request)


def test_thousands_of_tenants() -> None:
    """Names that begin alike, with sequences of the same ids; what is too many is forgotten, never mixed up."""
    with bare_core(sequences=4096) as bare:
        door = bare.open_client()
        tenants = [f"{'t' * (number % 7)}{number}" for number in range(4096)]
        for column, tenant in enumerate(tenants):
            bare.core.learn(tenant, np.array([1], np.uint64), np.array([column]))
        for ticket, column in enumerate((0, 1, 7, 4095, 2048)):
            door.send(bare.both(0, (1, LENGTH, 1), tenant=tenants[column]), first_ticket=ticket)
            assert bare.look() == 0
            assert bare.lengths[0, column] == LENGTH + 1
        assert bare.lengths.sum() == SPEC.num_layers * 4096 * LENGTH + 5
        door.send(bare.both(0, (1, LENGTH, 1), tenant="t"), first_ticket=9)
        assert bare.look() == native.FOR_PYTHON


def test_a_tenant_whose_name_begins_like_others_is_another_one(bare: BareLane) -> None:
    door = bare.open_client()
    for length in range(2, 220, 2):
        bare.core.learn("a" * length, np.array([1], np.uint64), np.array([0]))
    for ticket, length in enumerate(range(1, 120, 2)):
        door.send(bare.both(0, (1, LENGTH, 1), tenant="a" * length), first_ticket=ticket)
        assert bare.look() == native.FOR_PYTHON
        bare.lines[0].release()
    door.send(bare.both(0, (1, LENGTH, 1), tenant="a" * 218), first_ticket=1000)
    assert bare.look() == 0


def test_what_is_learnt_again_is_no_more_than_it_was(bare: BareLane) -> None:
    door = bare.open_client()
    for _ in range(500):
        bare.core.learn(TENANT, np.array([1], np.uint64), np.array([0]))
    door.send(bare.both(0, (2, LENGTH, 1)))
    assert bare.look() == 0


def test_more_sequences_than_there_is_room_for_are_forgotten(bare: BareLane) -> None:
    door = bare.open_client()
    for name in range(1000, 1200):  # one after another in the same column, as they are opened and closed
        bare.generations[0] += 1
        bare.core.learn(f"tenant {name}", np.array([name], np.uint64), np.array([0]))
    door.send(bare.both(0, (1199, LENGTH, 1), tenant="tenant 1199"))
    assert bare.look() == 0
    door.send(bare.both(0, (2, LENGTH, 1)), first_ticket=1)
    assert bare.look() == native.FOR_PYTHON, "it was forgotten with the rest"
    bare.lines[0].release()
    bare.core.learn(TENANT, np.array([3], np.uint64), np.array([2]))
    door.send(bare.both(0, (2, LENGTH, 1)), first_ticket=9)
    assert bare.look() == native.FOR_PYTHON, "of its tenant just the other one is known again"
    bare.lines[0].release()
    bare.learn()
    door.send(bare.both(0, (2, LENGTH, 1)), first_ticket=2)
    assert bare.look() == 0


def test_books_that_are_shared_anew_are_nobody_s(bare: BareLane) -> None:
    door = bare.open_client()
    bare.share_books()
    bare.core.learn(TENANT, np.array([2], np.uint64), np.array([1]))
    door.send(bare.both(0, (1, LENGTH, 1)))
    assert bare.look() == native.FOR_PYTHON
