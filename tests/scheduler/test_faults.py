"""Bounds: overload, faults of the kernels, callers that are gone, idleness, stopping; a refusal changes nothing."""

from __future__ import annotations

import asyncio
import dataclasses
import time

import numpy as np
import pytest
import torch

from benchmarks.ring_messages import Request
from blockdex.contract.errors import BlockdexError, Code, Reason
from blockdex.ring.events import NewEpoch
from blockdex.scheduler.loop import Engine
from support.cache_state import check_integrity, snapshot
from support.running_engine import (
    LIMITS,
    Phase,
    Running,
    block_ids,
    close,
    fork,
    get,
    keys_of,
    open_sequence,
    queries_of,
    refusal,
    running,
    tokens,
    truncate,
)

A, B = 1, 2


async def test_a_full_queue_refuses_and_goes_on(random: np.random.Generator) -> None:
    limits = dataclasses.replace(LIMITS, max_queued_requests=3)
    async with running(limits=limits) as run:
        await run.ask(open_sequence(A))
        wait = tokens(0, [(A, 0, 1)], queries=queries_of(random, 1), wait=True)
        waiting = [run.submit(wait) for _ in range(3)]
        refused = await run.refusal(get(A))
        assert (refused.code, refused.reason) == (Code.RESOURCE_EXHAUSTED, Reason.OVERLOADED)
        assert refused.message == "queue: at most 3 requests may wait, 3 do"
        waiting.pop().cancel()
        await run.settled()
        await run.ask(tokens(0, [(A, 0, 1)], keys=keys_of(random, 1)))
        await asyncio.wait_for(asyncio.gather(*waiting), 20)


async def test_prefills_count_as_queued(random: np.random.Generator) -> None:
    """Else clients could pile up long selections, queries and all, without bound."""
    limits = dataclasses.replace(LIMITS, max_queued_requests=4)
    prefill = tokens(0, [(A, 0, 2500)], queries=queries_of(random, 2500))
    async with running(limits=limits) as run:
        await run.ask(open_sequence(A))
        await run.ask(tokens(0, [(A, 0, 2500)], keys=keys_of(random, 2500)))
        taken = [run.submit(prefill) for _ in range(4)]
        assert (await run.refusal(prefill)).reason == Reason.OVERLOADED
        for prefilling in taken:
            prefilling.cancel()


async def test_callers_that_are_gone_cost_nothing(random: np.random.Generator) -> None:
    async with running(start=False) as run:
        opened = run.submit(open_sequence(A))
        cancelled = run.submit(tokens(0, [(A, 0, 5)], keys=keys_of(random, 5)))
        late = run.submit(tokens(0, [(A, 0, 7)], keys=keys_of(random, 7)), timeout=0.0)
        cancelled.cancel()
        await asyncio.sleep(0)  # lets the channel hear of it
        run.channel.start()
        await asyncio.wait_for(opened, 20)
        assert (await refusal(late)).reason == Reason.DEADLINE_EXCEEDED
        stats = run.engine.stats()
        assert stats.dropped == {"cancelled": 1, "deadline": 1}
        assert stats.batch_requests.total == 1
        assert run.backend.calls == []


@pytest.mark.parametrize("phase", ["append", "decode", "prefill"])
async def test_a_fault_begins_a_new_epoch(random: np.random.Generator, phase: Phase) -> None:
    async with running() as run:
        epoch = run.engine.info().epoch
        await run.ask(open_sequence(A))
        await run.ask(open_sequence(B))
        await run.ask(tokens(0, [(A, 0, 100)], keys=keys_of(random, 100)))
        with run.backend.held("prefill") as entered:
            concerned = [run.submit(tokens(0, [(A, 0, 100)], queries=queries_of(random, 100)))]
            await run.reached(entered)
            run.backend.fault = phase  # the one held up goes on
            concerned += [
                run.submit(tokens(0, [(A, 0, 3)], keys=keys_of(random, 3), rollback=True)),  # held back
                run.submit(tokens(0, [(B, 0, 9)], queries=queries_of(random, 9), wait=True)),  # waits
                run.submit(tokens(1, [(A, 0, 9)], keys=keys_of(random, 9), queries=queries_of(random, 9))),
            ]
            if phase != "prefill":  # a decode is answered before the next slice
                both = tokens(1, [(B, 0, 3)], keys=keys_of(random, 3), queries=queries_of(random, 3))
                concerned.append(run.submit(both))
        errors = [await refusal(future) for future in concerned]
        for error in errors:
            assert (error.code, error.reason) == (Code.INTERNAL, Reason.INTERNAL)
            assert error.message == "engine: a batch failed; every sequence is gone, a new epoch begins"

        info = run.engine.info()
        assert info.epoch != epoch
        await run.settled()
        assert run.channel.events == [NewEpoch(info.epoch)]
        assert (info.cache.pages_used, info.cache.sequences) == (0, 0)
        assert (await run.refusal(get(A))).reason == Reason.UNKNOWN_SEQUENCE
        stale = await run.refusal(get(A, epoch=epoch))
        assert stale.message == f"epoch: request names {epoch}, the cache's is {info.epoch}"
        assert (stale.code, stale.reason) == (Code.FAILED_PRECONDITION, Reason.EPOCH_MISMATCH)
        await run.ask(open_sequence(A, epoch=info.epoch))
        both = tokens(0, [(A, 0, 9)], keys=keys_of(random, 9), queries=queries_of(random, 9), epoch=info.epoch)
        assert (await run.select(both)).max() == 1


async def test_what_fails_at_once_again_and_again_rests_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(engine: Engine) -> float:
        raise RuntimeError("a fault of the loop, made for this test")

    async with running() as run:
        with monkeypatch.context() as patched:
            patched.setattr(Engine, "_patience", fails)
            run.engine._core.notice()
            await asyncio.sleep(0.6)
        faults = run.engine.stats().faults
        assert 3 <= faults <= 8, "after 0, 0.04, 0.08, 0.16 and 0.32 s"
        await asyncio.sleep(0.7)
        epoch = run.engine.info().epoch
        await run.ask(open_sequence(A))
        assert (run.engine.info().epoch, run.engine.stats().faults) == (epoch, faults)


async def test_an_idle_engine_sleeps(random: np.random.Generator) -> None:
    async with running() as run:
        await run.ask(open_sequence(A))
        waiting = run.submit(tokens(0, [(A, 0, 1)], queries=queries_of(random, 1), wait=True))
        await run.settled()
        thread = run.engine._thread
        assert thread is not None
        assert thread.ident is not None
        clock = time.pthread_getcpuclockid(thread.ident)
        before = time.clock_gettime(clock)
        await asyncio.sleep(1.0)
        assert time.clock_gettime(clock) - before < 0.01
        assert not waiting.done()


async def test_stops_with_work_in_hand(random: np.random.Generator) -> None:
    async with running() as run:
        await run.ask(open_sequence(A))
        await run.ask(tokens(0, [(A, 0, 1000)], keys=keys_of(random, 1000)))
        pending = [
            run.submit(tokens(0, [(A, 0, 1000)], queries=queries_of(random, 1000))),
            run.submit(tokens(1, [(A, 0, 1)], queries=queries_of(random, 1), wait=True)),
        ]
        await run.settled()
        began = time.monotonic()
        await asyncio.to_thread(run.channel.stop)
        assert time.monotonic() - began < 5
        assert not pending[1].done()


async def test_keys_that_cannot_come_are_not_waited_for(random: np.random.Generator) -> None:
    async with running() as run:
        await run.ask(open_sequence(A))
        with run.backend.held("append") as entered:
            appended = run.submit(tokens(0, [(A, 0, 100)], keys=keys_of(random, 100)))
            await run.reached(entered)
            # All three wait: the keys of one are queued, those of another will be refused.
            prefill = run.submit(tokens(0, [(A, 0, 100)], queries=queries_of(random, 100)))
            hopeful = run.submit(tokens(1, [(A, 3, 1)], queries=queries_of(random, 1), wait=True))
            hopeless = run.submit(tokens(2, [(A, 0, 1)], queries=queries_of(random, 1), wait=True))
            coming = run.submit(tokens(1, [(A, 0, 5)], keys=keys_of(random, 5)))
            run.engine.expect_no_more()
        await asyncio.wait_for(asyncio.gather(appended, prefill, hopeful, coming), 20)
        left = await refusal(hopeless)
        assert (left.code, left.reason) == (Code.UNAVAILABLE, Reason.SHUTTING_DOWN)
        assert left.message == "server: shutting down, the keys it waits for cannot come"


def refused(random: np.random.Generator, run: Running) -> list[tuple[Request, Reason]]:
    """Requests that a cache with A (layer 0: 20 tokens at revision 5; layer 1: 8) and an empty B refuses."""
    wrong = run.engine.info().epoch ^ 1
    keys, queries = keys_of(random, 8), queries_of(random, 8)
    full = keys_of(random, 200)
    return [
        (open_sequence(A), Reason.SEQUENCE_EXISTS),
        (open_sequence(7, epoch=wrong), Reason.EPOCH_MISMATCH),
        (get(7), Reason.UNKNOWN_SEQUENCE),
        (get(A, epoch=wrong), Reason.EPOCH_MISMATCH),
        (get(A, tenant="other"), Reason.UNKNOWN_SEQUENCE),
        (fork(7, 8, 3), Reason.UNKNOWN_SEQUENCE),
        (fork(A, B, 3), Reason.SEQUENCE_EXISTS),
        (fork(A, A, 3), Reason.SEQUENCE_EXISTS),
        (fork(A, 8, 3, tenant="other"), Reason.UNKNOWN_SEQUENCE),
        (fork(A, 8, 3, epoch=wrong), Reason.EPOCH_MISMATCH),
        (truncate(7, 3), Reason.UNKNOWN_SEQUENCE),
        (truncate(A, 3, tenant="other"), Reason.UNKNOWN_SEQUENCE),
        (truncate(A, 3, epoch=wrong), Reason.EPOCH_MISMATCH),
        (close(A, epoch=wrong), Reason.EPOCH_MISMATCH),
        (tokens(0, [(B, 0, 4), (A, 21, 4)], keys=keys), Reason.APPEND_BEYOND_LENGTH),
        (tokens(0, [(B, 0, 4), (7, 0, 4)], keys=keys), Reason.UNKNOWN_SEQUENCE),
        (tokens(0, [(B, 0, 4, 9), (A, 20, 4, 4)], keys=keys), Reason.STALE_REVISION),
        (tokens(0, [(B, 0, 4), (A, 20, 4)], keys=keys, epoch=wrong), Reason.EPOCH_MISMATCH),
        (tokens(0, [(A, 20, 8)], keys=keys, tenant="other"), Reason.UNKNOWN_SEQUENCE),
        (tokens(0, [(B, 0, 200)], keys=full), Reason.OUT_OF_PAGES),
        (tokens(0, [(B, 0, 4), (A, 20, 196)], keys=full), Reason.OUT_OF_PAGES),
        (tokens(0, [(B, 0, 4), (A, 17, 4)], queries=queries), Reason.KEYS_NOT_APPENDED),
        (tokens(0, [(A, 0, 8, 4)], queries=queries), Reason.STALE_REVISION),
        (tokens(0, [(A, 0, 8, 6)], queries=queries), Reason.FUTURE_REVISION),
        (tokens(0, [(A, 20, 8, 4)], keys=keys, queries=queries), Reason.STALE_REVISION),
        (tokens(0, [(A, 22, 8, 9)], keys=keys, queries=queries), Reason.APPEND_BEYOND_LENGTH),
        # At the revision of the append that made the layer, but another one.
        (tokens(0, [(B, 0, 4, 9), (A, 19, 4, 5)], keys=keys, queries=queries), Reason.STALE_REVISION),
        (tokens(0, [(B, 0, 4), (A, 19, 4)], keys=keys, queries=queries, rollback=False), Reason.APPEND_OVERLAPS),
        (tokens(0, [(B, 0, 4), (A, 16, 4)], keys=keys, rollback=False), Reason.APPEND_OVERLAPS),
    ]


async def test_a_refused_request_changes_nothing(random: np.random.Generator) -> None:
    async with running(num_pages=20) as run:
        await run.ask(open_sequence(A))
        await run.ask(open_sequence(B))
        await run.ask(tokens(0, [(A, 0, 20, 5)], keys=keys_of(random, 20)))
        await run.ask(tokens(1, [(A, 0, 8)], keys=keys_of(random, 8)))
        probe = tokens(0, [(A, 16, 4)], queries=queries_of(random, 4))
        expected = await run.select(probe)
        for request, reason in refused(random, run):
            before, pages, calls = (
                snapshot(run.engine._cache),
                run.backend.pages.view(torch.int16).clone(),
                len(run.backend.calls),
            )
            error: BlockdexError = await run.refusal(request)
            assert error.reason == reason, request
            assert snapshot(run.engine._cache) == before, request
            assert run.backend.pages.view(torch.int16).equal(pages), request
            assert len(run.backend.calls) == calls, request
        np.testing.assert_array_equal(await run.select(probe), expected)
        check_integrity(run.engine._cache)


async def test_a_repeated_append_renews_the_lease(random: np.random.Generator) -> None:
    """What a batch reads stays, though a later request of the same batch looks for sequences to evict."""
    both = tokens(0, [(A, 0, 20, 1)], keys=keys_of(random, 20), queries=queries_of(random, 20))
    async with running(num_pages=5, lease_seconds=0.5) as run:
        await run.ask(open_sequence(A))
        await run.ask(open_sequence(B))
        expected = await run.select(both)
        await run.ask(tokens(0, [(B, 0, 16)], keys=keys_of(random, 16)))
        with run.backend.held("append") as entered:
            busy = run.submit(tokens(0, [(B, 15, 1)], keys=keys_of(random, 1), rollback=True))
            await run.reached(entered)
            repeated = run.submit(both)
            refused = run.submit(tokens(0, [(B, 16, 1)], keys=keys_of(random, 1)))
            await asyncio.sleep(0.6)
        await asyncio.wait_for(busy, 20)
        np.testing.assert_array_equal(block_ids(await asyncio.wait_for(repeated, 20)), expected)
        assert (await refusal(refused)).reason == Reason.OUT_OF_PAGES


async def test_a_batch_does_not_evict_what_it_works_on(random: np.random.Generator) -> None:
    """However short the lease, which is over before the next request of the same batch is looked at."""
    names, pages = range(10, 40), 16
    async with running(num_pages=pages, lease_seconds=1e-6) as run:
        epoch = run.engine.info().epoch
        for name in (A, *names):
            await run.ask(open_sequence(name, lease=600 if name == A else 0))
        with run.backend.held("append") as entered:
            busy = run.submit(tokens(0, [(A, 0, 1)], keys=keys_of(random, 1)))
            await run.reached(entered)
            both = [tokens(0, [(name, 0, 2)], keys=keys_of(random, 2), queries=queries_of(random, 2)) for name in names]
            together = [run.submit(request) for request in both]
        await asyncio.wait_for(busy, 20)
        answers = await asyncio.wait_for(asyncio.gather(*together, return_exceptions=True), 20)
        reasons = [answer.reason for answer in answers if isinstance(answer, BlockdexError)]
        assert reasons == [Reason.OUT_OF_PAGES] * (len(names) - pages + 1)
        assert run.engine.info().epoch == epoch


async def test_a_batch_does_not_evict_what_a_later_request_of_it_gets_pages_for(random: np.random.Generator) -> None:
    """Its entry was found before, and the pages would go to whoever has it then, or to nobody."""
    async with running(num_pages=5, lease_seconds=1e-6) as run:
        await run.ask(open_sequence(A))
        await run.ask(open_sequence(B, lease=600))
        await run.ask(tokens(0, [(A, 0, 32)], keys=keys_of(random, 32)))
        with run.backend.held("append") as entered:
            busy = run.submit(tokens(0, [(B, 0, 1)], keys=keys_of(random, 1)))
            await run.reached(entered)
            greedy = run.submit(tokens(0, [(B, 1, 16)], keys=keys_of(random, 16)))
            more = run.submit(tokens(0, [(A, 32, 1)], keys=keys_of(random, 1)))
        await asyncio.wait_for(busy, 20)
        assert (await refusal(greedy)).reason == Reason.OUT_OF_PAGES
        assert (await refusal(more)).reason == Reason.OUT_OF_PAGES
        check_integrity(run.engine._cache)


async def test_a_batch_does_not_evict_what_a_prefill_reads(random: np.random.Generator) -> None:
    async with running(num_pages=16, lease_seconds=1e-6) as run:
        epoch = run.engine.info().epoch
        await run.ask(open_sequence(A))
        await run.ask(open_sequence(B, lease=600))
        await run.ask(tokens(0, [(A, 0, 100)], keys=keys_of(random, 100)))
        with run.backend.held("prefill") as entered:
            reading = run.submit(tokens(0, [(A, 0, 100)], queries=queries_of(random, 100)))
            await run.reached(entered)
            greedy = [run.submit(tokens(layer, [(B, 0, 64)], keys=keys_of(random, 64))) for layer in (0, 1)]
        for refused in greedy:
            assert (await refusal(refused)).reason == Reason.OUT_OF_PAGES
        await asyncio.wait_for(reading, 20)
        assert run.engine.info().epoch == epoch
