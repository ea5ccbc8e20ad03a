"""Long selections run in slices: others get in between, and what nobody waits for any more is dropped."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from benchmarks.ring_messages import Answer, Request
from blockdex.cache import TABLE_ROW
from blockdex.contract.errors import Code, Reason
from blockdex.executor.cpu import CpuExecutor
from blockdex.executor.interface import Answer as Selected
from blockdex.executor.interface import Pending, Step
from blockdex.scheduler.large_request import LargeRequest, Reading, Rows, Tensor
from blockdex.scheduler.prefill import Prefill
from blockdex_kernels import IndexSpec
from blockdex_kernels.interface import Backend
from support.naive_engine import NaiveEngine, check_same
from support.running_engine import (
    DECODE_QUERIES,
    SPEC,
    Running,
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
LONG = 200
SLICE = 16


class Later(Pending):
    """A slice that goes to the kernels when it is asked for the second time, and says how long that took.

    It reads the pages that it was given when it began, as one on a GPU does.
    """

    def __init__(self, executor: LateRunner, step: Step) -> None:
        self._executor, self._step, self._cells = executor, step, executor.cells.copy()
        self._asked = 0
        self._done: Pending | None = None

    def done(self) -> bool:
        self._asked += 1
        if self._asked < 2 or self._executor.hangs:
            return False
        if self._done is None:
            self._done = self._executor.now(self._step, self._cells)
            self.device_seconds, self.device_waited = self._executor.seconds, self._executor.waited
        return True

    def answer(self) -> Selected | None:
        assert self._done is not None
        return self._done.answer()


class LateRunner(CpuExecutor):
    """The CPU kernels as a device has them: what is wrong with a slice comes out when it is waited for.

    Attributes:
        seconds: what every slice is said to take.
        waited: whether that is said to hold time in which the device waited for the host.
        hangs: whether no slice ends for now.
        begun: whether any slice has begun.
    """

    max_slices = 3

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend, TABLE_ROW)
        self.seconds, self.waited = 1e-3, False
        self.hangs, self.begun = False, threading.Event()

    @property
    def cells(self) -> NDArray[np.int32]:
        """All page tables, as of now."""
        return self._cells

    def begin_prefill(self, step: Step) -> Pending:
        self.begun.set()
        return Later(self, step)

    def now(self, step: Step, cells: NDArray[np.int32]) -> Pending:
        as_of_now, self._cells = self._cells, cells
        try:
            return super().begin_prefill(step)
        finally:
            self._cells = as_of_now


def run_late(run: Running) -> LateRunner:
    """Gives an engine that was not started such a executor."""
    executor = LateRunner(run.backend)
    executor._step_buffers = list(run.engine._executor.step_buffers())
    run.engine._core.set_run_step(executor.run_step_buffer)
    run.engine._executor = run.engine._shared._executor = run.engine._launcher._executor = executor
    run.channel.start()
    return executor


async def fill(run: Running, naive: NaiveEngine, random: np.random.Generator, *sequences: int) -> None:
    """Opens sequences and gives layers 0 and 1 of each `LONG` keys."""
    for sequence in sequences:
        requests: list[Request] = [open_sequence(sequence)]
        requests += [tokens(layer, [(sequence, 0, LONG)], keys=keys_of(random, LONG)) for layer in (0, 1)]
        for request in requests:
            await run.ask(request)
            naive.answer(request)


async def while_prefilling(run: Running, prefill: Request, behind: Sequence[Request]) -> tuple[list[Answer], list[int]]:
    """Queues requests while the first slice of a prefill runs: all answers, and the order in which they came."""
    finished: list[int] = []
    with run.backend.held("prefill") as entered:
        futures = [run.submit(prefill)]
        await run.reached(entered)
        futures += map(run.submit, behind)
        for future in futures:
            future.add_done_callback(lambda done: finished.append(futures.index(done)))
    answers = await asyncio.wait_for(asyncio.gather(*futures), 60)
    return answers, finished


def check_all(naive: NaiveEngine, requests: Sequence[Request], answers: Sequence[Answer]) -> None:
    """Compares answers with those of one request after another."""
    for request, answer in zip(requests, answers, strict=True):
        expected = naive.answer(request)
        assert expected is not None
        check_same(answer, expected, str(request))


@pytest.mark.parametrize("order", ["ascending", "score"])
async def test_decode_and_prefill_in_one_request(random: np.random.Generator, order: str) -> None:
    rows = [(3, 0, 1), (4, 10, DECODE_QUERIES), (5, 0, LONG), (6, 2, 2), (7, 20, DECODE_QUERIES + 1)]
    total = sum(length for *_, length in rows)
    select = tokens(
        1, rows, queries=queries_of(random, total), order="score" if order == "score" else "ascending", scores=True
    )
    async with running() as run:
        naive = NaiveEngine(SPEC, run.engine.info().epoch)
        await fill(run, naive, random, *(sequence for sequence, *_ in rows))
        check_all(naive, [select], [await run.ask(select)])
        assert run.backend.tokens("decode") == 1 + DECODE_QUERIES + 2
        slices = [call.tokens for call in run.backend.calls if call.phase == "prefill"]
        assert max(slices) == SLICE
        assert sum(slices) == LONG + DECODE_QUERIES + 1


async def test_a_prefill_appends_its_own_keys(random: np.random.Generator) -> None:
    both = tokens(0, [(A, 150, 170, 3)], keys=keys_of(random, 170), queries=queries_of(random, 170))
    async with running() as run:
        naive = NaiveEngine(SPEC, run.engine.info().epoch)
        await fill(run, naive, random, A)
        check_all(naive, [both, both, get(A)], [await run.ask(both), await run.ask(both), await run.ask(get(A))])


async def test_decodes_get_in_between(random: np.random.Generator) -> None:
    prefill = tokens(0, [(A, 0, LONG)], queries=queries_of(random, LONG))
    decode = tokens(0, [(B, LONG - 1, 1)], queries=queries_of(random, 1))
    same = tokens(0, [(A, LONG - 2, 2)], queries=queries_of(random, 2))
    async with running() as run:
        naive = NaiveEngine(SPEC, run.engine.info().epoch)
        await fill(run, naive, random, A, B)
        answers, finished = await while_prefilling(run, prefill, [decode, same])
        check_all(naive, [prefill, decode, same], answers)
        assert finished[-1] == 0
        slices = [call.phase for call in run.backend.calls if call.phase != "append"]
        assert slices == ["prefill", "decode", *["prefill"] * (-(-LONG // SLICE) - 1)]


async def test_prefills_take_turns(random: np.random.Generator) -> None:
    long = tokens(0, [(A, 0, LONG)], queries=queries_of(random, LONG))
    short = tokens(0, [(B, 0, 2 * SLICE)], queries=queries_of(random, 2 * SLICE))
    async with running() as run:
        naive = NaiveEngine(SPEC, run.engine.info().epoch)
        await fill(run, naive, random, A, B)
        answers, finished = await while_prefilling(run, long, [short])
        check_all(naive, [long, short], answers)
        assert finished == [1, 0]


async def test_a_prefill_sees_no_later_keys(random: np.random.Generator) -> None:
    """What would change the keys that it reads waits for its end; what does not, overtakes it."""
    prefill = tokens(0, [(A, 0, LONG)], queries=queries_of(random, LONG))
    behind: list[Request] = [
        tokens(1, [(A, 100, 3)], keys=keys_of(random, 3), rollback=True),
        tokens(0, [(B, 5, 9)], keys=keys_of(random, 9), queries=queries_of(random, 9), rollback=True),
        tokens(0, [(A, 3, LONG)], keys=keys_of(random, LONG), queries=queries_of(random, LONG), rollback=True),
        get(A),
        fork(A, 9, 50),
        truncate(A, 40),
        tokens(0, [(9, 40, 10)], queries=queries_of(random, 10)),
        close(A),
    ]
    async with running() as run:
        naive = NaiveEngine(SPEC, run.engine.info().epoch)
        await fill(run, naive, random, A, B)
        answers, finished = await while_prefilling(run, prefill, behind)
        check_all(naive, [prefill, *behind], answers)
        assert set(finished[:2]) == {1, 2}
        assert finished[2] == 0


async def while_on_its_way(
    run: Running, executor: LateRunner, prefill: Request, behind: Sequence[Request]
) -> list[Answer]:
    """Asks for a prefill of one slice, and for the others one after another while that is on its way."""
    executor.hangs = True
    futures = [run.submit(prefill)]
    await run.reached(executor.begun)
    for request in behind:
        futures.append(run.submit(request))
        await asyncio.wait(futures[-1:], timeout=0.1)
    executor.hangs = False
    return await asyncio.wait_for(asyncio.gather(*futures), 60)


async def test_pages_that_a_prefill_reads_move_under_it(random: np.random.Generator) -> None:
    """An append to another layer would leave a shared page to the other one, which would write there."""
    prefill = tokens(0, [(A, 0, LONG)], queries=queries_of(random, LONG))
    copying = tokens(1, [(A, 0, LONG)], keys=keys_of(random, LONG), rollback=True)
    writing = [tokens(layer, [(9, 0, LONG)], keys=keys_of(random, LONG), rollback=True) for layer in (0, 1)]
    async with running(start=False, prefill_slice_seconds=1.0) as run:
        executor = run_late(run)
        naive = NaiveEngine(SPEC, run.engine.info().epoch)
        await fill(run, naive, random, A)
        check_all(naive, [fork(A, 9, LONG)], [await run.ask(fork(A, 9, LONG))])
        behind = [copying, *writing, tokens(0, [(A, 0, LONG)], queries=queries_of(random, LONG))]
        check_all(naive, [prefill, *behind], await while_on_its_way(run, executor, prefill, behind))


async def test_pages_that_a_prefill_reads_are_not_given_away(random: np.random.Generator) -> None:
    """A layer that is behind another is enough: what it appends there moves a page that a fork shared."""
    prefill = tokens(0, [(A, 0, LONG)], queries=queries_of(random, LONG))
    begin: list[Request] = [
        open_sequence(A),
        open_sequence(B),
        tokens(0, [(A, 0, LONG)], keys=keys_of(random, LONG)),
        fork(A, 9, LONG),
    ]
    behind: list[Request] = [
        tokens(1, [(A, 0, LONG)], keys=keys_of(random, LONG)),
        close(9),
        tokens(0, [(B, 0, 2 * LONG)], keys=keys_of(random, 2 * LONG)),
    ]
    async with running(start=False, num_pages=3 * LONG // SPEC.block_size, prefill_slice_seconds=1.0) as run:
        executor = run_late(run)
        naive = NaiveEngine(SPEC, run.engine.info().epoch)
        for request in begin:
            check_all(naive, [request], [await run.ask(request)])
        check_all(naive, [prefill, *behind], await while_on_its_way(run, executor, prefill, behind))


async def test_an_append_that_moves_no_page_overtakes_a_prefill(random: np.random.Generator) -> None:
    """Neither the end of a sequence that was forked is held back, nor one whose pages nobody shares any more."""
    prefill = tokens(0, [(A, 0, LONG)], queries=queries_of(random, LONG))
    async with running(start=False, prefill_slice_seconds=1.0) as run:
        executor = run_late(run)
        await fill(run, NaiveEngine(SPEC, run.engine.info().epoch), random, A)
        await run.ask(fork(A, 9, LONG))
        executor.hangs = True
        reading = run.submit(prefill)
        await run.reached(executor.begun)
        await run.ask(tokens(1, [(A, LONG, 3)], keys=keys_of(random, 3)))
        held_back = run.submit(tokens(1, [(A, 0, 3)], keys=keys_of(random, 3), rollback=True))
        await run.ask(close(9))
        await asyncio.wait_for(held_back, 20)
        assert not reading.done()
        executor.hangs = False
        await asyncio.wait_for(reading, 60)


async def test_a_cancelled_prefill_is_dropped(random: np.random.Generator) -> None:
    async with running() as run:
        naive = NaiveEngine(SPEC, run.engine.info().epoch)
        await fill(run, naive, random, A)
        with run.backend.held("prefill") as entered:
            prefill = run.submit(tokens(0, [(A, 0, LONG)], queries=queries_of(random, LONG)))
            await run.reached(entered)
            closed = run.submit(close(A))
            prefill.cancel()
            await asyncio.sleep(0)  # Until the engine is told.
        await asyncio.wait_for(closed, 20)
        assert run.backend.tokens("prefill") == SLICE


async def test_an_overdue_prefill_is_dropped(random: np.random.Generator) -> None:
    async with running() as run:
        naive = NaiveEngine(SPEC, run.engine.info().epoch)
        await fill(run, naive, random, A)
        with run.backend.held("prefill") as entered:
            prefill = run.submit(tokens(0, [(A, 0, LONG)], queries=queries_of(random, LONG)), timeout=1.0)
            await run.reached(entered)
            await asyncio.sleep(1.1)
        error = await refusal(prefill)
        assert (error.code, error.reason) == (Code.DEADLINE_EXCEEDED, Reason.DEADLINE_EXCEEDED)
        await run.ask(close(A))
        assert run.backend.tokens("prefill") == SLICE


async def test_a_shared_prefill_goes_on_for_those_who_still_wait(random: np.random.Generator) -> None:
    queries = queries_of(random, LONG)
    async with running() as run:
        naive = NaiveEngine(SPEC, run.engine.info().epoch)
        await fill(run, naive, random, A)
        decode = tokens(1, [(A, 5, 1)], queries=queries[:1])
        with run.backend.held("decode") as deciding:
            first = run.submit(decode)
            await run.reached(deciding)
            ranks = [
                run.submit(tokens(0, [(A, 0, LONG)], queries=queries[:, head : head + 1], first_head=head), timeout)
                for head, timeout in enumerate((20.0, 20.0, 1.0))
            ]
        finished: list[int] = []
        for rank in ranks:
            rank.add_done_callback(lambda done: finished.append(ranks.index(done)))
        await asyncio.wait_for(first, 20)
        with run.backend.held("prefill") as entered:
            await run.reached(entered)
            ranks[1].cancel()
            await asyncio.sleep(1.1)
        assert (await refusal(ranks[2])).reason == Reason.DEADLINE_EXCEEDED
        answer = await asyncio.wait_for(ranks[0], 20)
        assert finished == [1, 2, 0], "told when its deadline passed, not at the end"
        check_all(naive, [tokens(0, [(A, 0, LONG)], queries=queries[:, :1])], [answer])


async def test_a_prefill_keeps_its_pages_beyond_the_lease(random: np.random.Generator) -> None:
    pages = LONG // SPEC.block_size
    prefill = tokens(0, [(A, 0, LONG)], queries=queries_of(random, LONG))
    greedy = tokens(0, [(B, 0, 2 * SPEC.block_size)], keys=keys_of(random, 2 * SPEC.block_size))
    async with running(num_pages=pages + 1, lease_seconds=1.0) as run:
        naive = NaiveEngine(SPEC, run.engine.info().epoch)
        await fill(run, naive, random, A)
        await run.ask(open_sequence(B, lease=600))
        with run.backend.held("prefill") as entered:
            reading = run.submit(prefill)
            await run.reached(entered)
            refused = run.submit(greedy)
            await asyncio.sleep(1.1)
        error = await refusal(refused)
        assert (error.reason, run.engine.info().cache.evictions) == (Reason.OUT_OF_PAGES, 0)
        check_all(naive, [prefill], [await asyncio.wait_for(reading, 20)])
        await asyncio.sleep(1.1)
        await run.ask(greedy)
        assert run.engine.info().cache.evictions == 1
        assert (await run.refusal(get(A))).reason == Reason.UNKNOWN_SEQUENCE


async def test_slices_on_their_way_are_answered_in_order(random: np.random.Generator) -> None:
    prefill = tokens(0, [(A, 0, LONG)], queries=queries_of(random, LONG), scores=True)
    async with running(start=False) as run:
        run_late(run)
        naive = NaiveEngine(SPEC, run.engine.info().epoch)
        await fill(run, naive, random, A)
        check_all(naive, [prefill], [await run.ask(prefill)])


async def test_a_slice_that_fails_later_ends_its_request_alone(random: np.random.Generator) -> None:
    prefill = tokens(0, [(A, 0, LONG)], queries=queries_of(random, LONG))
    async with running(start=False) as run:
        run_late(run)
        naive = NaiveEngine(SPEC, run.engine.info().epoch)
        await fill(run, naive, random, A)
        epoch, rate = run.engine.info().epoch, run.engine._launcher._products_per_second
        run.backend.fault, run.backend.error = "prefill", torch.OutOfMemoryError("made for this test")

        assert (await run.refusal(prefill)).reason == Reason.OVERLOADED

        await run.settled()
        assert run.engine._launcher._products_per_second < rate, "by the slices behind it"
        assert run.engine.info().epoch == epoch
        check_all(naive, [prefill], [await run.ask(prefill)])


@pytest.mark.parametrize("waited", [False, True])
async def test_time_that_the_device_waited_does_not_shorten_slices(random: np.random.Generator, waited: bool) -> None:
    prefill = tokens(0, [(A, 0, LONG)], queries=queries_of(random, LONG))
    async with running(start=False) as run:
        executor = run_late(run)
        await fill(run, NaiveEngine(SPEC, run.engine.info().epoch), random, A)
        rate = run.engine._launcher._products_per_second
        executor.seconds, executor.waited = 1.0, waited
        await run.ask(prefill)
        assert (run.engine._launcher._products_per_second == rate) is waited
        executor.seconds = 1e-6
        low = run.engine._launcher._products_per_second
        await run.ask(prefill)
        assert run.engine._launcher._products_per_second > low, "what is faster than expected always counts"


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20_000), st.integers(0, 20_000), st.floats(1, 1e12))
def test_a_slice_takes_what_its_time_allows(start: int, length: int, taken: int, products: float) -> None:
    """Keys grow along a prefill; the next slice is counted from where it begins, to within rounding."""
    ids, entries = np.zeros(1, np.uint64), np.zeros(1, np.uint32)
    rows = Rows(ids, entries, np.array([start]), np.array([length]), np.zeros(1, np.bool_))
    queries = Tensor(torch.bfloat16, memoryview(bytes(2 * length)))
    request = LargeRequest(0, 0, rows, 1, None, queries, 0, 1, "ascending", return_scores=False, raw_scores=False)
    prefill = Prefill(Reading([request], IndexSpec(num_layers=1, head_dim=1)), 0)
    prefill.take(min(taken, length - 1))
    most = prefill.tokens_within(products)
    assert prefill.products(max(most - 1, 0)) <= products
    assert prefill.products(most + 2) > products
