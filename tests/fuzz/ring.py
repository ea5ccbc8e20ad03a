"""Hostile slots in a ring of the real core, cache and loop, beside a tenant whose answers have to have a history."""

from __future__ import annotations

import collections
import itertools
import random
from dataclasses import dataclass, field

import numpy as np

from blockdex import _native as native
from blockdex.ring.handshake import new_link
from blockdex.ring.layout import REQUEST_STRUCT, RequestSlot
from blockdex.ring.server import ServerLink
from fuzz.inputs import NUMBERS, spoiled
from support.foreign_frontend import ForeignFrontend
from support.simulation import SIZES, TENANTS, Simulation, draw_request, simulated

_OF_A_SIMULATION = 400
_TENANT = TENANTS[1]
_FIELDS = tuple(name for name in RequestSlot._fields if name not in {"ticket", "deadline", "received"})


@dataclass
class Slots:
    """What became of hostile slots.

    Attributes:
        written: how many.
        broken: links that were ended for what was in theirs.
        outcomes: answers by code.
        compared: answers of the other tenant that were explained.
    """

    written: int = 0
    broken: int = 0
    outcomes: collections.Counter[int] = field(default_factory=collections.Counter)
    compared: int = 0


def run(count: int, seed: int) -> Slots:
    """Writes so many slots.

    Raises:
        AssertionError: the other tenant was answered wrong, or not at all, or the cache contradicts itself.
    """
    slots = Slots()
    with simulated():
        for number in itertools.count():
            if slots.written >= count:
                break
            simulation = Simulation(seed + number, tenants=TENANTS[:1])
            hostile = Hostile(simulation, slots, seed + number)
            try:
                for _ in range(_OF_A_SIMULATION):
                    hostile.write()
                    simulation.act()
                hostile.leave()
                simulation.settle()
                simulation.compare()
            except Exception as error:
                raise AssertionError(f"seed {seed + number} shows it again") from error
            finally:
                simulation.close()
            slots.compared += simulation.compared
    return slots


class Hostile:
    """A client that writes requests which are nearly right, and comes again when it is hung up on."""

    def __init__(self, simulation: Simulation, slots: Slots, seed: int) -> None:
        self._simulation = simulation
        self._slots = slots
        self._draw = random.Random(seed)
        self._numbers = np.random.default_rng(seed)
        self._ticket = 0
        self._come()

    def write(self) -> None:
        """One slot, and what it carries."""
        frontend, draw = self._frontend, self._draw
        while frontend.read(1):
            self._slots.outcomes[frontend.told.popitem()[1].numbers.code] += 1
        if self._is_broken:
            self._slots.broken += 1
            self.leave()
            self._come()
            return
        if not frontend.free:
            return
        self._ticket += 1
        request = draw_request(self._numbers, _TENANT, self._simulation.clients[0].hope)
        slot = frontend.lay(request, self._ticket if draw.random() < 0.98 else 1)
        if draw.random() < 0.6:
            self._spoil_payload(slot)
        if draw.random() < 0.4:
            slot = slot._replace(**{draw.choice(_FIELDS): draw.choice(NUMBERS) & 0x7F})
        packed = REQUEST_STRUCT.pack(*slot)
        if draw.random() < 0.2:
            packed = spoiled(draw, packed)[: len(packed)].ljust(len(packed), b"\0")
        frontend.write(packed)
        self._slots.written += 1

    def leave(self) -> None:
        """Goes, whatever is on its way."""
        self._simulation.drop(self._line)
        self._frontend.close()

    def _come(self) -> None:
        engine_side, handles = new_link(SIZES, self._simulation.epoch)
        self._frontend = ForeignFrontend(handles, clock=native.now)
        self._is_broken = False
        self._line = ServerLink(engine_side, self._break, lambda _: None)
        self._simulation.add(self._line)

    def _break(self, error: Exception) -> None:
        self._is_broken = True

    def _spoil_payload(self, slot: RequestSlot) -> None:
        """Another number somewhere behind the tenant: ids, starts, lengths, revisions, keys or queries."""
        arena, draw = self._frontend.arena, self._draw
        words = arena[slot.payload_offset : slot.payload_offset + slot.payload_bytes // 8 * 8].view(np.uint64)
        if len(words) > 1:
            words[draw.randrange(1, len(words))] = np.uint64(draw.choice(NUMBERS))
