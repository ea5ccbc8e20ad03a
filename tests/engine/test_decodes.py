"""Decodes that are checked and entered together, whoever asked for them, are answered as one after another."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from blockdex.engine import engine as engine_module
from blockdex.engine.decodes import MAX_RUNS, Decodes, take_decodes
from blockdex.messages import Request, TokenRequest
from naive_engine import answer_together
from running_engine import SPEC, fork, open_sequence, running, tokens, values

A, B, C = 1, 2, 3
LENGTH = 4 * SPEC.block_size - 2


@pytest.fixture
def random() -> np.random.Generator:
    """Numbers that are the same in every run."""
    return np.random.default_rng(21)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, int]]]:
    """Layer and first sequence of the requests of every group that was taken."""
    groups: list[list[tuple[int, int]]] = []

    def watched(*arguments: Any) -> Decodes | None:
        decodes = take_decodes(*arguments)
        if decodes is not None:
            requests = [entry.request for entry, _ in decodes.entries]
            groups.append(
                [(one.layer, int(one.spans.sequence_ids[0])) for one in requests if isinstance(one, TokenRequest)]
            )
        return decodes

    monkeypatch.setattr(engine_module, "take_decodes", watched)
    return groups


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


async def test_all_tenants_layers_and_lengths_at_once(random: np.random.Generator, taken: list[Any]) -> None:
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
    async with running() as run:
        await answer_together(run, [*requests, *later], setup=setup)
        assert taken[0] == [(0, A), (1, B), (0, C)]
        appends = [call for call in run.backend.calls if call.phase == "append"]
        assert (appends[0].tokens, appends[0].layers) == (11, [0, 0, 1, 0, 0])


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
async def test_those_that_do_not_fit_are_left(
    random: np.random.Generator, taken: list[Any], row: tuple[int, ...]
) -> None:
    setup: list[Request] = [
        *filled(random, A, B, C),
        tokens(0, [(B, LENGTH - 1, 1, 3)], keys=keys_of(random, 1)),
    ]
    requests: list[Request] = [both(random, 0, (A, LENGTH, 1)), both(random, 0, row), both(random, 0, (C, LENGTH, 1))]
    async with running() as run:
        await answer_together(run, requests, setup=setup)
        assert (0, row[0]) not in [one for group in taken for one in group]
        assert (0, A) in taken[0]


async def test_the_same_layer_twice_in_order(random: np.random.Generator, taken: list[Any]) -> None:
    requests: list[Request] = [both(random, 0, (A, LENGTH, 1)), both(random, 0, (A, LENGTH + 1, 1))]
    async with running() as run:
        await answer_together(run, requests, setup=filled(random, A))
        assert taken == [[(0, A)]]  # the other one is a batch's


async def test_a_shared_page_is_copied_first(random: np.random.Generator, taken: list[Any]) -> None:
    setup: list[Request] = [*filled(random, A), fork(A, B, LENGTH - 1)]
    shared = 3 * SPEC.block_size - 2  # the page before the last one is A's too
    requests: list[Request] = [
        both(random, 1, (B, LENGTH - 1, 1)),
        both(random, 0, (B, shared, 4)),
        both(random, 1, (A, LENGTH, 1)),
    ]
    async with running() as run:
        await answer_together(run, requests, setup=setup)
        assert (0, B) not in [one for group in taken for one in group]


async def test_what_differs_in_kind_is_not_mixed(random: np.random.Generator, taken: list[Any]) -> None:
    setup = filled(random, A, B, C)
    requests: list[Request] = [
        both(random, 0, (A, LENGTH, 1)),
        both(random, 0, (B, LENGTH, 1), order="score", scores=True),
        both(random, 0, (C, LENGTH, 1), dtype="fp32"),
        both(random, 1, (A, LENGTH, 1), epoch=5),
        both(random, 1, (B, LENGTH, 5)),  # a prefill
    ]
    async with running() as run:
        await answer_together(run, requests, setup=setup)
        assert taken[0] == [(0, A)]


async def test_others_overtake_what_has_to_wait(random: np.random.Generator, taken: list[Any]) -> None:
    """A fork waits for a prefill of its parent: decodes of the two stay behind it, all others do not."""
    long = values(random, LENGTH, SPEC.num_index_heads, SPEC.head_dim)
    requests: list[Request] = [
        tokens(0, [(A, 0, LENGTH)], queries=long),
        fork(A, C, LENGTH),
        both(random, 1, (A, LENGTH, 1)),
        both(random, 1, (C, LENGTH, 1)),
        both(random, 1, (B, LENGTH, 1)),
    ]
    async with running() as run:
        await answer_together(run, requests, setup=filled(random, A, B))
        assert taken[0] == [(1, B)]


async def test_the_heads_of_several_ranks_share_a_read(random: np.random.Generator, taken: list[Any]) -> None:
    """One rank appends, and all select: one read of the keys for all."""
    rows = [(A, LENGTH, 1, 5)]
    queries = values(random, 1, SPEC.num_index_heads, SPEC.head_dim)
    requests: list[Request] = [
        tokens(0, rows, keys=keys_of(random, 1), queries=queries[:, :2]),
        tokens(0, rows, queries=queries[:, 2:], first_head=2),
    ]
    async with running() as run:
        await answer_together(run, requests, setup=filled(random, A))
        assert not taken
        assert [call.heads for call in run.backend.calls if call.phase == "decode"] == [SPEC.num_index_heads]


async def test_a_selection_that_waits_sees_what_is_taken(random: np.random.Generator, taken: list[Any]) -> None:
    async with running() as run:
        for request in filled(random, A, B):
            await run.ask(request)
        queries = values(random, 1, SPEC.num_index_heads, SPEC.head_dim)
        waiting = run.submit(tokens(0, [(A, LENGTH, 1, 5)], queries=queries, wait=True))
        await run.settled()
        await run.ask(both(random, 0, (B, LENGTH, 1)))
        assert not waiting.done()
        await run.ask(both(random, 0, (A, LENGTH, 1, 5)))
        await asyncio.wait_for(waiting, 5)
        assert taken == [[(0, B)], [(0, A)]]


async def test_a_group_has_no_more_spans_than_graphs_hold(random: np.random.Generator, taken: list[Any]) -> None:
    count = MAX_RUNS // 8
    names = range(1, 2 * 8 + 1)
    setup = filled(random, *names)
    rows = [[(sequence, LENGTH, 1) for sequence in names[:8]], [(sequence, LENGTH, 1) for sequence in names[8:]]]
    requests: list[Request] = [both(random, layer, *part) for layer in range(SPEC.num_layers) for part in rows]
    async with running() as run:
        await answer_together(run, requests, setup=setup)
        assert all(len(group) <= count for group in taken)
        assert sum(map(len, taken)) == len(requests)
