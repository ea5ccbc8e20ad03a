"""Which sequences go once their lease is over: when pages run out, or since they are empty and many."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from blockdex.cache.sequence import Sequences


def are_idle(
    sequences: Sequences, entries: NDArray[np.intp] | slice, kept_since: float, now: float
) -> NDArray[np.bool_]:
    """Which of the entries are past their lease, and read by no prefill: bool `[N]`.

    Args:
        sequences: all open sequences.
        entries: some of theirs.
        kept_since: clock reading; sequences whose last call was not before it must stay, however short their lease.
        now: clock reading.
    """
    last_calls = sequences.last_calls[entries]
    idle = (now - last_calls >= sequences.leases[entries]) & (last_calls < kept_since)
    unread: NDArray[np.bool_] = idle & (sequences.reading_sequence[entries] == 0)
    return unread


def choose_victims(
    sequences: Sequences,
    readers: NDArray[np.int32],
    shortage: int,
    named: NDArray[np.intp],
    kept_since: float,
    now: float,
) -> tuple[list[int], int]:
    """Idle sequences past their lease that free enough pages, oldest last call first, none that is not needed.

    A page comes free with the last of its readers, so a sequence that shares all its pages with live ones frees none,
    and two idle ones that share with each other free theirs together.

    Args:
        sequences: all open sequences.
        readers: int32 `[num_pages]`, holders of each page that stay on it; counted down as sequences go.
        shortage: pages to free, at least 1.
        named: entries that must stay.
        kept_since: as for `are_idle`.
        now: clock reading.

    Returns:
        Entries to evict and the pages that this frees: fewer than `shortage` where all idle ones do not suffice.
    """
    evictable = are_idle(sequences, slice(None), kept_since, now) & (sequences.held > 0)
    evictable[named] = False
    idle = np.flatnonzero(evictable)
    victims: list[int] = []
    freed = 0
    for entry in idle[np.argsort(sequences.last_calls[idle], kind="stable")].tolist():
        pages = sequences.pages(entry)
        readers[pages] -= 1
        freed += int(np.count_nonzero(readers[pages] == 0))
        victims.append(entry)
        if freed >= shortage:
            break
    if freed < shortage:
        return victims, freed
    needed: list[int] = []
    for entry in reversed(victims):
        pages = sequences.pages(entry)
        kept = int(np.count_nonzero(readers[pages] == 0))
        if freed - kept < shortage:
            needed.append(entry)
        else:
            readers[pages] += 1
            freed -= kept
    return needed, freed
