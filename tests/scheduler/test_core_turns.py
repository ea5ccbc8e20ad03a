"""Tenants on one link: whose turn it is, what each may have of a step, of the queue, and of prefills."""

from __future__ import annotations

import time

import numpy as np
import pytest

from benchmarks.ring_messages import TokenRequest
from blockdex import _native as native
from blockdex.contract.errors import BlockdexError, Reason
from blockdex.ring.segment import Sizes
from blockdex.scheduler.prefill import Prefills
from support.bare_core import HELD, LENGTH, SPEC, BareCore, bare_core
from support.running_engine import TENANT, tokens, values

GREEDY, MODEST = TENANT, "modest"
SEQUENCES = 300
MODEST_LAYER = 2
MANY = Sizes(slots=512, request_bytes=1 << 20, answer_bytes=1 << 20)


def selection(layer: int, sequence: int, tenant: str = GREEDY) -> TokenRequest:
    queries = values(np.random.default_rng(sequence), 1, SPEC.num_index_heads, SPEC.head_dim)
    return tokens(layer, [(sequence, LENGTH - 1, 1)], queries=queries, tenant=tenant)


def add_modest(bare: BareCore) -> None:
    """A tenant with one sequence of as many tokens as all others."""
    held = bare.cache._sequences
    bare.cache.open_sequences(MODEST, {1: 0})
    entry = held.find(MODEST, 1)
    assert entry is not None
    held.set_pages(entry, 0, bare.cache._pool.allocate(HELD))
    held.lengths[:, entry] = LENGTH
    bare.core.set_sequence_columns(*bare.cache.sequence_columns)


def layers_of_step(bare: BareCore) -> list[int]:
    """Layers of the runs of the oldest step that was begun."""
    seen = bare.device.begun[0]
    return [int(layer) for layer, length in zip(seen.columns[0], seen.columns[2], strict=True) if length]


def test_tenants_take_turns_in_a_step() -> None:
    """One of them asks for more than a step holds, and the other one comes behind it on the same link."""
    with bare_core(sequences=SEQUENCES, num_pages=HELD * (SEQUENCES + 1), replays=[(native.MAX_RUNS, 2, 1000)]) as bare:
        add_modest(bare)
        frontend = bare.open_client(MANY)
        frontend.send(*[selection(0, sequence) for sequence in range(1, SEQUENCES + 1)])
        frontend.send(selection(MODEST_LAYER, 1, MODEST), first_ticket=SEQUENCES)
        bare.look()
        assert layers_of_step(bare).count(MODEST_LAYER) == 1


def test_a_slow_device_gets_less_of_each_tenant_while_several_ask() -> None:
    with bare_core(sequences=SEQUENCES, num_pages=HELD * (SEQUENCES + 1), replays=[(native.MAX_RUNS, 2, 1000)]) as bare:
        add_modest(bare)
        frontend = bare.open_client(MANY)
        frontend.send(selection(0, 1))
        bare.look()
        time.sleep(0.1)
        bare.device.end()
        bare.look()
        frontend.send(*[selection(0, sequence) for sequence in range(1, SEQUENCES + 1)], first_ticket=1)
        frontend.send(selection(MODEST_LAYER, 1, MODEST), first_ticket=1 + SEQUENCES)
        bare.look()
        first = layers_of_step(bare)
        # A selection costs 1 + 20 / 8 blocks; 256 of them are for one tenant, and what was begun.
        assert first.count(MODEST_LAYER) == 1 and first.count(0) == 74
        bare.device.end()
        for _ in range(12):
            bare.look()
            while bare.device.begun:
                bare.device.end()
        bare.look()
        frontend.read()
        assert len(frontend.told) == SEQUENCES + 2, "all of them are answered in the end"


def test_one_tenant_leaves_room_in_the_queue() -> None:
    with bare_core(max_queued=90, sequences=4, num_pages=HELD * 5) as bare:
        add_modest(bare)
        frontend = bare.open_client(MANY)
        waiting = tokens(0, [(1, LENGTH, 1)], queries=values(np.random.default_rng(1), 1, 2, 8), wait=True)
        frontend.send(*[waiting for _ in range(90)])
        bare.look()
        frontend.read()
        refused = {ticket: told.answer for ticket, told in frontend.told.items()}
        assert sorted(refused) == list(range(80, 90)), "of eighty more than eight times what is left"
        for error in refused.values():
            assert isinstance(error, BlockdexError) and error.reason == Reason.OVERLOADED
            assert error.message == "queue: of 90 requests that may wait 80 do, and the tenant's share is used up"
        frontend.send(selection(MODEST_LAYER, 1, MODEST), first_ticket=90)
        for _ in range(3):
            bare.look()
            if bare.device.begun:
                bare.device.end()
        frontend.read()
        assert not isinstance(frontend.told[90].answer, BlockdexError)


@pytest.mark.parametrize(
    ("weights", "turns"), [((1.0, 1.0), "abababab"), ((2.0, 1.0), "aabaabaa"), ((0.5, 1.0), "babbabba")]
)
def test_prefills_of_tenants_take_turns_by_weight(weights: tuple[float, float], turns: str) -> None:
    class Reading:
        def __init__(self, tenant: int) -> None:
            self.first = self
            self.tenant = tenant

    class Part:
        def __init__(self, tenant: int) -> None:
            self.reading = Reading(tenant)

    prefills = Prefills(lambda tenant: weights[tenant])
    for _ in range(8):
        for tenant in (0, 1):
            prefills.add(Part(tenant))  # type: ignore[arg-type] # what it needs of one
    taken = "".join("ab"[prefills.pop().reading.first.tenant] for _ in range(8))
    assert taken == turns
