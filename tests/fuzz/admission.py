"""Slots of the ring as a coverage-guided fuzzer makes them: `python -m fuzz.admission [OPTIONS OF LIBFUZZER] CORPUS`.

The compiled module has to be one that clang has instrumented, with atheris in the process before it. An input is, time
and again, a slot of the ring, bytes of its arena, and how many turns the engine takes, and steps the device. What it
comes to is admitted by the real core; the cache must not contradict itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris
import numpy as np

from blockdex import _native as native
from blockdex.ring import layout
from blockdex.ring.handshake import new_link
from blockdex.ring.layout import REQUEST_STRUCT, RequestSlot, aligned
from blockdex.ring.server import ServerLink
from support.cache_state import check_integrity
from support.foreign_frontend import ForeignFrontend
from support.simulated_device import SPEC
from support.simulation import SIZES, FingerprintEngine, Simulation, draw_request, simulated

_ARENA_BYTES = 512
_OF_A_SIMULATION = 2000
_SLOT_BYTES = REQUEST_STRUCT.size
_RAW = 0xC0
"""From so many turns on a slot is taken as it is."""
_TENANT = "red"


def fitting(slot: RequestSlot) -> RequestSlot:
    """A slot whose parts take what it says: another one breaks the link, and nothing more comes of it."""
    slot = slot._replace(
        tenant_bytes=len(_TENANT),
        num_spans=slot.num_spans % 8,
        keys_bytes=slot.keys_bytes % 256,
        queries_bytes=slot.queries_bytes % 256,
        keys_region=0,
        queries_region=0,
    )
    columns = 8 + 32 * slot.num_spans
    if slot.kind != layout.TOKENS:
        return slot._replace(payload_bytes=8 + 16 * slot.num_spans)
    payload = aligned(columns) + aligned(slot.keys_bytes) + slot.queries_bytes
    return slot._replace(payload_bytes=payload if slot.keys_bytes or slot.queries_bytes else columns)


def write_seeds(folder: Path, count: int = 200) -> None:
    """Fills a folder with inputs that are right, a few requests in each, which a fuzzer begins with."""
    random, hope = np.random.default_rng(1), FingerprintEngine(SPEC, 1)
    engine_side, handles = new_link(SIZES, 1)
    for number in range(count):
        frontend = ForeignFrontend(handles)
        parts = []
        for _ in range(4):
            request = draw_request(random, _TENANT, hope)
            hope.answer(request)
            slot = frontend.lay(request, 1)
            carried = frontend.arena[slot.payload_offset :][:_ARENA_BYTES].tobytes()
            parts.append(REQUEST_STRUCT.pack(*slot) + bytes([2]) + carried)
        (folder / str(number)).write_bytes(b"".join(parts))
    for side in (engine_side, handles):
        side.close()


class Admission:
    """An engine that takes input after input, and now and then is made anew."""

    def __init__(self) -> None:
        self._count = 0
        self._begin()

    def __call__(self, data: bytes) -> None:
        """One input."""
        self._count += 1
        if self._count % _OF_A_SIMULATION == 0:
            self._simulation.close()
            self._frontend.close()
            self._begin()
        size = _SLOT_BYTES + 1 + _ARENA_BYTES
        for at in range(0, len(data), size):
            self._take(data[at : at + size])
        self._simulation.settle()
        check_integrity(self._simulation.engine._cache)
        assert self._simulation.engine._core.counts()["integrity_faults"] == 0
        self._read()

    def _take(self, data: bytes) -> None:
        self._read()
        if self._is_broken:
            self._simulation.drop(self._line)
            self._frontend.close()
            self._come()
        slot, steps, carried = data[:_SLOT_BYTES], data[_SLOT_BYTES : _SLOT_BYTES + 1], data[_SLOT_BYTES + 1 :]
        numbers = RequestSlot._make(REQUEST_STRUCT.unpack(slot.ljust(_SLOT_BYTES, b"\0")))
        self._ticket += 1
        now = round(1e9 * self._simulation.now)
        numbers = numbers._replace(ticket=self._ticket, received=now, deadline=now + 10**9, payload_offset=0)
        if steps and steps[0] < _RAW:
            numbers = fitting(numbers)
        self._frontend.arena[: len(carried)] = np.frombuffer(carried, np.uint8)
        self._frontend.write(REQUEST_STRUCT.pack(*numbers))
        for _ in range(steps[0] % 4 if steps else 1):
            self._simulation.turn()
            self._simulation.device.run_one()

    def _read(self) -> None:
        self._frontend.read()
        self._frontend.told.clear()

    def _begin(self) -> None:
        self._simulation = Simulation(self._count, tenants=())
        self._ticket = 0
        self._come()

    def _come(self) -> None:
        engine_side, handles = new_link(SIZES, self._simulation.epoch)
        self._frontend = ForeignFrontend(handles, clock=native.now)
        self._is_broken = False
        self._line = ServerLink(engine_side, self._break, lambda _: None)
        self._simulation.add(self._line)

    def _break(self, error: Exception) -> None:
        self._is_broken = True


def main() -> None:
    """Runs until it is told to stop, or an input ends it."""
    if not list((corpus := Path(sys.argv[-1])).iterdir()):
        write_seeds(corpus)
    with simulated():
        atheris.Setup(sys.argv, Admission())
        atheris.Fuzz()


if __name__ == "__main__":
    main()
