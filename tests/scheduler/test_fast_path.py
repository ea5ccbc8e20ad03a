"""Decodes that the core serves, whoever asked for them, are answered as one after another."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import threading
import time
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from blockdex._native import MAX_RUNS
from blockdex.contract.errors import BlockdexError, Reason
from blockdex.contract.messages import Request, TokenRequest
from blockdex.executor import interface as executor
from blockdex.ring.handshake import take
from support.foreign_frontend import ForeignFrontend
from support.naive_engine import answer_together
from support.ring_engine import hosted, running_over_rings
from support.running_engine import LIMITS, SPEC, Call, close, fork, open_sequence, refusal, tokens, values

A, B, C = 1, 2, 3
LENGTH = 4 * SPEC.block_size - 2


@pytest.fixture
def random() -> np.random.Generator:
    """Numbers that are the same in every run."""
    return np.random.default_rng(21)


def keys_of(random: np.random.Generator, length: int) -> NDArray[np.float32]:
    return values(random, length, SPEC.head_dim)


def both(random: np.random.Generator, layer: int, *rows: tuple[int, ...], **options: Any) -> TokenRequest:
    """Appends to rows and selects for them."""
    length = sum(row[2] for row in rows)
    queries = values(random, length, SPEC.num_index_heads, SPEC.head_dim)
    return tokens(layer, rows, keys=keys_of(random, length), queries=queries, **options)


def filled(random: np.random.Generator, *sequences: int, tenant: str = "tenant") -> list[Request]:
    """Opens sequences and fills all layers of each."""
    requests: list[Request] = [open_sequence(sequence, tenant=tenant) for sequence in sequences]
    return requests + [
        tokens(layer, [(sequence, 0, LENGTH)], keys=keys_of(random, LENGTH), tenant=tenant)
        for layer in range(SPEC.num_layers)
        for sequence in sequences
    ]


async def test_all_tenants_layers_and_lengths_at_once(random: np.random.Generator) -> None:
    """Some go on, some write their end anew; one with a revision, which the next token's is compared with."""
    setup = filled(random, A, B, tenant="red") + filled(random, A, C, tenant="blue")
    requests: list[Request] = [
        both(random, 0, (A, LENGTH, 1), (B, LENGTH - 2, 3), tenant="red"),
        both(random, 1, (B, LENGTH - 2, 4), tenant="red"),
        both(random, 0, (C, LENGTH - 1, 1, 7), (A, LENGTH, 2), tenant="blue"),
    ]
    later: list[Request] = [
        both(random, 0, (C, LENGTH, 1, 7), tenant="blue"),
        both(random, 0, (C, LENGTH, 1, 8), tenant="blue"),
    ]
    async with running_over_rings() as run:
        await answer_together(run, [*requests, *later], setup=setup)
        assert run.short_way_requests == 3  # a revision that is there already is for a batch, and what follows it too
        assert Call("append", 11, 0, [0, 0, 1, 0, 0]) in run.backend.calls


@pytest.mark.parametrize(
    "row",
    [
        (B, LENGTH, 4),  # into a page that is not there
        (B, LENGTH + 1, 1),  # behind a gap
        (B, LENGTH - SPEC.block_size, 1),  # ends a page earlier
        (B, LENGTH, 1, 3),  # with a revision that is there already
        (77, 0, 1),
    ],
)
async def test_those_that_do_not_fit_are_left(random: np.random.Generator, row: tuple[int, ...]) -> None:
    setup: list[Request] = [
        *filled(random, A, B, C),
        tokens(0, [(B, LENGTH - 1, 1, 3)], keys=keys_of(random, 1)),
    ]
    requests: list[Request] = [both(random, 0, (A, LENGTH, 1)), both(random, 0, row), both(random, 0, (C, LENGTH, 1))]
    async with running_over_rings() as run:
        await answer_together(run, requests, setup=setup)
        assert run.short_way_requests == 2


async def test_the_same_layer_twice_in_order(random: np.random.Generator) -> None:
    requests: list[Request] = [both(random, 0, (A, LENGTH, 1)), both(random, 0, (A, LENGTH + 1, 1))]
    async with running_over_rings() as run:
        await answer_together(run, requests, setup=filled(random, A))
        assert run.short_way_requests == 2
        assert [call.tokens for call in run.backend.calls if call.phase == "decode"] == [1, 1]


async def test_a_shared_page_is_copied_first(random: np.random.Generator) -> None:
    setup: list[Request] = [*filled(random, A), fork(A, B, LENGTH - 1)]
    shared = 3 * SPEC.block_size - 2  # the page before the last one is A's too
    requests: list[Request] = [
        both(random, 1, (B, LENGTH - 1, 1)),
        both(random, 0, (B, shared, 4)),
        both(random, 1, (A, LENGTH, 1)),
    ]
    async with running_over_rings() as run:
        await answer_together(run, requests, setup=setup)
        # A request that leaves the core takes those for its sequences with it, until it is done.
        assert run.short_way_requests in {0, 1, 2}


async def test_what_differs_in_kind_is_not_mixed(random: np.random.Generator) -> None:
    setup = filled(random, A, B, C)
    requests: list[Request] = [
        both(random, 0, (A, LENGTH, 1)),
        both(random, 0, (B, LENGTH, 1), order="score", scores=True),
        both(random, 0, (C, LENGTH, 1), dtype="fp32"),
        both(random, 1, (A, LENGTH, 1), epoch=5),
        both(random, 1, (B, LENGTH, 5)),  # a prefill
    ]
    async with running_over_rings() as run:
        await answer_together(run, requests, setup=setup)
        assert run.short_way_requests == 1


async def test_others_overtake_what_has_to_wait(random: np.random.Generator) -> None:
    """A fork waits for a prefill of its parent: decodes of the two stay behind it, all others do not."""
    long = values(random, LENGTH, SPEC.num_index_heads, SPEC.head_dim)
    requests: list[Request] = [
        tokens(0, [(A, 0, LENGTH)], queries=long),
        fork(A, C, LENGTH),
        both(random, 1, (A, LENGTH, 1)),
        both(random, 1, (C, LENGTH, 1)),
        both(random, 1, (B, LENGTH, 1)),
    ]
    async with running_over_rings() as run:
        await answer_together(run, requests, setup=filled(random, A, B))
        assert Call("decode", 1, SPEC.num_index_heads, [1]) in run.backend.calls[:2]
        assert run.short_way_requests >= 1


async def test_the_heads_of_several_ranks_share_a_read(random: np.random.Generator) -> None:
    """One rank appends, and all select: one read of the keys for all."""
    rows = [(A, LENGTH, 1, 5)]
    queries = values(random, 1, SPEC.num_index_heads, SPEC.head_dim)
    requests: list[Request] = [
        tokens(0, rows, keys=keys_of(random, 1), queries=queries[:, :2]),
        tokens(0, rows, queries=queries[:, 2:], first_head=2),
    ]
    async with running_over_rings() as run:
        await answer_together(run, requests, setup=filled(random, A))
        assert not run.short_way_requests
        assert [call.heads for call in run.backend.calls if call.phase == "decode"] == [SPEC.num_index_heads]


async def test_a_selection_that_waits_sees_what_is_taken(random: np.random.Generator) -> None:
    async with running_over_rings() as run:
        for request in filled(random, A, B):
            await run.ask(request)
        queries = values(random, 1, SPEC.num_index_heads, SPEC.head_dim)
        waiting = run.submit(tokens(0, [(A, LENGTH, 1, 5)], queries=queries, wait=True))
        await run.settled()
        await run.ask(both(random, 0, (B, LENGTH, 1)))
        assert not waiting.done()
        await run.ask(both(random, 0, (A, LENGTH, 1, 5)))
        await asyncio.wait_for(waiting, 5)
        assert run.short_way_requests == 1  # not the one that was waited for


async def test_a_group_has_no_more_spans_than_graphs_hold(random: np.random.Generator) -> None:
    names = range(1, 2 * 8 + 1)
    setup = filled(random, *names)
    rows = [[(sequence, LENGTH, 1) for sequence in names[:8]], [(sequence, LENGTH, 1) for sequence in names[8:]]]
    requests: list[Request] = [both(random, layer, *part) for layer in range(SPEC.num_layers) for part in rows]
    async with running_over_rings() as run:
        await answer_together(run, requests, setup=setup)
        assert run.short_way_requests == len(requests)
        assert all(call.tokens <= MAX_RUNS for call in run.backend.calls)


async def test_a_sequence_that_is_closed_and_opened_again(random: np.random.Generator) -> None:
    """Its column may be another one's by then: the core goes by what was told of it since."""
    again: list[Request] = [close(A), close(B), open_sequence(B), open_sequence(A)]
    short = [tokens(0, [(name, 0, length)], keys=keys_of(random, length)) for name, length in ((A, 9), (B, 17))]
    late = [both(random, 0, (A, 9, 1)), both(random, 0, (B, 17, 2)), both(random, 0, (A, 10, 2))]
    gone: list[Request] = [both(random, 0, (A, LENGTH, 1)), both(random, 1, (B, LENGTH, 1))]
    async with running_over_rings() as run:
        await answer_together(run, [*gone, *again, *gone, *short, *late], setup=filled(random, A, B))
        taken = run.short_way_requests
        await run.ask(both(random, 0, (A, 12, 1)))
        await run.ask(both(random, 0, (B, 19, 1)))
        assert run.short_way_requests == taken + 2


async def test_columns_that_grow_in_the_batch_that_fills_them(random: np.random.Generator) -> None:
    """Twice as many columns, for sequences that are opened and appended to at once."""
    names = range(1, 2 * 64 + 2)
    async with running_over_rings() as run:
        epoch = run.engine.info().epoch
        with run.backend.held("append") as entered:
            await run.ask(open_sequence(1000))
            run.submit(tokens(2, [(1000, 0, 1)], keys=keys_of(random, 1)))
            await run.reached(entered)
            setup = [
                run.submit(request)
                for name in names
                for request in (open_sequence(name), both(random, 0, (name, 0, 4)))
            ]
        answers = await asyncio.gather(*setup, return_exceptions=True)
        assert not [answer for answer in answers if isinstance(answer, Exception)]
        assert run.engine.info().epoch == epoch
        await asyncio.gather(*(run.submit(both(random, 0, (name, 4, 2))) for name in names))
        assert run.short_way_requests == len(names)


async def test_a_step_that_fails_takes_all_with_it_and_nobody_is_left_waiting(random: np.random.Generator) -> None:
    """Those in it, those that came meanwhile, and those that a batch has; each is answered once, and all goes on."""
    async with running_over_rings() as run:
        for request in filled(random, A, B, C):
            await run.ask(request)
        epoch = run.engine.info().epoch
        with run.backend.held("append") as entered:
            held = [run.submit(both(random, 0, (A, LENGTH, 1)))]
            await run.reached(entered)
            run.backend.fault = "decode"
            held += [run.submit(both(random, layer, (B, LENGTH, 1))) for layer in range(SPEC.num_layers)]
            held.append(run.submit(both(random, 0, (C, LENGTH, 1), dtype="fp32")))
        errors = [await refusal(future) for future in held]
        # The later ones may have come to the next cache, which does not know their sequences.
        assert errors[0].message == "engine: a batch failed; every sequence is gone, a new epoch begins"
        assert {error.reason for error in errors} <= {Reason.INTERNAL, Reason.UNKNOWN_SEQUENCE}
        assert run.engine.info().epoch != epoch
        taken = run.short_way_requests
        for request in filled(random, A):
            await run.ask(request)
        await run.ask(both(random, 0, (A, LENGTH, 1)))
        assert run.short_way_requests == taken + 1


@pytest.mark.parametrize("grows", [False, True], ids=["", "while page tables grow"])
async def test_a_step_that_hangs_is_given_up(
    random: np.random.Generator, monkeypatch: pytest.MonkeyPatch, grows: bool
) -> None:
    """A device that takes steps and does not end them; one with captured steps wants none of them on its way then."""
    told = threading.Event()
    async with running_over_rings() as run:
        run.engine._on_lost_device = told.set
        for request in filled(random, A, B):
            await run.ask(request)
        monkeypatch.setattr(executor, "ANSWER_SECONDS", 0.3)
        short_way = run.engine._short_way
        assert short_way is not None
        short_way._core.set_run_step(lambda room, runs, tokens: None)
        if grows:
            monkeypatch.setattr(type(run.engine._executor), "table_capacity", 0)
        began = time.monotonic()
        hanging = [run.submit(both(random, 0, (A, LENGTH, 1))), run.submit(both(random, 0, (A, LENGTH + 1, 1)))]
        behind = run.submit(both(random, 1, (B, LENGTH, 1), dtype="fp32"))
        for future in hanging:
            assert (await refusal(future)).reason == Reason.INTERNAL
        await asyncio.wait([behind], timeout=10)
        assert behind.done()
        assert time.monotonic() - began < 5
        assert await asyncio.to_thread(told.wait, 10)
        assert run.engine.device_is_lost


async def test_what_is_beyond_a_limit_is_refused_in_words(random: np.random.Generator) -> None:
    """By a frontend that checks nothing: the last page of a sequence reaches further than it may."""
    spec = dataclasses.replace(SPEC, max_sequence_tokens=LENGTH - SPEC.block_size // 2)
    limits = dataclasses.replace(LIMITS, max_spans=2)
    end = spec.max_sequence_tokens
    requests: list[tuple[Request, str]] = [
        (both(random, 0, (A, end - 1, 2)), f"start + length must be at most {end}, got {end - 1} + 2"),
        (both(random, 0, (A, end - 1, 1), (B, end - 1, 1), (C, end - 1, 1)), "spans: must be 1 to 2, got 3"),
    ]
    async with hosted(spec, limits=limits) as run:
        for sequence in (A, B, C):
            await run.ask(open_sequence(sequence))
            await run.ask(tokens(0, [(sequence, 0, end - 1)], keys=keys_of(random, end - 1)))
        with socket.socket(socket.AF_UNIX) as connected:
            connected.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connected, run.address)
            door = ForeignFrontend(await take(connected), connected)
            for ticket, (request, words) in enumerate(requests):
                door.send(request, first_ticket=ticket)
                await asyncio.to_thread(door.await_answers, ticket + 1)
                answer = door.told[ticket].answer
                assert isinstance(answer, BlockdexError)
                assert words in answer.message
            door.close()
