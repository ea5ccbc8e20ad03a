"""Hundreds of random requests queued at once, compared with doing one after another."""

from __future__ import annotations

import asyncio
import dataclasses

import numpy as np
import pytest

from benchmarks.ring_messages import Answer, Request
from blockdex.contract.errors import BlockdexError
from blockdex.contract.messages import FloatDtype, Order
from blockdex_kernels.spec import KeyDtype
from support.cache_state import check_integrity
from support.naive_engine import NaiveEngine, check_same
from support.running_engine import (
    DECODE_QUERIES,
    SPEC,
    TENANT,
    close,
    fork,
    get,
    keys_of,
    open_sequence,
    running,
    tokens,
    truncate,
    values,
)

REQUESTS = 300
TENANTS = (TENANT, "other")
DTYPES: tuple[FloatDtype, ...] = ("bf16", "fp16", "fp32", "fp8_e4m3")
ORDERS: tuple[Order, ...] = ("ascending", "score")


class Caller:
    """Draws requests that mostly make sense: it follows the sequences' lengths as they will be when each is done."""

    def __init__(self, seed: int, naive: NaiveEngine, *, waits: bool, plain: float = 0.0) -> None:
        """`plain`: share of the token requests that are such as engines ask all the time."""
        self._random = np.random.default_rng(seed)
        self._naive = naive
        self._waits = waits
        self._plain = plain
        self._fresh = 1

    def request(self) -> Request:
        """The next request."""
        random = self._random
        tenant = TENANTS[random.integers(len(TENANTS))]
        match random.choice(
            ["open", "get", "fork", "truncate", "close", "append", "select", "both"],
            p=[0.08, 0.06, 0.06, 0.05, 0.03, 0.22, 0.25, 0.25],
        ):
            case "open":
                # Now and then one that is open, perhaps empty still.
                sequence = self._some_id(tenant) if random.random() < 0.2 else self._new_id()
                return open_sequence(sequence, tenant=tenant)
            case "get":
                return get(self._some_id(tenant), tenant=tenant)
            case "fork":
                return fork(self._some_id(tenant), self._new_id(), int(random.integers(60)), tenant=tenant)
            case "truncate":
                return truncate(self._some_id(tenant), int(random.integers(60)), tenant=tenant)
            case "close":
                return close(self._some_id(tenant), tenant=tenant)
            case kind:
                plain = self._plain > 0 and random.random() < self._plain
                return self._decode(tenant) if plain else self._tokens(tenant, kind)

    def _decode(self, tenant: str) -> Request:
        """Appends to the ends of sequences, or writes these anew, and selects for that with all heads."""
        random, layer = self._random, int(self._random.integers(SPEC.num_layers))
        rows = []
        for sequence_id in sorted({self._some_id(tenant) for _ in range(random.choice([1, 2, 4]))}):
            _, _, length, revision = self._row(tenant, sequence_id, layer, appends=True, wait=False)
            layers = self._naive.sequences.get((tenant, sequence_id))
            held = len(layers[layer].keys) if layers else 0
            start = max(held - int(random.choice([0, 0, 0, 1, 2])), 0)
            rows.append((sequence_id, start, min(length, DECODE_QUERIES), revision))
        total = sum(length for _, _, length, _ in rows)
        keys, queries = (values(random, total, *heads, SPEC.head_dim) for heads in ((), (SPEC.num_index_heads,)))
        return tokens(layer, rows, keys=keys, queries=queries, tenant=tenant)

    def request_answered(self) -> tuple[Request, Answer | BlockdexError]:
        """The next request, and its answer."""
        request = self.request()
        answer = self._naive.answer(request)
        assert answer is not None
        return request, answer

    def _tokens(self, tenant: str, kind: str) -> Request:
        random = self._random
        appends, selects = kind != "select", kind != "append"
        layer = int(random.integers(SPEC.num_layers))
        wait = self._waits and not appends and bool(random.random() < 0.4)
        # One sequence where it waits: of several it might see one before, another after what came in between.
        count = 1 if wait else int(random.choice([1, 1, 2, 3]))
        ids = {self._some_id(tenant) for _ in range(count)}
        rows = [self._row(tenant, sequence_id, layer, appends=appends, wait=wait) for sequence_id in sorted(ids)]
        total = sum(length for _, _, length, _ in rows)
        first_head = int(random.integers(SPEC.num_index_heads))
        heads = int(random.integers(1, SPEC.num_index_heads - first_head + 1))
        return tokens(
            layer,
            rows,
            keys=keys_of(random, total) if appends else None,
            queries=values(random, total, heads, SPEC.head_dim) if selects else None,
            first_head=first_head,
            order=ORDERS[random.integers(len(ORDERS))],
            scores=bool(random.random() < 0.3),
            raw=bool(random.random() < 0.2),
            wait=wait,
            rollback=bool(appends and random.random() < 0.3),
            dtype=DTYPES[random.integers(len(DTYPES))],
            tenant=tenant,
            epoch=self._naive.epoch if random.random() < 0.98 else 3,
        )

    def _row(
        self, tenant: str, sequence_id: int, layer: int, *, appends: bool, wait: bool
    ) -> tuple[int, int, int, int]:
        random = self._random
        layers = self._naive.sequences.get((tenant, sequence_id))
        held, revision = (len(layers[layer].keys), layers[layer].revision) if layers else (0, 0)
        length = int(random.choice([1, 2, DECODE_QUERIES, DECODE_QUERIES + 1, 25, 40]))
        if appends:
            start = held if random.random() < 0.6 else int(random.integers(held + 2))
            revisions, odds = (
                [0, revision + 1, revision + 2, revision, max(revision - 1, 0)],
                [0.3, 0.4, 0.1, 0.15, 0.05],
            )
        elif wait:
            start = int(random.integers(held + 10))
            revisions, odds = [0, revision, revision + 1, max(revision - 1, 0)], [0.5, 0.2, 0.25, 0.05]
        else:
            length = min(length, max(held, 1))
            start = int(random.integers(max(held - length, 0) + 1)) + (random.random() < 0.05)
            revisions, odds = [0, revision, revision + 1, max(revision - 1, 0)], [0.6, 0.34, 0.03, 0.03]
        return sequence_id, int(start), length, int(random.choice(revisions, p=odds))

    def _new_id(self) -> int:
        self._fresh += int(self._random.random() < 0.9)
        return self._fresh

    def _some_id(self, tenant: str) -> int:
        held = [sequence_id for owner, sequence_id in self._naive.sequences if owner == tenant]
        return int(self._random.choice(held[-6:])) if held and self._random.random() < 0.98 else self._fresh


@pytest.mark.parametrize("waits", [False, True], ids=["", "waiting"])
@pytest.mark.parametrize(("seed", "key_dtype"), [(0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "fp8_e4m3")])
async def test_answers_are_those_of_one_request_after_another(seed: int, key_dtype: KeyDtype, waits: bool) -> None:
    spec = dataclasses.replace(SPEC, key_dtype=key_dtype)
    async with running(spec, start=False, num_pages=4096) as run:
        naive = NaiveEngine(spec, run.engine.info().epoch)
        caller = Caller(seed, naive, waits=waits)
        futures: list[asyncio.Future[Answer]] = []
        requests: list[Request] = []
        expected: list[Answer | BlockdexError | None] = []
        waiting: list[int] = []
        for number in range(REQUESTS):
            request = caller.request()
            requests.append(request)
            futures.append(run.submit(request, timeout=60))
            expected.append(naive.answer(request))
            if expected[number] is None:
                waiting.append(number)
            for earlier in waiting:
                expected[earlier] = naive.answer(requests[earlier])
            waiting = [earlier for earlier in waiting if expected[earlier] is None]
        run.channel.start()
        answered = [future for future, answer in zip(futures, expected, strict=True) if answer is not None]
        await asyncio.wait_for(asyncio.gather(*answered, return_exceptions=True), 60)
        await run.settled()
        for number, (future, answer) in enumerate(zip(futures, expected, strict=True)):
            if answer is None:
                assert not future.done(), f"request {number} waits for nothing that came: {requests[number]}"
                future.cancel()
                continue
            actual = future.exception() or future.result()
            check_same(actual, answer, f"request {number}: {requests[number]}")
        check_integrity(run.engine._cache)
        refusals = sum(isinstance(answer, BlockdexError) for answer in expected)
        assert REQUESTS // 20 < refusals < REQUESTS // 2, "neither all refused nor all easy"
        assert run.engine.stats().batches < REQUESTS // 2, "most ran together"
        assert {call.phase for call in run.backend.calls} == {"append", "decode", "prefill"}


@pytest.mark.parametrize(("seed", "key_dtype"), [(4, "bf16"), (5, "bf16"), (6, "bf16"), (7, "fp8_e4m3")])
async def test_so_are_those_asked_a_few_at_a_time(seed: int, key_dtype: KeyDtype) -> None:
    """Some are run in steps and overtake others, and nobody can tell."""
    spec = dataclasses.replace(SPEC, key_dtype=key_dtype)
    async with running(spec, num_pages=4096) as run:
        naive = NaiveEngine(spec, run.engine.info().epoch)
        caller = Caller(seed, naive, waits=False, plain=0.8)
        for _ in range(8):
            requests = [caller.request_answered() for _ in range(60)]
            futures = [run.submit(request, timeout=60) for request, _ in requests]
            await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), 60)
            for number, (future, (request, answer)) in enumerate(zip(futures, requests, strict=True)):
                actual = future.exception() or future.result()
                check_same(actual, answer, f"request {number}: {request}")
            del futures, future, actual
        check_integrity(run.engine._cache)
        assert run.engine._core.steps > 4
        assert {call.phase for call in run.backend.calls} == {"append", "decode", "prefill"}
