"""Everything that the cache refuses: code, reason, words, and that nothing changed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest

from blockdex.cache import IndexCache
from blockdex.contract.errors import BlockdexError, Code, Reason, ResourceExhaustedError
from blockdex_kernels import IndexSpec
from support.admission import append, select
from support.cache_state import Clock, snapshot

SPEC = IndexSpec(num_layers=4, head_dim=1, block_size=4, topk=2, max_sequence_tokens=4096)
UNKNOWN = "(never opened, closed, or evicted)"


@pytest.fixture
def cache() -> IndexCache:
    """Eight pages, three of them free: sequences 7 (layer 3: 5 tokens, revision 5) and 8 (layer 3: 9 tokens)."""
    cache = IndexCache(SPEC, 8, max_lease_seconds=100, default_lease_seconds=100, clock=Clock())
    cache.open_sequences("red", {7: 0})
    cache.open_sequences("red", {8: 0})
    cache.open_sequences("blue", {9: 0})
    append(cache, "red", 3, (7, 0, 5, 5), (8, 0, 9))
    return cache


REFUSALS: dict[str, tuple[Callable[[IndexCache], object], Code, Reason, str]] = {
    "open with too long a lease": (
        lambda cache: cache.open_sequences("red", {1: 100, 2: 101}),
        Code.INVALID_ARGUMENT,
        Reason.INVALID_SPANS,
        "sequence 2: lease_seconds must be at most 100, got 101",
    ),
    "open twice": (
        lambda cache: cache.open_sequences("red", {7: 0}),
        Code.ALREADY_EXISTS,
        Reason.SEQUENCE_EXISTS,
        "sequence 7: open already",
    ),
    "get unknown": (
        lambda cache: cache.get_sequence("red", 6),
        Code.NOT_FOUND,
        Reason.UNKNOWN_SEQUENCE,
        f"sequence 6: unknown {UNKNOWN}",
    ),
    "get another tenant's": (
        lambda cache: cache.get_sequence("blue", 7),
        Code.NOT_FOUND,
        Reason.UNKNOWN_SEQUENCE,
        f"sequence 7: unknown {UNKNOWN}",
    ),
    "fork unknown": (
        lambda cache: cache.fork_sequence("red", 6, 10, 4),
        Code.NOT_FOUND,
        Reason.UNKNOWN_SEQUENCE,
        f"sequence 6: unknown {UNKNOWN}",
    ),
    "fork unknown to open": (
        lambda cache: cache.fork_sequence("red", 6, 7, 4),
        Code.NOT_FOUND,
        Reason.UNKNOWN_SEQUENCE,
        f"sequence 6: unknown {UNKNOWN}",
    ),
    "fork another tenant's": (
        lambda cache: cache.fork_sequence("blue", 7, 10, 4),
        Code.NOT_FOUND,
        Reason.UNKNOWN_SEQUENCE,
        f"sequence 7: unknown {UNKNOWN}",
    ),
    "fork to open": (
        lambda cache: cache.fork_sequence("red", 7, 8, 4),
        Code.ALREADY_EXISTS,
        Reason.SEQUENCE_EXISTS,
        "sequence 8: open already",
    ),
    "fork to itself": (
        lambda cache: cache.fork_sequence("red", 7, 7, 4),
        Code.ALREADY_EXISTS,
        Reason.SEQUENCE_EXISTS,
        "sequence 7: open already",
    ),
    "truncate unknown": (
        lambda cache: cache.truncate_sequence("red", 6, 0),
        Code.NOT_FOUND,
        Reason.UNKNOWN_SEQUENCE,
        f"sequence 6: unknown {UNKNOWN}",
    ),
    "truncate another tenant's": (
        lambda cache: cache.truncate_sequence("blue", 7, 0),
        Code.NOT_FOUND,
        Reason.UNKNOWN_SEQUENCE,
        f"sequence 7: unknown {UNKNOWN}",
    ),
    "append to unknown": (
        lambda cache: append(cache, "red", 3, (8, 9, 1), (2**64 - 1, 0, 1)),
        Code.NOT_FOUND,
        Reason.UNKNOWN_SEQUENCE,
        f"sequence {2**64 - 1}: unknown {UNKNOWN}",
    ),
    "append to another tenant's": (
        lambda cache: append(cache, "red", 3, (8, 9, 1), (9, 0, 1)),
        Code.NOT_FOUND,
        Reason.UNKNOWN_SEQUENCE,
        f"sequence 9: unknown {UNKNOWN}",
    ),
    "append of a tenant without sequences": (
        lambda cache: append(cache, "green", 3, (7, 0, 1)),
        Code.NOT_FOUND,
        Reason.UNKNOWN_SEQUENCE,
        f"sequence 7: unknown {UNKNOWN}",
    ),
    "append with a stale revision": (
        lambda cache: append(cache, "red", 3, (8, 9, 1), (7, 5, 1, 4)),
        Code.ABORTED,
        Reason.STALE_REVISION,
        "sequence 7, layer 3: append has revision 4, the layer is at 5",
    ),
    "append beyond the length": (
        lambda cache: append(cache, "red", 3, (8, 9, 1), (7, 300, 1)),
        Code.OUT_OF_RANGE,
        Reason.APPEND_BEYOND_LENGTH,
        "sequence 7, layer 3: append starts at 300, length is 5",
    ),
    "append beyond the length, one off, with a revision": (
        lambda cache: append(cache, "red", 3, (7, 6, 1, 6)),
        Code.OUT_OF_RANGE,
        Reason.APPEND_BEYOND_LENGTH,
        "sequence 7, layer 3: append starts at 6, length is 5",
    ),
    "append beyond the length of another layer": (
        lambda cache: append(cache, "red", 2, (7, 1, 1)),
        Code.OUT_OF_RANGE,
        Reason.APPEND_BEYOND_LENGTH,
        "sequence 7, layer 2: append starts at 1, length is 0",
    ),
    "append out of pages": (
        lambda cache: append(cache, "red", 3, (7, 5, 16)),
        Code.RESOURCE_EXHAUSTED,
        Reason.OUT_OF_PAGES,
        "sequence 7, layer 3: append is out of pages: 4 needed, 3 free, 0 evictable, 8 in all",
    ),
    "append of two rows out of pages": (
        lambda cache: append(cache, "red", 3, (7, 5, 8), (8, 9, 8)),
        Code.RESOURCE_EXHAUSTED,
        Reason.OUT_OF_PAGES,
        "2 sequences, layer 3: append is out of pages: 4 needed, 3 free, 0 evictable, 8 in all",
    ),
    "select of unknown": (
        lambda cache: select(cache, "red", 3, (8, 8, 1), (6, 0, 1)),
        Code.NOT_FOUND,
        Reason.UNKNOWN_SEQUENCE,
        f"sequence 6: unknown {UNKNOWN}",
    ),
    "select of another tenant's": (
        lambda cache: select(cache, "blue", 3, (7, 0, 1)),
        Code.NOT_FOUND,
        Reason.UNKNOWN_SEQUENCE,
        f"sequence 7: unknown {UNKNOWN}",
    ),
    "select with a stale revision": (
        lambda cache: select(cache, "red", 3, (8, 8, 1), (7, 4, 1, 4)),
        Code.ABORTED,
        Reason.STALE_REVISION,
        "sequence 7, layer 3: selection has revision 4, the layer is at 5",
    ),
    "select with a future revision": (
        lambda cache: select(cache, "red", 3, (8, 8, 1), (7, 4, 1, 6)),
        Code.ABORTED,
        Reason.FUTURE_REVISION,
        "sequence 7, layer 3: selection has revision 6, the layer is at 5",
    ),
    "select with a revision where the layer has none": (
        lambda cache: select(cache, "red", 3, (8, 8, 1, 1)),
        Code.ABORTED,
        Reason.FUTURE_REVISION,
        "sequence 8, layer 3: selection has revision 1, the layer is at 0",
    ),
    "select what is not appended": (
        lambda cache: select(cache, "red", 3, (8, 8, 1), (7, 4, 2)),
        Code.FAILED_PRECONDITION,
        Reason.KEYS_NOT_APPENDED,
        "sequence 7, layer 3: selection ends at 6, length is 5",
    ),
    "select in a layer that is empty": (
        lambda cache: select(cache, "red", 0, (7, 0, 1)),
        Code.FAILED_PRECONDITION,
        Reason.KEYS_NOT_APPENDED,
        "sequence 7, layer 0: selection ends at 1, length is 0",
    ),
    # What can never succeed is said before what may yet, whichever row it is in.
    "unknown before stale": (
        lambda cache: append(cache, "red", 3, (7, 5, 1, 4), (6, 0, 1)),
        Code.NOT_FOUND,
        Reason.UNKNOWN_SEQUENCE,
        f"sequence 6: unknown {UNKNOWN}",
    ),
    "stale before a gap": (
        lambda cache: append(cache, "red", 3, (8, 99, 1), (7, 5, 1, 4)),
        Code.ABORTED,
        Reason.STALE_REVISION,
        "sequence 7, layer 3: append has revision 4, the layer is at 5",
    ),
    "a gap before out of pages": (
        lambda cache: append(cache, "red", 3, (8, 9, 400), (7, 6, 1)),
        Code.OUT_OF_RANGE,
        Reason.APPEND_BEYOND_LENGTH,
        "sequence 7, layer 3: append starts at 6, length is 5",
    ),
    "unknown before a future revision": (
        lambda cache: select(cache, "red", 3, (7, 0, 1, 6), (6, 0, 1)),
        Code.NOT_FOUND,
        Reason.UNKNOWN_SEQUENCE,
        f"sequence 6: unknown {UNKNOWN}",
    ),
    "stale before a future revision": (
        lambda cache: select(cache, "red", 3, (8, 0, 1, 1), (7, 0, 1, 4)),
        Code.ABORTED,
        Reason.STALE_REVISION,
        "sequence 7, layer 3: selection has revision 4, the layer is at 5",
    ),
    "stale before missing keys": (
        lambda cache: select(cache, "red", 3, (8, 99, 1), (7, 0, 1, 4)),
        Code.ABORTED,
        Reason.STALE_REVISION,
        "sequence 7, layer 3: selection has revision 4, the layer is at 5",
    ),
    "a future revision before missing keys": (
        lambda cache: select(cache, "red", 3, (8, 99, 1), (7, 0, 1, 6)),
        Code.ABORTED,
        Reason.FUTURE_REVISION,
        "sequence 7, layer 3: selection has revision 6, the layer is at 5",
    ),
}


@pytest.mark.parametrize(("call", "code", "reason", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusal(
    cache: IndexCache, call: Callable[[IndexCache], object], code: Code, reason: Reason, message: str
) -> None:
    before = snapshot(cache)
    with pytest.raises(BlockdexError) as refusal:
        call(cache)
    assert (refusal.value.code, refusal.value.reason, refusal.value.message) == (code, reason, message)
    assert snapshot(cache) == before


def test_fork_out_of_pages(cache: IndexCache) -> None:
    append(cache, "red", 3, (8, 9, 15))
    before = snapshot(cache)
    with pytest.raises(BlockdexError) as refusal:
        cache.fork_sequence("red", 7, 10, 3)
    assert (refusal.value.code, refusal.value.reason) == (Code.RESOURCE_EXHAUSTED, Reason.OUT_OF_PAGES)
    assert refusal.value.message == (
        "sequence 10: fork of sequence 7 is out of pages: 1 needed, 0 free, 0 evictable, 8 in all"
    )
    assert snapshot(cache) == before


def test_every_cache_has_another_epoch(cache: IndexCache) -> None:
    assert 0 < cache.epoch < 2**64
    assert IndexCache(SPEC, 8).epoch != cache.epoch


def test_refused_calls_do_not_refresh_the_lease() -> None:
    clock = Clock()
    cache = IndexCache(SPEC, 2, default_lease_seconds=10, clock=clock)
    cache.open_sequences("red", {1: 0})
    cache.open_sequences("red", {2: 0})
    append(cache, "red", 0, (1, 0, 5))
    clock.now = 10.0
    for call in (
        lambda: append(cache, "red", 0, (1, 6, 1)),
        lambda: append(cache, "red", 0, (1, 0, 9)),
        lambda: select(cache, "red", 0, (1, 5, 1)),
        lambda: cache.fork_sequence("red", 1, 2, 4),
        lambda: cache.fork_sequence("red", 1, 3, 5),
        lambda: cache.open_sequences("red", {1: 0}),
    ):
        with pytest.raises(BlockdexError):
            call()
    append(cache, "red", 0, (2, 0, 1))
    with pytest.raises(BlockdexError, match="sequence 1: unknown"):
        cache.get_sequence("red", 1)


def test_a_tenant_has_so_many_sequences_open() -> None:
    clock = Clock()
    cache = IndexCache(SPEC, 8, default_lease_seconds=10, max_tenant_sequences=3, clock=clock)
    cache.open_sequences("a", {1: 0, 2: 0})
    words = "sequences: a tenant may have 3 open, it has 2 and asks for 2 more"
    with pytest.raises(ResourceExhaustedError, match=words):
        cache.open_sequences("a", {1: 0, 3: 0, 4: 0})
    assert len(cache._sequences) == 2, "all or none"
    cache.fork_sequence("a", 1, 3, 0)
    with pytest.raises(ResourceExhaustedError, match="it has 3 and asks for 1 more"):
        cache.fork_sequence("a", 1, 4, 0)
    cache.open_sequences("b", {1: 0, 2: 0, 3: 0})
    cache.open_sequences("a", {1: 0, 2: 0, 3: 0})
    cache.close_sequences("a", [2])
    cache.open_sequences("a", {4: 0})
    # Those that nobody used within their lease make room, a few looked at each time that somebody asks.
    clock.now += 11
    cache.begin_batch()
    for _ in range(64):
        with contextlib.suppress(ResourceExhaustedError):
            cache.open_sequences("a", {5: 0, 6: 0, 7: 0})
            break
    assert cache._sequences.counts["a"] == 3
    assert cache.get_sequence("a", 7).lengths.max() == 0
