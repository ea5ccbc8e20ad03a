"""The open sequences: pages, per-layer lengths and revisions, lease."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blockdex.cache.page_table import PageTables

_FIRST_SLOTS = 64
_MOST_FOUND = 64
"""Lists of sequences whose slots are remembered: an engine names the same ones for every layer and every token."""


@dataclass(frozen=True, slots=True)
class Sequence:
    """What a sequence held when it was asked for: `lengths` int64 `[L]` and `revisions` uint64 `[L]`."""

    lengths: NDArray[np.int64]
    revisions: NDArray[np.uint64]


class Sequences:
    """The open sequences of all tenants as columns, so that a request of many rows costs a few array operations.

    A sequence keeps one of S slots from open to close; S doubles as needed.

    Attributes:
        lengths: int64 `[L, S]`, tokens.
        revisions: uint64 `[L, S]`.
        held: int64 `[S]`, pages: as many as the longest layer reaches.
        tables: page of each block of each slot, 0 from `held` on.
        forked: int64 `[S]`, blocks up to the last page that a fork shared: pages behind them never were.
        last_calls: float64 `[S]`, clock reading of the last call that succeeded.
        leases: float64 `[S]`, seconds.
        generations: uint32 `[S]`, how often a slot was given back: whoever remembers one sees that it is another's now.
    """

    def __init__(self, num_layers: int) -> None:
        self.lengths: NDArray[np.int64] = np.zeros((num_layers, _FIRST_SLOTS), np.int64)
        self.revisions: NDArray[np.uint64] = np.zeros((num_layers, _FIRST_SLOTS), np.uint64)
        self.held: NDArray[np.int64] = np.zeros(_FIRST_SLOTS, np.int64)
        self.tables = PageTables(_FIRST_SLOTS)
        self.forked: NDArray[np.int64] = np.zeros(_FIRST_SLOTS, np.int64)
        self.last_calls: NDArray[np.float64] = np.zeros(_FIRST_SLOTS, np.float64)
        self.leases: NDArray[np.float64] = np.zeros(_FIRST_SLOTS, np.float64)
        self.generations: NDArray[np.uint32] = np.zeros(_FIRST_SLOTS, np.uint32)
        self._free = list(reversed(range(_FIRST_SLOTS)))
        self._slots: dict[str, dict[int, int]] = {}
        self._names: dict[int, tuple[str, int]] = {}
        self._found: dict[tuple[str, bytes], NDArray[np.intp]] = {}

    def __len__(self) -> int:
        return len(self._names)

    def slots(self, tenant: str, sequence_ids: NDArray[np.uint64]) -> NDArray[np.intp]:
        """Slots of sequences `[N]`.

        Raises:
            KeyError: the tenant holds no sequence of the id that is the key.
        """
        asked = tenant, sequence_ids.tobytes()
        found = self._found.get(asked)
        if found is None:
            slots = self._slots.get(tenant, {})
            found = np.fromiter(map(slots.__getitem__, sequence_ids.tolist()), np.intp, len(sequence_ids))
            if len(self._found) >= _MOST_FOUND:
                self._found.clear()
            found.flags.writeable = False
            self._found[asked] = found
        return found

    def slot(self, tenant: str, sequence_id: int) -> int | None:
        """Slot of one sequence, None where the tenant holds no such one."""
        return self._slots.get(tenant, {}).get(sequence_id)

    def is_open(self, slot: int) -> bool:
        """Whether a slot is a sequence's."""
        return slot in self._names

    def open_slots(self) -> NDArray[np.intp]:
        """Slots of all open sequences; also from another thread, since a list of a dict is made in one step."""
        return np.array(list(self._names), np.intp)

    def pages(self, slot: int) -> NDArray[np.int32]:
        """Pages of a sequence `[held]`."""
        return self.tables.get(slot, np.arange(self.held[slot]))

    def state(self, slot: int) -> Sequence:
        """Lengths and revisions as of now."""
        return Sequence(self.lengths[:, slot].copy(), self.revisions[:, slot].copy())

    def add(self, tenant: str, sequence_id: int, lease: float, now: float) -> int:
        """Opens an empty sequence, whose id the tenant does not have open, and answers its slot."""
        if not self._free:
            self._double_slots()
        slot = self._free.pop()
        self._slots.setdefault(tenant, {})[sequence_id] = slot
        self._names[slot] = (tenant, sequence_id)
        self.leases[slot] = lease
        self.last_calls[slot] = now
        return slot

    def remove(self, slot: int) -> None:
        """Closes a sequence; its pages are the caller's to release, before."""
        tenant, sequence_id = self._names.pop(slot)
        self._found.clear()
        del self._slots[tenant][sequence_id]
        if not self._slots[tenant]:
            del self._slots[tenant]
        self.lengths[:, slot] = 0
        self.revisions[:, slot] = 0
        self.set_pages(slot, 0, np.zeros(0, np.int32))
        self.forked[slot] = 0
        self.generations[slot] += np.uint32(1)
        self._free.append(slot)

    def set_pages(self, slot: int, block: int, pages: NDArray[np.int32]) -> None:
        """Makes `pages` all that a page table holds from `block` on."""
        held = block + len(pages)
        self.tables.resize(slot, int(self.held[slot]), held)
        self.tables.set(slot, np.arange(block, held), pages)
        self.held[slot] = held

    def _double_slots(self) -> None:
        old = len(self.held)
        self.lengths = np.pad(self.lengths, ((0, 0), (0, old)))
        self.revisions = np.pad(self.revisions, ((0, 0), (0, old)))
        self.held = np.pad(self.held, (0, old))
        self.tables.double_slots()
        self.forked = np.pad(self.forked, (0, old))
        self.last_calls = np.pad(self.last_calls, (0, old))
        self.leases = np.pad(self.leases, (0, old))
        self.generations = np.pad(self.generations, (0, old))
        self._free = list(reversed(range(old, 2 * old)))
