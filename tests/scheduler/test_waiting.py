"""Selections that wait for their keys, until these come or the caller goes; ranks that share a read."""

from __future__ import annotations

import asyncio
import re
from collections import Counter

import numpy as np
import pytest

from benchmarks.ring_messages import Request
from blockdex.contract.errors import Code, Reason
from support.naive_engine import NaiveEngine, check_same
from support.running_engine import (
    SPEC,
    block_ids,
    close,
    get,
    keys_of,
    open_sequence,
    queries_of,
    refusal,
    running,
    tokens,
    truncate,
    values,
)

A, B = 1, 2


@pytest.mark.parametrize("together", [True, False], ids=["queued together", "one after another"])
@pytest.mark.parametrize("revision", [0, 5])
async def test_waits_for_its_keys(random: np.random.Generator, together: bool, revision: int) -> None:
    append = tokens(1, [(A, 0, 20, revision)], keys=keys_of(random, 20))
    queries = queries_of(random, 2)
    select = tokens(1, [(A, 17, 2, revision)], queries=queries, wait=True)
    async with running(start=not together) as run:
        naive = NaiveEngine(SPEC, run.engine.info().epoch)
        opened, waiting = run.submit(open_sequence(A)), run.submit(select)
        if not together:
            await run.settled()
            assert not waiting.done()
            assert run.engine.stats().waiting == 1
        appended = run.submit(append)
        if together:
            run.channel.start()
        for request, future in ((open_sequence(A), opened), (append, appended), (select, waiting)):
            expected = naive.answer(request)
            assert expected is not None
            check_same(await asyncio.wait_for(future, 20), expected, str(request))
        assert run.engine.stats().waiting == 0


async def test_waits_for_every_sequence_that_it_names(random: np.random.Generator) -> None:
    queries = queries_of(random, 4)
    async with running() as run:
        naive = NaiveEngine(SPEC, run.engine.info().epoch)
        setup: list[Request] = [
            open_sequence(A),
            open_sequence(B),
            tokens(0, [(A, 0, 9)], keys=keys_of(random, 9)),
        ]
        select = tokens(0, [(A, 7, 2), (B, 2, 2)], queries=queries, wait=True)
        last = tokens(0, [(B, 0, 4)], keys=keys_of(random, 4))
        waiting = run.submit(select)
        assert (await run.refusal(select)).reason == Reason.UNKNOWN_SEQUENCE, "what is not open is not waited for"
        assert waiting.done()
        for request in setup:
            await run.ask(request)
            naive.answer(request)
        waiting = run.submit(select)
        await run.settled()
        assert not waiting.done()
        await run.ask(last)
        naive.answer(last)
        expected = naive.answer(select)
        assert expected is not None
        check_same(await asyncio.wait_for(waiting, 20), expected, "both are there")


async def test_sees_the_keys_it_waited_for_and_not_what_came_behind_them(random: np.random.Generator) -> None:
    queries = queries_of(random, 1)
    requests: list[Request] = [
        open_sequence(A),
        tokens(0, [(A, 0, 30, 1)], keys=keys_of(random, 30)),
        tokens(0, [(A, 0, 30, 2)], keys=keys_of(random, 30)),
        truncate(A, 3),
        close(A),
    ]
    select = tokens(0, [(A, 29, 1, 1)], queries=queries, wait=True)
    async with running(start=False) as run:
        naive = NaiveEngine(SPEC, run.engine.info().epoch)
        first = run.submit(requests[0])
        waiting = run.submit(select)
        futures = [first, *map(run.submit, requests[1:])]
        run.channel.start()
        await asyncio.wait_for(asyncio.gather(*futures), 20)
        for request in requests[:2]:
            naive.answer(request)
        expected = naive.answer(select)
        assert expected is not None
        check_same(await asyncio.wait_for(waiting, 20), expected, "revision 1")


async def test_a_revision_that_has_passed_is_not_waited_for(random: np.random.Generator) -> None:
    queries = queries_of(random, 1)
    async with running() as run:
        await run.ask(open_sequence(A))
        waiting = run.submit(tokens(0, [(A, 0, 1, 4)], queries=queries, wait=True))
        await run.ask(tokens(0, [(A, 0, 1, 6)], keys=keys_of(random, 1)))
        error = await refusal(waiting)
        assert error.reason == Reason.STALE_REVISION
        assert error.message == "sequence 1, layer 0: selection has revision 4, the layer is at 6"


async def test_a_revision_that_is_there_without_the_keys_is_not_waited_for(random: np.random.Generator) -> None:
    queries = queries_of(random, 2)
    async with running() as run:
        await run.ask(open_sequence(A))
        await run.ask(tokens(0, [(A, 0, 3, 6)], keys=keys_of(random, 3)))
        error = await run.refusal(tokens(0, [(A, 2, 2, 6)], queries=queries, wait=True), timeout=5)
        assert (error.code, error.reason) == (Code.FAILED_PRECONDITION, Reason.KEYS_NOT_APPENDED)


async def test_the_deadline_ends_the_waiting(random: np.random.Generator) -> None:
    select = tokens(0, [(A, 0, 1)], queries=queries_of(random, 1), wait=True)
    async with running() as run:
        await run.ask(open_sequence(A))
        longer = run.submit(select)
        error = await run.refusal(select, timeout=0.05)
        assert (error.code, error.reason) == (Code.DEADLINE_EXCEEDED, Reason.DEADLINE_EXCEEDED)
        assert re.fullmatch(r"timeout: 0\.050 s were allowed, \d+\.\d{3} s have passed", error.message)
        assert not longer.done()
        stats = run.engine.stats()
        assert (stats.dropped["deadline"], stats.waiting) == (1, 1)
        assert run.backend.calls == []


async def test_a_deadline_beyond_all_reason_does_no_harm(random: np.random.Generator) -> None:
    select = tokens(0, [(A, 0, 1)], queries=queries_of(random, 1), wait=True)
    async with running() as run:
        await run.ask(open_sequence(A))
        waiting = run.submit(select, timeout=2**62 / 1e9)
        await run.settled()
        await run.ask(tokens(0, [(A, 0, 1)], keys=keys_of(random, 1)))
        assert block_ids(await asyncio.wait_for(waiting, 20)).shape == (1, SPEC.num_index_heads, SPEC.topk)


async def test_a_caller_that_goes_is_forgotten(random: np.random.Generator) -> None:
    select = tokens(0, [(A, 0, 1)], queries=queries_of(random, 1), wait=True)
    async with running() as run:
        await run.ask(open_sequence(A))
        waiting = run.submit(select)
        await run.settled()
        waiting.cancel()
        await run.settled()
        stats = run.engine.stats()
        assert (stats.dropped["cancelled"], stats.waiting) == (1, 0)
        await run.ask(tokens(0, [(A, 0, 1)], keys=keys_of(random, 1)))
        assert run.backend.tokens("decode") == 0


async def test_closing_ends_the_waiting(random: np.random.Generator) -> None:
    select = tokens(0, [(A, 0, 1)], queries=queries_of(random, 1), wait=True)
    async with running() as run:
        await run.ask(open_sequence(A))
        waiting = run.submit(select)
        await run.settled()
        await run.ask(close(A))
        error = await refusal(waiting)
        assert (error.code, error.reason) == (Code.NOT_FOUND, Reason.UNKNOWN_SEQUENCE)


Ranges = list[tuple[int, int]]


@pytest.mark.parametrize("length", [3, 40], ids=["decode", "prefill"])
@pytest.mark.parametrize("ranges", [[(0, 1), (1, 1), (2, 1), (3, 1)], [(2, 2), (0, 1), (1, 1)]], ids=["four", "uneven"])
async def test_ranks_wait_for_one_append_and_share_one_read(
    random: np.random.Generator, ranges: Ranges, length: int
) -> None:
    """One rank appends with its own heads' queries; those of the others wait for its revision."""
    old, new = keys_of(random, 50), keys_of(random, 2 * length)
    queries = queries_of(random, 2 * length)
    rows = [(A, 50, length, 9), (B, 0, length, 9)]
    async with running() as run:
        naive = NaiveEngine(SPEC, run.engine.info().epoch)
        for request in (open_sequence(A), open_sequence(B), tokens(2, [(A, 0, 50)], keys=old)):
            await run.ask(request)
            naive.answer(request)
        shares = [slice(first, first + heads) for first, heads in ranges]
        others = [
            run.submit(tokens(2, rows, queries=queries[:, heads], first_head=heads.start, wait=True))
            for heads in shares[1:]
        ]
        await run.settled()
        before = len(run.backend.calls)
        whole = naive.answer(tokens(2, rows, keys=new, queries=queries))
        assert whole is not None
        first = tokens(2, rows, keys=new, queries=queries[:, shares[0]], first_head=shares[0].start)
        answers = [await run.ask(first), *await asyncio.wait_for(asyncio.gather(*others), 20)]
        for heads, answer in zip(shares, answers, strict=True):
            np.testing.assert_array_equal(block_ids(answer), block_ids(whole)[:, heads])
        reads = [call for call in run.backend.calls[before:] if call.phase != "append"]
        assert {call.heads for call in reads} == {SPEC.num_index_heads}, "every read serves the heads of all ranks"
        assert sum(call.tokens for call in reads) == 2 * length, "every token is read for once"


async def test_a_shared_read_holds_each_head_once(random: np.random.Generator) -> None:
    """Who asks for the same heads of the same tokens gets another read: no kernel is made ready for more heads."""
    heads = SPEC.num_index_heads
    queries = values(random, 20, heads, SPEC.head_dim)
    asked = [slice(0, heads), slice(0, 2), slice(0, heads), slice(2, heads), slice(1, 2)]
    requests: list[Request] = [
        open_sequence(A),
        tokens(0, [(A, 0, 20)], keys=keys_of(random, 20)),
        *(tokens(0, [(A, 0, 20)], queries=queries[:, own], first_head=own.start) for own in asked),
        *(tokens(0, [(A, 9, 1)], queries=queries[:1, own], first_head=own.start) for own in asked),
    ]
    async with running(start=False) as run:
        naive = NaiveEngine(SPEC, run.engine.info().epoch)
        futures = [run.submit(request) for request in requests]
        run.channel.start()
        for request, answer in zip(requests, await asyncio.wait_for(asyncio.gather(*futures), 20), strict=True):
            expected = naive.answer(request)
            assert expected is not None
            check_same(answer, expected, str(request))
        tokens_read = Counter[tuple[str, int]]()
        for call in run.backend.calls:
            tokens_read[call.phase, call.heads] += call.tokens
        del tokens_read["append", 0]
        assert tokens_read == {("decode", 4): 4, ("prefill", 4): 60, ("prefill", 1): 20}


async def test_only_the_same_spans_share_a_read(random: np.random.Generator) -> None:
    queries = values(random, 2, 1, SPEC.head_dim)
    requests: list[Request] = [
        open_sequence(A),
        open_sequence(A, tenant="other"),
        *(tokens(layer, [(A, 0, 9)], keys=keys_of(random, 9)) for layer in (0, 1)),
        tokens(0, [(A, 0, 9)], keys=keys_of(random, 9), tenant="other"),
        tokens(0, [(A, 4, 2)], queries=queries, first_head=0),
        tokens(0, [(A, 5, 2)], queries=queries, first_head=1),
        tokens(1, [(A, 4, 2)], queries=queries, first_head=1),
        tokens(0, [(A, 4, 2)], queries=queries, first_head=1, tenant="other"),
        tokens(0, [(A, 4, 2)], queries=queries, first_head=2, order="score"),
        get(A),
    ]
    async with running(start=False) as run:
        naive = NaiveEngine(SPEC, run.engine.info().epoch)
        futures = [run.submit(request) for request in requests]
        run.channel.start()
        for request, answer in zip(requests, await asyncio.wait_for(asyncio.gather(*futures), 20), strict=True):
            expected = naive.answer(request)
            assert expected is not None
            check_same(answer, expected, str(request))
        reads = [call for call in run.backend.calls if call.phase == "decode"]
        assert sum(call.tokens for call in reads) == 4 * 2, "order is no reason for another read"
