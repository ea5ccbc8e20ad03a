"""The cache against a model that stores plain lists of keys, over long random runs of requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from blockdex.cache import IndexCache, PageCopy, Sequence
from blockdex.contract.errors import BlockdexError, Reason
from blockdex_kernels import IndexSpec
from support.admission import append as ask_append
from support.admission import select as ask_select
from support.cache_state import Clock, Name, PageStore, check_integrity, held_pages, page_table, snapshot, spans

SPEC = IndexSpec(num_layers=3, head_dim=1, block_size=4, topk=2, max_sequence_tokens=64)
NUM_PAGES = 10
DEFAULT_LEASE = 5.0

TENANTS = ("red", "blue")
IDS = (1, 2, 3, 2**64 - 1)
NAMES = list(product(TENANTS, IDS))
NTH = st.integers(0, len(NAMES) - 1)
LAYERS = st.integers(0, SPEC.num_layers - 1)
IDLE_SECONDS = st.sampled_from((0.0, 1.0, 1.0, 6.0, 40.0))
# Sequence, start from the layer's end, tokens, revision from the layer's (None: unchecked).
APPEND_ROWS = st.lists(
    st.tuples(
        NTH,
        st.sampled_from((0, 0, 0, -1, -3, -6, -12, 1)),
        st.integers(1, 9),
        st.sampled_from((None, None, 1, 1, 3, 0, -1)),
    ),
    min_size=1,
    max_size=4,
)
SELECT_ROWS = st.lists(
    st.tuples(
        NTH,
        st.sampled_from((-1, -1, -2, -5, -9, 0)),
        st.integers(1, 3),
        st.sampled_from((None, None, 0, 0, 0, 1, -1)),
    ),
    min_size=1,
    max_size=3,
)
Rows = list[tuple[int, int, int, int | None]]
Row = tuple[int, int, int, int]


@dataclass
class ModelSequence:
    """One sequence: a list of keys and a revision a layer."""

    layers: list[list[int]]
    revisions: list[int]
    lease: float
    last_call: float


@dataclass
class Effect:
    """What an append does to a sequence, in blocks: how many it has afterwards and which are written."""

    held: int
    written: range


def blocks(length: int) -> int:
    return -(-length // SPEC.block_size)


def pages_in_use(held: dict[Name, list[int]], effects: dict[Name, Effect], gone: set[Name], copies: int) -> int:
    """Pages in use once `gone` are evicted, then appends done one after another, then `copies` fresh pages taken."""
    tables = {name: pages for name, pages in held.items() if name not in gone}
    tables |= {name: tables[name][: effect.held] for name, effect in effects.items()}
    holders = Counter(page for pages in tables.values() for page in pages)
    fresh = copies
    for name, effect in effects.items():
        for page in tables[name][effect.written.start : effect.written.stop]:
            if holders[page] > 1:
                holders[page] -= 1
                fresh += 1
        fresh += effect.held - len(tables[name])
    return len(holders) + fresh


class CacheMachine(RuleBasedStateMachine):
    """Every request goes to the cache and to the model; keys are written to pages as an engine would."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.cache = IndexCache(SPEC, NUM_PAGES, default_lease_seconds=DEFAULT_LEASE, clock=self.clock)
        self.store = PageStore(NUM_PAGES, SPEC.num_layers, SPEC.block_size)
        self.model: dict[Name, ModelSequence] = {}
        self.evictions = 0
        self.next_key = 0
        self.rolls_back = True

    # Requests.

    @initialize()
    def start(self) -> None:
        for name in (("red", 1), ("red", 2), ("blue", 1)):
            self.model_open(*name, 0.0)

    @precondition(lambda self: len(self.model) < len(NAMES))
    @rule(nth=NTH, lease=st.sampled_from((0.0, 0.0, 2.0, 30.0)))
    def open(self, nth: int, lease: float) -> None:
        absent = [name for name in NAMES if name not in self.model]
        self.model_open(*absent[nth % len(absent)], lease)

    @precondition(lambda self: self.model)
    @rule(nth=NTH, length=st.sampled_from((99, 99, 12, 8, 7, 5, 4, 0)), idle=IDLE_SECONDS)
    def fork(self, nth: int, length: int, idle: float) -> None:
        self.clock.now += idle
        tenant, parent_id = parent = self.pick(nth)
        absent = [sequence_id for sequence_id in IDS if (tenant, sequence_id) not in self.model]
        if not absent:
            return
        child_id = absent[nth % len(absent)]
        ends = {min(len(keys), length) for keys in self.model[parent].layers}
        copies = len({end // SPEC.block_size for end in ends if end % SPEC.block_size})
        if not self.room({parent}, {}, copies):
            self.expect(Reason.OUT_OF_PAGES, lambda: self.cache.fork_sequence(tenant, parent_id, child_id, length))
            return
        held = held_pages(self.cache)
        state, page_copies = self.cache.fork_sequence(tenant, parent_id, child_id, length)
        assert len(page_copies) == copies
        self.store.copy(page_copies)
        self.settle_evictions(held, {parent}, {}, copies)
        layers = [keys[:length] for keys in self.model[parent].layers]
        lease = self.model[parent].lease
        self.model[tenant, child_id] = ModelSequence(layers, [0] * SPEC.num_layers, lease, self.clock.now)
        self.touch(parent)
        self.same(state, (tenant, child_id))

    @precondition(lambda self: self.model)
    @rule(nth=NTH, length=st.integers(0, 12))
    def truncate(self, nth: int, length: int) -> None:
        name = self.pick(nth)
        self.model[name].layers = [keys[:length] for keys in self.model[name].layers]
        self.same(self.cache.truncate_sequence(*name, length), name)
        self.touch(name)

    @rule(nth=NTH)
    def close(self, nth: int) -> None:
        before = snapshot(self.cache)
        self.cache.close_sequences(NAMES[nth][0], [NAMES[nth][1]])
        if self.model.pop(NAMES[nth], None) is None:
            assert snapshot(self.cache) == before

    @precondition(lambda self: self.model)
    @rule(nth=NTH)
    def get(self, nth: int) -> None:
        name = self.pick(nth)
        self.same(self.cache.get_sequence(*name), name)
        self.touch(name)

    @precondition(lambda self: self.model)
    @rule(layer=LAYERS, nth=NTH, count=st.integers(1, 12), idle=IDLE_SECONDS)
    def prefill(self, layer: int, nth: int, count: int, idle: float) -> None:
        self.clock.now += idle
        self.append(layer, [(nth, 0, count, None)], select=True)

    @precondition(lambda self: self.model)
    @rule(nth=NTH, back=st.integers(0, 2), count=st.integers(1, 3))
    def decode(self, nth: int, back: int, count: int) -> None:
        """One step of all sequences of a tenant in every layer, drafts rolled back."""
        for layer in range(SPEC.num_layers):
            if self.model:
                self.append(layer, [(nth, -back, count, 1)] * len(IDS), select=True)

    @precondition(lambda self: self.model)
    @rule(layer=LAYERS, rows=APPEND_ROWS, select=st.booleans(), rolls_back=st.booleans(), idle=IDLE_SECONDS)
    def append_any(self, layer: int, rows: Rows, select: bool, rolls_back: bool, idle: float) -> None:
        self.clock.now += idle
        self.rolls_back = rolls_back
        self.append(layer, rows, select=select)
        self.rolls_back = True

    def append(self, layer: int, rows: Rows, *, select: bool) -> None:
        tenant, request = self.resolve(layer, rows)
        named = {(tenant, row[0]) for row in request}
        reason = self.refusal_of_append(tenant, layer, request)
        applying = [] if reason else [row for row in request if self.applies(tenant, layer, row)]
        effects = {(tenant, row[0]): self.effect(tenant, layer, row) for row in applying}
        if reason is None and not self.room(named, effects, 0):
            reason = Reason.OUT_OF_PAGES
        if reason:
            self.expect(reason, lambda: self.ask(tenant, layer, request, select))
            return

        held = held_pages(self.cache)
        self.store.copy(self.ask(tenant, layer, request, select))
        self.settle_evictions(held, named, effects)
        table = page_table(self.cache, tenant, spans(*request))
        for row, pages in zip(request, table, strict=True):
            if row in applying:
                self.write(tenant, layer, row, pages)
        self.touch(*named)

    @precondition(lambda self: self.model)
    @rule(layer=LAYERS, rows=SELECT_ROWS)
    def select(self, layer: int, rows: Rows) -> None:
        tenant, request = self.resolve(layer, rows)
        reason = self.refusal_of_selection(tenant, layer, request)
        if reason:
            self.expect(reason, lambda: ask_select(self.cache, tenant, layer, *request))
            return
        ask_select(self.cache, tenant, layer, *request)
        self.touch(*((tenant, row[0]) for row in request))

    @rule(nth=NTH, layer=LAYERS)
    def misuse(self, nth: int, layer: int) -> None:
        """Opens what is open, asks for what the tenant does not hold; others may."""
        tenant, sequence_id = name = NAMES[nth]
        own = [sequence for owner, sequence in self.model if owner == tenant]
        if name in self.model:
            parent_id = own[0]
            if not any((*self.model[name].layers, *self.model[name].revisions)):
                self.cache.open_sequences(tenant, {sequence_id: 7.0})
                self.model[name].lease = 7.0
                self.touch(name)
            else:
                self.expect(Reason.SEQUENCE_EXISTS, lambda: self.cache.open_sequences(tenant, {99: 0, sequence_id: 0}))
            self.expect(Reason.SEQUENCE_EXISTS, lambda: self.cache.fork_sequence(tenant, parent_id, sequence_id, 0))
            return
        request = [*((sequence, 0, 1) for sequence in own), (sequence_id, 0, 1)]
        for call in (
            lambda: self.cache.get_sequence(tenant, sequence_id),
            lambda: self.cache.fork_sequence(tenant, sequence_id, 9, 8),
            lambda: self.cache.truncate_sequence(tenant, sequence_id, 0),
            lambda: ask_append(self.cache, tenant, layer, *request),
            lambda: ask_select(self.cache, tenant, layer, *request),
        ):
            self.expect(Reason.UNKNOWN_SEQUENCE, call)

    # What holds after every step.

    @invariant()
    def every_key_is_where_it_belongs(self) -> None:
        for (tenant, sequence_id), sequence in self.model.items():
            for layer, keys in enumerate(sequence.layers):
                if keys:
                    (table,) = page_table(self.cache, tenant, spans((sequence_id, 0, len(keys))))
                    assert self.store.read(table, layer, len(keys)) == keys

    @invariant()
    def the_counts_are_right(self) -> None:
        check_integrity(self.cache)
        assert set(held_pages(self.cache)) == set(self.model)
        assert self.cache.usage().evictions == self.evictions

    def teardown(self) -> None:
        for tenant, sequence_id in self.model:
            self.cache.close_sequences(tenant, [sequence_id])
        check_integrity(self.cache)
        usage = self.cache.usage()
        assert (usage.pages_used, usage.pages_shared, usage.sequences) == (0, 0, 0)

    # What the model expects, and how requests are made.

    def expect(self, reason: Reason, call: Callable[[], object]) -> None:
        """The call is refused for that reason and changes nothing."""
        before = snapshot(self.cache)
        with pytest.raises(BlockdexError) as refusal:
            call()
        assert refusal.value.reason == reason
        assert snapshot(self.cache) == before

    def ask(self, tenant: str, layer: int, request: list[Row], select: bool) -> list[PageCopy]:
        return ask_append(self.cache, tenant, layer, *request, rollback=self.rolls_back, select=select)

    def write(self, tenant: str, layer: int, row: Row, table: NDArray[np.int32]) -> None:
        """Writes keys never used before, to the pages and to the model."""
        sequence_id, start, count, revision = row
        sequence = self.model[tenant, sequence_id]
        keys = list(range(self.next_key, self.next_key + count))
        self.next_key += count
        self.store.write(table, layer, start, keys)
        sequence.layers[layer][start:] = keys
        sequence.revisions[layer] = revision or sequence.revisions[layer]

    def touch(self, *names: Name) -> None:
        for name in names:
            self.model[name].last_call = self.clock.now

    def pick(self, nth: int) -> Name:
        """One of the open sequences."""
        return sorted(self.model)[nth % len(self.model)]

    def resolve(self, layer: int, rows: Rows) -> tuple[str, list[Row]]:
        """Rows as a request has them, each for another sequence of the tenant whose the first one is."""
        tenant, _ = self.pick(rows[0][0])
        request = []
        ids = sorted(sequence_id for owner, sequence_id in self.model if owner == tenant)
        for (nth, start, count, step), _ in zip(rows, tuple(ids), strict=False):
            sequence_id = ids.pop(nth % len(ids))
            sequence = self.model[tenant, sequence_id]
            revision = 0 if step is None else max(sequence.revisions[layer] + step, 0)
            request.append((sequence_id, max(len(sequence.layers[layer]) + start, 0), count, revision))
        return tenant, request

    def model_open(self, tenant: str, sequence_id: int, lease: float) -> None:
        self.cache.open_sequences(tenant, {sequence_id: lease})
        layers: list[list[int]] = [[] for _ in range(SPEC.num_layers)]
        self.model[tenant, sequence_id] = ModelSequence(
            layers, [0] * SPEC.num_layers, lease or DEFAULT_LEASE, self.clock.now
        )

    def same(self, state: Sequence, name: Name) -> None:
        assert state.lengths.tolist() == [len(keys) for keys in self.model[name].layers]
        assert state.revisions.tolist() == self.model[name].revisions

    def revision(self, tenant: str, layer: int, row: Row) -> int:
        return self.model[tenant, row[0]].revisions[layer]

    def applies(self, tenant: str, layer: int, row: Row) -> bool:
        return row[3] == 0 or row[3] != self.revision(tenant, layer, row)

    def refusal_of_append(self, tenant: str, layer: int, request: list[Row]) -> Reason | None:
        if any(0 < row[3] < self.revision(tenant, layer, row) for row in request):
            return Reason.STALE_REVISION
        lengths = [len(self.model[tenant, row[0]].layers[layer]) for row in request]
        applies = [self.applies(tenant, layer, row) for row in request]
        for row, length, applied in zip(request, lengths, applies, strict=True):
            if not applied and row[1] + row[2] != length:
                return Reason.STALE_REVISION
        for row, length, applied in zip(request, lengths, applies, strict=True):
            if applied and row[1] > length:
                return Reason.APPEND_BEYOND_LENGTH
            if applied and row[1] < length and not row[3] and not self.rolls_back:
                return Reason.APPEND_OVERLAPS
        return None

    def refusal_of_selection(self, tenant: str, layer: int, request: list[Row]) -> Reason | None:
        state = {
            row[0]: (len(self.model[tenant, row[0]].layers[layer]), self.revision(tenant, layer, row))
            for row in request
        }
        if any(0 < revision < state[sequence_id][1] for sequence_id, _, _, revision in request):
            return Reason.STALE_REVISION
        if any(revision > state[sequence_id][1] for sequence_id, _, _, revision in request):
            return Reason.FUTURE_REVISION
        if any(start + count > state[sequence_id][0] for sequence_id, start, count, _ in request):
            return Reason.KEYS_NOT_APPENDED
        return None

    def effect(self, tenant: str, layer: int, row: Row) -> Effect:
        """Pages that nothing reaches any more are given back afterwards: they are of no use to the request itself."""
        sequence_id, start, count, _ = row
        longest = max(len(keys) for keys in self.model[tenant, sequence_id].layers)
        return Effect(blocks(max(longest, start + count)), range(start // SPEC.block_size, blocks(start + count)))

    def idle(self, named: set[Name]) -> set[Name]:
        """Sequences that may be evicted."""
        return {
            name
            for name, sequence in self.model.items()
            if name not in named and self.clock.now - sequence.last_call >= sequence.lease
        }

    def room(self, named: set[Name], effects: dict[Name, Effect], copies: int) -> bool:
        return pages_in_use(held_pages(self.cache), effects, self.idle(named), copies) <= NUM_PAGES

    def settle_evictions(
        self, held: dict[Name, list[int]], named: set[Name], effects: dict[Name, Effect], copies: int = 0
    ) -> None:
        """Checks that those which the last call evicted had to go, the oldest first, and takes them from the model."""
        gone = set(held) - set(held_pages(self.cache))
        idle = self.idle(named)
        assert gone <= idle, "evicted one that was named or within its lease"
        for name in gone:
            assert pages_in_use(held, effects, gone - {name}, copies) > NUM_PAGES, "evicted for nothing"
        if gone:
            youngest = max(self.model[name].last_call for name in gone)
            older = {name for name in idle if self.model[name].last_call < youngest}
            assert pages_in_use(held, effects, older, copies) > NUM_PAGES, "evicted a younger one than needed"
        for name in gone:
            del self.model[name]
        self.evictions += len(gone)


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=200, stateful_step_count=50, derandomize=True, deadline=None, database=None)
