"""The overview of the cache against a recount, and from another thread while the cache changes."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from blockdex.cache import TABLE_ROW, IndexCache
from blockdex.contract.errors import ResourceExhaustedError
from blockdex.contract.messages import CacheOverview
from blockdex_kernels import IndexSpec
from support.admission import append
from support.cache_state import Clock, held_pages

SPEC = IndexSpec(num_layers=2, head_dim=1, block_size=4, topk=2, max_sequence_tokens=64)
LEASE = 10.0


def recount(cache: IndexCache, idle_names: set[tuple[str, int]]) -> dict[str, set[int]]:
    """Pages by state, one by one."""
    held = held_pages(cache)
    holders = Counter(page for pages in held.values() for page in pages)
    busy = {page for name, pages in held.items() if name not in idle_names for page in pages}
    return {
        "private": {page for page, count in holders.items() if count == 1 and page in busy},
        "shared": {page for page, count in holders.items() if count > 1 and page in busy},
        "idle": set(holders) - busy,
    }


def states(overview: CacheOverview) -> dict[str, list[int]]:
    return {name: getattr(overview, name).tolist() for name in ("private", "shared", "idle")}


@pytest.mark.parametrize("max_cells", (1, 3, 7, 40, 1000))
def test_every_page_is_in_the_state_that_a_recount_finds(max_cells: int) -> None:
    random = np.random.default_rng(max_cells)
    clock = Clock()
    cache = IndexCache(SPEC, 40, default_lease_seconds=LEASE, clock=clock)
    last_calls: dict[tuple[str, int], float] = {}
    seen = Counter[str]()
    for number in range(1, 120):
        clock.now += float(random.integers(0, 4))
        name = ("tenant", number)
        cache.open_sequences(name[0], {name[1]: 0})
        last_calls[name] = clock.now
        try:
            append(cache, "tenant", number % 2, (number, 0, int(random.integers(1, 20))))
            parent = int(random.choice([old for _, old in held_pages(cache)]))
            if random.random() < 0.5:
                cache.fork_sequence("tenant", parent, 1000 + number, 8)
                last_calls["tenant", parent] = last_calls["tenant", 1000 + number] = clock.now
            elif random.random() < 0.5:
                cache.close_sequences("tenant", [parent])
        except ResourceExhaustedError:
            cache.close_sequences(name[0], [name[1]])
        open_names = set(held_pages(cache))
        idle = {name for name in open_names if clock.now - last_calls[name] >= LEASE}
        expected = recount(cache, idle)
        overview = cache.overview(max_cells)
        assert overview.idle_sequences == len(idle)
        assert len(overview.private) <= max_cells
        for state, pages in expected.items():
            cells = [0] * -(-40 // overview.pages_per_cell)
            for page in pages:
                cells[page // overview.pages_per_cell] += 1
            assert states(overview)[state] == cells
            seen[state] += len(pages)
        usage = cache.usage()
        assert sum(map(sum, states(overview).values())) == usage.pages_used
        assert overview.pages_total == usage.pages_total
    assert min(seen.values()) > 20, seen


def test_lengths_are_those_of_the_longest_layer() -> None:
    cache = IndexCache(SPEC, 40)
    for sequence, (first, second) in enumerate([(0, 0), (1, 4), (5, 0), (8, 8), (0, 9), (64, 1)]):
        cache.open_sequences("tenant", {sequence: 0})
        for layer, tokens in enumerate((first, second)):
            if tokens:
                append(cache, "tenant", layer, (sequence, 0, tokens))
    overview = cache.overview(10)
    assert overview.length_bounds == (4, 8, 16, 32, 64)
    assert overview.lengths.tolist() == [2, 2, 1, 0, 1]
    assert overview.tokens == 4 + 5 + 8 + 9 + 64


def test_an_empty_cache() -> None:
    overview = IndexCache(SPEC, 3).overview(4096)
    assert (overview.pages_total, overview.pages_per_cell, overview.tokens, overview.idle_sequences) == (3, 1, 0, 0)
    assert states(overview) == {"private": [0] * 3, "shared": [0] * 3, "idle": [0] * 3}
    assert overview.lengths.sum() == 0


def test_from_another_thread_while_the_cache_changes() -> None:
    cache = IndexCache(SPEC, 3000, default_lease_seconds=1e-9)  # all are idle: the longest way round
    overviews: list[CacheOverview] = []
    failures: list[Exception] = []
    stop = threading.Event()

    def look() -> None:
        try:
            while not stop.is_set():
                overviews.append(cache.overview(100))
        except Exception as error:
            failures.append(error)

    looking = threading.Thread(target=look)
    looking.start()
    for number in range(1200):  # slots and page tables grow several times on the way
        cache.open_sequences("tenant", {number: 0})
        append(cache, "tenant", 0, (number, 0, 1 + number % 64))
        cache.fork_sequence("tenant", number, 10_000 + number, 30)
        if number % 3:
            cache.close_sequences("tenant", [number])
        if number > 100:
            cache.close_sequences("tenant", [10_000 + number - 100])
    stop.set()
    looking.join()
    assert not failures
    assert len(overviews) > 5
    for overview in overviews:
        pages = overview.private + overview.shared + overview.idle
        assert pages.min() >= 0 and pages.max() <= overview.pages_per_cell
        assert overview.lengths.sum() >= overview.idle_sequences


def test_a_slot_that_changes_hands_while_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long table was there, and a short one near the end of all tables is: its end is not the long one's."""
    spec = IndexSpec(num_layers=1, head_dim=1, block_size=4)
    cache = IndexCache(spec, 3000, default_lease_seconds=1e-9)
    cache.open_sequences("tenant", {0: 0})
    append(cache, "tenant", 0, (0, 0, 4 * 1000))
    tables = cache._sequences.tables
    while (tables._unused_row + 1) * TABLE_ROW < len(cache.table_cells):
        number = tables._unused_row
        cache.open_sequences("tenant", {number: 0})
        append(cache, "tenant", 0, (number, 0, 1))
    places = tables._places

    def held_up(*asked: Any) -> NDArray[np.intp]:
        monkeypatch.undo()
        cache.close_sequences("tenant", [0])
        cache.open_sequences("tenant", {1000: 0})
        append(cache, "tenant", 0, (1000, 0, 1))
        return places(*asked)

    monkeypatch.setattr(tables, "_places", held_up)
    pages = sum(map(sum, states(cache.overview(100)).values()))
    assert tables._places == places, "it was held up"
    assert pages == 1000 + len(cache._sequences) - 1
