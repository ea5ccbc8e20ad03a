"""What the engine counts and times: histograms, the stages of a request, and what they come to."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from blockdex.contract.stats import Histogram, Stats
from blockdex_kernels.interface import Selection
from support.running_engine import (
    close,
    fork,
    get,
    keys_of,
    open_sequence,
    queries_of,
    refusal,
    running,
    tokens,
)


def observed(*values: float) -> Histogram:
    histogram = Histogram((1.0, 2.0, 4.0))
    for value in values:
        histogram.observe(value)
    return histogram


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ((), 0.5, None),
        ((0.7,), 0.5, 0.5),  # half of the first bucket, which begins at 0
        ((0.7,), 1.0, 1.0),
        ((1.5, 1.5, 3.0, 3.0), 0.5, 2.0),
        ((1.5, 1.5, 3.0, 3.0), 0.75, 3.0),
        ((1.5, 1.5, 3.0, 3.0), 0.25, 1.5),
        ((0.5, 3.0), 0.99, 2.0 + 2.0 * 0.98),  # the empty bucket between them is passed over
        ((9.0,), 0.5, 4.0),  # above the last bound: that bound
        ((0.5, 9.0, 9.0), 0.99, 4.0),
        ((1.0, 2.0, 4.0), 1.0, 4.0),  # a bound belongs to the bucket below it
    ],
)
def test_quantiles_are_interpolated_inside_their_bucket(
    values: tuple[float, ...], share: float, expected: float | None
) -> None:
    assert observed(*values).quantile(share) == (None if expected is None else pytest.approx(expected))


def test_what_was_observed_since() -> None:
    histogram = observed(0.5, 3.0)
    earlier = observed(0.5, 3.0)
    for value in (1.5, 9.0):
        histogram.observe(value)
    since = histogram.since(earlier)
    assert (since.counts, since.total, since.count) == ([0, 1, 0, 1], 10.5, 2)
    assert histogram.since(histogram).quantile(0.5) is None


def test_a_snapshot_no_longer_changes() -> None:
    stats = Stats()
    stats.launched("decode", 3, 2)
    before, same = stats.snapshot(), copy.deepcopy(stats)
    assert before == same
    stats.stage_seconds["sequence"]["queue"].observe(1.0)
    stats.launched("decode", 3, 2)
    stats.device_seconds["decode"] += 1.0
    stats.batch_requests.observe(1)
    stats.dropped["deadline"] += 1
    assert before == same
    assert before != stats


async def test_each_request_comes_to_one_phase_and_is_in_each_stage_once() -> None:
    random = np.random.default_rng(5)
    began = time.monotonic()
    async with running() as run:
        keys, queries = keys_of(random, 40), queries_of(random, 40)
        await run.ask(open_sequence(1))
        await run.ask(open_sequence(2))
        await run.ask(tokens(0, [(1, 0, 40, 5)], keys=keys))
        await run.ask(tokens(0, [(1, 0, 40, 5)], keys=keys))  # is there already: no kernel runs
        await run.ask(tokens(1, [(1, 0, 4)], keys=keys[:4], queries=queries[:4]))
        await run.ask(tokens(0, [(1, 38, 2)], queries=queries[:2]))
        await run.ask(tokens(2, [(1, 0, 4), (2, 0, 36)], keys=keys, queries=queries))  # one short span, one long
        await refusal(run.submit(tokens(0, [(2, 5, 1)], queries=queries[:1])))
        await run.ask(fork(1, 3, 8))
        await run.ask(close(3))
        # What came before is counted once this is answered; this, which is refused as a sequence's call, perhaps later.
        await run.settled()
        stats = run.engine.stats()
        totals = stats.totals()
        counted = {phase: came_to.requests for phase, came_to in totals.phases.items()}
        assert counted.pop("sequence") in (6, 7)
        assert counted == {"append": 1, "decode": 2, "prefill": 1}
        # Neither the one that is there already nor the one that is refused gets into a batch.
        assert totals.requests in (9, 10)
        assert 1 <= totals.batches <= 10
        assert totals.dropped == {"cancelled": 0, "deadline": 0}
        assert [totals.phases[phase].tokens for phase in counted] == [84, 10, 36]
        for phase, requests in counted.items():
            assert {stage: seconds.count for stage, seconds in stats.stage_seconds[phase].items()} == dict.fromkeys(
                ("queue", "plan", "device", "reply"), requests
            )
        assert stats.stage_seconds["sequence"]["device"].count == 0
        device = sum(came_to.device_seconds for came_to in totals.phases.values())
        assert 0 < device < totals.device_busy_seconds < totals.busy_seconds < time.monotonic() - began


async def test_a_request_is_in_the_stage_that_takes_its_time() -> None:
    random = np.random.default_rng(6)
    held = 0.2
    async with running() as run:
        await run.ask(open_sequence(1))
        await run.ask(tokens(0, [(1, 0, 8)], keys=keys_of(random, 8)))
        request = tokens(0, [(1, 7, 1)], queries=queries_of(random, 1))
        with run.backend.held("decode") as entered:
            first = run.submit(request)
            await run.reached(entered)
            second, sequence = run.submit(request), run.submit(get(1))
            await asyncio.sleep(held)
        for answer in (first, second, sequence):
            await answer
        assert first.phase == second.phase == "decode"
        assert first.stage_seconds["device"] >= held > first.stage_seconds["queue"]
        assert second.stage_seconds["queue"] >= held > second.stage_seconds["device"]
        assert sequence.phase == "sequence"
        assert sequence.stage_seconds["queue"] >= held
        assert "device" not in sequence.stage_seconds


def slow(kernel: Callable[..., Selection]) -> Callable[..., Selection]:
    """A kernel that takes a fifth of a second longer."""

    def slowed(*arguments: Any, **options: Any) -> Selection:
        time.sleep(0.2)
        return kernel(*arguments, **options)

    return slowed


async def test_time_with_decodes_beside_a_prefill_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice of the prefill is on its way, and the decode too, for as long as that takes."""
    random = np.random.default_rng(7)
    length = 300
    async with running() as run:
        for sequence in (1, 2):
            await run.ask(open_sequence(sequence))
            await run.ask(tokens(0, [(sequence, 0, length)], keys=keys_of(random, length)))
        decode = tokens(
            0,
            [(2, length - 1, 1)],
            keys=keys_of(random, 1),
            queries=queries_of(random, 1),
            rollback=True,
        )
        await run.ask(decode)
        before, began = run.engine.stats(), time.monotonic()
        with run.backend.held("prefill") as entered:
            prefill = run.submit(tokens(0, [(1, 0, length)], queries=queries_of(random, length)))
            await run.reached(entered)
            monkeypatch.setattr(run.backend, "decode", slow(run.backend.decode))
            decoded = run.submit(decode)
        await asyncio.gather(prefill, decoded)
        after, passed = run.engine.stats(), time.monotonic() - began
        assert run.engine.stats().launch_requests["decode"].total == 2
        assert 0.2 <= after.device_busy_seconds - before.device_busy_seconds <= passed
        assert 0.2 <= after.busy_seconds - before.busy_seconds <= passed
