"""What is queued together runs together, and no sequence can tell that from one request after another."""

from __future__ import annotations

import numpy as np

from benchmarks.ring_messages import Request
from blockdex.contract.messages import FloatDtype, Order
from support.naive_engine import answer_together
from support.running_engine import (
    SPEC,
    close,
    fork,
    get,
    keys_of,
    open_sequence,
    queries_of,
    running,
    tokens,
    truncate,
)

A, B, C = 1, 2, 3


async def test_requests_of_many_tenants_layers_and_dtypes_share_launches(random: np.random.Generator) -> None:
    dtypes: list[FloatDtype] = ["bf16", "fp16", "fp32", "fp8_e4m3"]
    orders: list[Order] = ["ascending", "score"]
    requests: list[Request] = []
    for tenant in ("red", "blue"):
        requests += [open_sequence(sequence, tenant=tenant) for sequence in (A, B)]
        for layer, dtype in enumerate(dtypes[:3]):
            keys, queries = keys_of(random, 5), queries_of(random, 5)
            requests.append(tokens(layer, [(A, 0, 3), (B, 0, 2)], keys=keys, dtype=dtype, tenant=tenant))
            for order in orders:
                select = tokens(
                    layer,
                    [(A, 0, 3), (B, 0, 2)],
                    queries=queries,
                    dtype=dtypes[layer + 1],
                    order=order,
                    scores=order == "score",
                    tenant=tenant,
                )
                requests.append(select)
    async with running() as run:
        await answer_together(run, requests)
        appends = [call for call in run.backend.calls if call.phase == "append"]
        decodes = [call for call in run.backend.calls if call.phase == "decode"]
        # One launch for all tenants, layers, dtypes and orders; the CPU's kernels are called once more for scores.
        assert [call.tokens for call in appends] == [30]
        assert [call.tokens for call in decodes] == [30, 30]


async def test_layers_share_a_launch(random: np.random.Generator) -> None:
    requests: list[Request] = [open_sequence(A)]
    requests += [
        tokens(layer, [(A, 0, 4)], keys=keys_of(random, 4), queries=queries_of(random, 4))
        for layer in range(SPEC.num_layers)
    ]
    async with running() as run:
        await answer_together(run, requests)
        assert [(call.phase, call.tokens, call.layers) for call in run.backend.calls] == [
            ("append", 12, [0, 1, 2]),
            ("decode", 12, [0, 1, 2]),
        ]


async def test_a_selection_sees_the_append_before_it_and_not_the_one_behind(random: np.random.Generator) -> None:
    select = tokens(1, [(A, 18, 2)], queries=queries_of(random, 2))
    async with running() as run:
        await answer_together(
            run,
            [
                open_sequence(A),
                select,
                tokens(1, [(A, 0, 20)], keys=keys_of(random, 20)),
                select,
                tokens(1, [(A, 2, 18)], keys=keys_of(random, 18), rollback=True),
                select,
                tokens(1, [(A, 2, 4)], keys=keys_of(random, 4), rollback=True),
                select,
            ],
        )
        assert [call.tokens for call in run.backend.calls if call.phase == "append"] == [20, 18, 4]


async def test_fork_truncate_and_close_are_barriers(random: np.random.Generator) -> None:
    select = tokens(0, [(A, 26, 4)], queries=queries_of(random, 4))
    async with running() as run:
        await answer_together(
            run,
            [
                open_sequence(A),
                tokens(0, [(A, 0, 30)], keys=keys_of(random, 30)),
                select,
                # Both cut a page in two, which the fork copies and the truncation keeps.
                fork(A, B, 21),
                tokens(0, [(B, 21, 40)], keys=keys_of(random, 40)),
                tokens(0, [(B, 57, 4)], queries=queries_of(random, 4)),
                tokens(0, [(A, 3, 27)], keys=keys_of(random, 27), rollback=True),
                select,
                truncate(A, 13),
                select,
                get(A),
                tokens(0, [(A, 13, 30)], keys=keys_of(random, 30), queries=queries_of(random, 30)),
                select,
                close(A),
                select,
                get(A),
                open_sequence(A),
                get(A),
                select,
                tokens(0, [(B, 57, 4)], queries=queries_of(random, 4)),
            ],
        )


async def test_pages_given_back_and_taken_again_in_one_batch(random: np.random.Generator) -> None:
    """A page that is copied, freed and written again is copied while it still holds the old keys."""
    setup: list[Request] = [open_sequence(A), tokens(0, [(A, 0, 24)], keys=keys_of(random, 24))]
    async with running(num_pages=5) as run:
        await answer_together(
            run,
            [
                fork(A, B, 20),
                close(A),
                tokens(0, [(B, 16, 3)], keys=keys_of(random, 3), rollback=True),
                open_sequence(C),
                tokens(0, [(C, 0, 8)], keys=keys_of(random, 8), queries=queries_of(random, 8)),
                tokens(0, [(B, 13, 3)], queries=queries_of(random, 3)),
                tokens(0, [(C, 5, 3)], queries=queries_of(random, 3)),
            ],
            setup=setup,
        )
        assert [call.tokens for call in run.backend.calls if call.phase == "append"] == [3, 8]


async def test_both_sides_of_a_fork_write_the_page_they_share(random: np.random.Generator) -> None:
    async with running() as run:
        await answer_together(
            run,
            [
                open_sequence(A),
                *(tokens(layer, [(A, 0, 32)], keys=keys_of(random, 32)) for layer in range(3)),
                fork(A, B, 32),
                tokens(
                    1, [(A, 4, 9), (B, 6, 9)], keys=keys_of(random, 18), queries=queries_of(random, 18), rollback=True
                ),
                tokens(
                    2, [(B, 10, 9), (A, 20, 2)], keys=keys_of(random, 11), queries=queries_of(random, 11), rollback=True
                ),
                *(tokens(layer, [(A, 11, 2), (B, 12, 2)], queries=queries_of(random, 4)) for layer in range(3)),
            ],
        )


async def test_others_overtake_what_is_held_back(random: np.random.Generator) -> None:
    async with running() as run:
        await answer_together(
            run,
            [
                open_sequence(A),
                open_sequence(B),
                tokens(0, [(A, 0, 3)], keys=keys_of(random, 3)),
                tokens(0, [(A, 0, 5)], keys=keys_of(random, 5), rollback=True),
                tokens(1, [(A, 0, 7)], keys=keys_of(random, 7)),
                tokens(0, [(B, 0, 11)], keys=keys_of(random, 11)),
                tokens(0, [(A, 5, 1), (B, 11, 1)], keys=keys_of(random, 2)),
                tokens(1, [(B, 0, 13)], keys=keys_of(random, 13)),
            ],
        )
        # The second append to A waits for the first; so does what names A behind it, and B behind that; B did not.
        # Those of more than a step's tokens are run behind the step that came with them.
        batches = [call.tokens for call in run.backend.calls]
        assert batches == [3, 11, 5 + 7, 2, 13]


async def test_held_back_requests_keep_their_order(random: np.random.Generator) -> None:
    select = tokens(0, [(A, 6, 2)], queries=queries_of(random, 2))
    requests: list[Request] = [open_sequence(A), tokens(0, [(A, 0, 8)], keys=keys_of(random, 8))]
    for start in range(8):
        keys = keys_of(random, 8 - start)
        requests += [tokens(0, [(A, start, 8 - start)], keys=keys, rollback=True), get(A), select]
    async with running() as run:
        await answer_together(run, requests)
        assert [call.tokens for call in run.backend.calls if call.phase == "append"] == [8, 8, 7, 6, 5, 4, 3, 2, 1]


async def test_a_repeated_append_is_done_once(random: np.random.Generator) -> None:
    append = tokens(0, [(A, 0, 40, 7)], keys=keys_of(random, 40))
    both = tokens(0, [(A, 40, 2, 8)], keys=keys_of(random, 2), queries=queries_of(random, 2))
    other = tokens(0, [(A, 2, 40, 8), (B, 0, 3, 8)], keys=keys_of(random, 43))
    select = tokens(0, [(A, 38, 4)], queries=queries_of(random, 4))
    async with running() as run:
        opened = [open_sequence(A), open_sequence(B)]
        await answer_together(run, [*opened, append, append, both, both, other, select, both, get(A), get(B)])
        assert run.backend.tokens("append") == 40 + 2 + 3
