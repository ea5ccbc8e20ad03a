"""The core's steps on a device: what they hold and when they are answered."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from benchmarks.ring_messages import TokenAnswer
from blockdex import _native as native
from blockdex_kernels.interface import RUN_APPENDS, RUN_SELECTS, RUN_WANTS_SCORES
from support.bare_core import (
    ALL,
    FIRST_ROW,
    LENGTH,
    LONGEST,
    SPEC,
    BareCore,
    Seen,
    bare_core,
    check_answer,
    usual,
)
from support.running_engine import tokens, values


def columns(seen: Seen, runs: int) -> list[tuple[int, ...]]:
    """The rows of a step, and a check that there are no others."""
    assert not seen.columns[2, runs:].any(), "padding has no tokens"
    assert (seen.columns[4, :runs] == RUN_APPENDS | RUN_SELECTS).all()
    return [tuple(column) for column in seen.columns[:4, :runs].T.tolist()]


def test_a_step_holds_all_that_came(device_core: BareCore) -> None:
    bare = device_core
    first, second = bare.open_client(), bare.open_client()
    requests = [usual(bare), bare.both(2, (3, LENGTH, LONGEST)), bare.both(2, (1, LENGTH - 1, 2))]
    first.send(*requests[:2])
    second.send(requests[2])
    assert bare.look() == 0
    (seen,) = bare.device.begun
    assert columns(seen, 4) == [
        (1, LENGTH, 1, FIRST_ROW),
        (1, LENGTH - 2, 3, FIRST_ROW + 1),
        (2, LENGTH, LONGEST, FIRST_ROW + 2),
        (2, LENGTH - 1, 2, FIRST_ROW),
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
    for frontend, ticket, request in ((first, 0, requests[0]), (first, 1, requests[1]), (second, 0, requests[2])):
        check_answer(frontend, ticket, request)


def test_the_smallest_program_that_holds_it() -> None:
    shapes = [(1, 1, 3), (2, 1, 3), (2, LONGEST, 3), (4, 2, 4)]
    with bare_core(replays=shapes) as bare:
        frontend = bare.open_client()
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
            frontend.send(request, first_ticket=number)
            assert bare.look() == 0
            assert bare.device.begun[0].columns.shape[1] == runs
            assert len(bare.device.begun[0].keys) == runs * length
            bare.device.end()
            bare.look()
            frontend.read()
            check_answer(frontend, number, request)


@pytest.mark.parametrize(
    "rows",
    [
        [(1, LENGTH, 1), (2, LENGTH, 1), (3, LENGTH, 1)],  # more runs
        [(1, LENGTH, 2)],  # longer
        [(1, LENGTH + 4, 1)],  # wider
    ],
)
def test_what_no_program_holds_is_left(rows: list[tuple[int, ...]]) -> None:
    with bare_core(replays=[(2, 1, 3)]) as bare:
        bare.lengths[:] = 24
        bare.open_client().send(bare.both(0, *rows))
        assert bare.look() == native.FOR_PYTHON
        assert [kind for _, kind, *_ in bare.take()] == ["large"]
        assert not bare.device.begun


def test_what_no_program_holds_together_is_in_two_steps() -> None:
    with bare_core(replays=[(2, 1, 3), (1, LONGEST, 3)]) as bare:
        frontend = bare.open_client()
        requests = [bare.both(0, (1, LENGTH, 1)), bare.both(0, (2, LENGTH, 2)), bare.both(0, (3, LENGTH, 1))]
        frontend.send(*requests)
        assert bare.look() == 0
        assert bare.look() == 0
        assert [columns(seen, 1) for seen in bare.device.begun] == [
            [(0, LENGTH, 1, FIRST_ROW)],
            [(0, LENGTH, 2, FIRST_ROW + 1)],
        ]
        bare.device.end()
        assert bare.look() == 0
        bare.device.end()
        bare.device.end()
        bare.look()
        frontend.read()
        for ticket, request in enumerate(requests):
            check_answer(frontend, ticket, request)


def test_what_is_long_and_what_is_wide_is_not_put_together_where_no_program_is_both() -> None:
    with bare_core(replays=[(1, 1, 4), (2, 1, 3), (1, LONGEST, 3)]) as bare:
        bare.lengths[:] = 24
        frontend = bare.open_client()
        frontend.send(
            bare.both(0, (1, 24, 1)), bare.both(0, (2, 23, 1)), bare.both(0, (3, 20, 4)), bare.both(0, (4, 23, 1))
        )
        widths = []
        for _ in range(4):
            bare.look()
            widths.append(bare.device.end().columns[1].tolist())
        assert widths == [[24], [23], [20], [23]]


def test_the_last_token_of_a_step() -> None:
    with bare_core(sequences=200) as bare:
        frontend = bare.open_client()
        rows = [(sequence, LENGTH, LONGEST) for sequence in range(1, 128)]
        frontend.send(bare.both(0, *rows), bare.both(0, (150, LENGTH, 4)), bare.both(0, (151, LENGTH, 1)))
        bare.look()
        assert (bare.core.steps, bare.counted["decode_tokens"]) == (1, native.MAX_TOKENS)
        bare.look()
        assert (bare.core.steps, bare.counted["decode_tokens"]) == (2, native.MAX_TOKENS + 1)


@pytest.mark.parametrize("replays", [None, ALL])
def test_as_many_runs_and_tokens_as_a_step_holds(replays: list[tuple[int, int, int]] | None) -> None:
    """The 256th run, or the 512th token, is still in; the next one is in the next step."""
    with bare_core(sequences=600, replays=replays) as bare:
        frontend = bare.open_client()
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
        frontend.send(*requests)
        runs, tokens = [], []
        for _ in range(8):
            bare.look()
            if bare.device.begun:
                seen = bare.device.end()
                runs.append(int((seen.columns[2] > 0).sum()))
                tokens.append(int(seen.columns[2].sum()))
        frontend.read()
        for ticket, request in enumerate(requests):
            check_answer(frontend, ticket, request)
        assert bare.core.steps == 3
        if replays:
            assert (runs, tokens) == ([256, 256, 2], [256, 511, 3]) or (runs, tokens) == ([256, 257, 1], [256, 512, 1])


def test_a_request_of_more_runs_than_a_step_is_left() -> None:
    with bare_core(sequences=300) as bare:
        bare.open_client().send(bare.both(0, *[(sequence, LENGTH, 1) for sequence in range(1, native.MAX_RUNS + 2)]))
        assert bare.look() == native.FOR_PYTHON


def test_a_request_of_more_tokens_than_a_step_is_left() -> None:
    with bare_core(sequences=300) as bare:
        rows = [(sequence, LENGTH, LONGEST) for sequence in range(1, native.MAX_TOKENS // LONGEST + 1)]
        frontend = bare.open_client()
        frontend.send(bare.both(0, *rows), bare.both(1, *rows, (250, LENGTH, 1)))
        assert bare.look() == native.FOR_PYTHON
        assert [kind for _, kind, *_ in bare.take()] == ["large"]
        assert (bare.core.steps, bare.counted["decode_tokens"]) == (1, native.MAX_TOKENS)


def test_one_layer_of_a_sequence_is_once_in_a_step(device_core: BareCore) -> None:
    """What goes on with it is in the next one, and so is what names any of its sequences; others are not held up."""
    bare = device_core
    frontends = [bare.open_client() for _ in range(3)]
    frontends[0].send(bare.both(0, (1, LENGTH, 1)))
    frontends[1].send(bare.both(0, (2, LENGTH, 1), (1, LENGTH + 1, 1)), bare.both(0, (3, LENGTH, 1)))
    frontends[2].send(bare.both(1, (1, LENGTH, 1)), bare.both(0, (2, LENGTH, 1)), bare.both(1, (4, LENGTH, 1)))
    bare.look()
    bare.look()
    first, second = bare.device.begun
    assert columns(first, 3) == [
        (0, LENGTH, 1, FIRST_ROW),
        (0, LENGTH, 1, FIRST_ROW + 2),
        (1, LENGTH, 1, FIRST_ROW + 3),
    ]
    assert columns(second, 3) == [
        (0, LENGTH, 1, FIRST_ROW + 1),
        (0, LENGTH + 1, 1, FIRST_ROW),
        (1, LENGTH, 1, FIRST_ROW),
    ]
    bare.device.end()
    bare.look()
    assert columns(bare.device.begun[1], 1) == [(0, LENGTH, 1, FIRST_ROW + 1)], "anew, what another has written since"


def test_the_lines_take_turns() -> None:
    """One of them always has a step's worth of requests; nobody waits for longer than two steps."""
    with bare_core(sequences=600) as bare:
        greedy, modest = bare.open_client(), bare.open_client()
        whole = [[(sequence, LENGTH, 1) for sequence in range(first, first + 256)] for first in (1, 257)]
        greedy.send(*[bare.both(0, *whole[number % 2]) for number in range(6)])
        for ticket in range(3):
            modest.send(bare.both(0, (590 + ticket, LENGTH, 1)), first_ticket=ticket)
            for _ in range(4):
                bare.look()
            assert modest.read() == 1, ticket
        greedy.read()
        assert len(greedy.told) >= 3


def test_answers_come_when_every_block_id_is_there(device_core: BareCore) -> None:
    bare = device_core
    frontend = bare.open_client()
    request = bare.both(0, (1, LENGTH, 1), (2, LENGTH, 1))
    frontend.send(request)
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
        assert not frontend.read(), missing
    ids[:] = ended
    bare.look()
    frontend.read()
    check_answer(frontend, 0, request)


def test_two_steps_are_on_their_way_and_no_third(device_core: BareCore) -> None:
    bare = device_core
    frontend = bare.open_client()
    requests = [bare.both(0, (1, LENGTH + number, 1)) for number in range(5)]
    for ticket, request in enumerate(requests[:3]):
        frontend.send(request, first_ticket=ticket)
        bare.look()
    assert [seen.room for seen in bare.device.begun] == [0, 1]
    assert (bare.core.in_flight, bare.core.steps) == (2, 2)
    bare.device.end()
    bare.look()  # answers the first, begins the third in its room
    assert [seen.room for seen in bare.device.begun] == [1, 0]
    assert frontend.read() == 1
    for ticket, request in enumerate(requests[3:], start=3):
        frontend.send(request, first_ticket=ticket)
    while len(frontend.told) < 5:
        bare.device.end()
        bare.look()
        frontend.read()
    for ticket, request in enumerate(requests):
        check_answer(frontend, ticket, request)
    assert (bare.core.in_flight, bare.core.launched) == (0, 0.0)


def test_what_cannot_be_set_is_refused(device_core: BareCore) -> None:
    bare = device_core
    host, ids, scores = bare.device.rooms[0]
    with pytest.raises(ValueError, match=r"host has \d+ bytes, \d+ are needed"):
        bare.core.set_step(0, host[:-1], ids, scores)
    with pytest.raises(ValueError, match="no room for 257 runs of 1 tokens"):
        bare.core.set_replays([(257, 1, 1, 1, 2)], 1, 1)
    with pytest.raises(ValueError, match="no room for 129 runs of 4 tokens"):
        bare.core.set_replays([(129, 4, 1, 1, 2)], 1, 1)
    with pytest.raises(ValueError, match=r"lengths has \d+ bytes, \d+ are needed"):
        bare.core.set_sequence_columns(*bare.cache.sequence_columns._replace(lengths=bare.lengths[:, :-1].copy()))
    bare.core.set_sequence_columns(*bare.cache.sequence_columns)
    bare.open_client().send(bare.both(0, (1, LENGTH, 1)))
    bare.look()
    for number in (0, 2):
        with pytest.raises(ValueError, match=f"step {number} of 2, 1 in flight"):
            bare.core.set_step(number, host, ids, scores)


def test_shares_of_heads_lie_side_by_side(device_core: BareCore) -> None:
    """Queries of a head that nobody asks for are 0; who asks for the same head again gets rows of its own."""
    bare = device_core
    frontend, random = bare.open_client(), np.random.default_rng(3)
    queries = values(random, 3, SPEC.num_index_heads, SPEC.head_dim)
    rows = [(1, LENGTH - 2, 2), (2, LENGTH - 1, 1)]
    frontend.send(
        tokens(0, rows, queries=queries[:, 1:], first_head=1),
        tokens(0, rows, queries=queries[:, :1]),
        tokens(0, rows, queries=queries[:, 1:], first_head=1, dtype="fp32"),
    )
    bare.look()
    (seen,) = bare.device.begun
    assert (
        seen.columns[:, :4].T.tolist()
        == [
            [0, LENGTH - 2, 2, FIRST_ROW, RUN_SELECTS],
            [0, LENGTH - 1, 1, FIRST_ROW + 1, RUN_SELECTS],
        ]
        * 2
    )
    staged = seen.queries[:6].view(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(staged[:3], queries)
    np.testing.assert_array_equal(staged[3:, 1:], queries[:, 1:])
    assert not staged[3:, :1].any()
    bare.device.end()
    bare.look()
    frontend.read()
    ids = seen.queries[:3, :, : SPEC.topk].astype(np.int32)
    for ticket, heads in enumerate((slice(1, 2), slice(0, 1), slice(1, 2))):
        answer = frontend.told[ticket].answer
        assert isinstance(answer, TokenAnswer)
        np.testing.assert_array_equal(answer.block_ids, ids[:, heads])


def test_an_append_alone_is_answered_at_once_and_scores_only_when_they_are_there(device_core: BareCore) -> None:
    bare = device_core
    frontend, random = bare.open_client(), np.random.default_rng(4)
    scored = tokens(0, [(2, 9, 2)], queries=values(random, 2, SPEC.num_index_heads, SPEC.head_dim), scores=True)
    frontend.send(tokens(0, [(1, LENGTH, 1)], keys=values(random, 1, SPEC.head_dim)), scored)
    bare.look()
    assert frontend.read() == 1
    assert frontend.told[0].answer == TokenAnswer(bare.cache.epoch)
    (seen,) = bare.device.begun
    assert seen.columns[4, :2].tolist() == [RUN_APPENDS, RUN_SELECTS | RUN_WANTS_SCORES]
    bare.device.end()
    _, _, scores = bare.device.rooms[0]
    last = 3 * SPEC.num_index_heads * SPEC.topk - 1
    there, scores.view(np.uint32)[last] = scores[last], 2**32 - 1
    bare.look()
    assert not frontend.read()
    scores[last] = there
    bare.look()
    assert frontend.read() == 1
