"""What engines ask all the time, token after token: many such requests checked and entered as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from blockdex.cache import Cache
from blockdex.engine.entry import Entry, SequenceKey
from blockdex.messages import Keys, Queries, TokenRequest

Number = TypeVar("Number", bound=np.generic)

MAX_RUNS = 256
"""Most spans of a group: what CUDA graphs are captured for."""


@dataclass(frozen=True, slots=True)
class Decodes:
    """Requests that append to the ends of sequences, in pages that these have to themselves, and select for it.

    None of them names a layer of a sequence that another one does, so they may run in any order.

    Attributes:
        entries: the requests, each with its tokens.
        columns: int32 `[4, R]`: layers, starts, lengths and first rows of the page tables of their spans.
    """

    entries: list[tuple[Entry, int]]
    columns: NDArray[np.int32]

    @property
    def request(self) -> TokenRequest:
        """The first one; dtypes, heads, order and whether scores are wanted are the same for all."""
        return _request(self.entries[0][0])

    def keys(self) -> list[memoryview]:
        """Bytes of `[T, D]`, request after request."""
        return [_bytes(_request(entry).keys) for entry, _ in self.entries]

    def queries(self) -> list[memoryview]:
        """Bytes of `[T, H, D]`, request after request."""
        return [_bytes(_request(entry).queries) for entry, _ in self.entries]


def take_decodes(
    cache: Cache,
    backlog: Sequence[Entry],
    reading: Set[tuple[SequenceKey, int]],
    now: float,
    decode_queries: int,
) -> Decodes | None:
    """Enters those requests of a backlog that can run at once, as if they had come one after the other.

    Args:
        cache: whose books are changed.
        backlog: entries in order of arrival. The ones that are taken are noted as such, the others not touched.
        reading: the (sequence, layer) pairs that prefills read, to which nothing may be appended.
        now: `time.monotonic` seconds.
        decode_queries: a span of at most so many queries is decode.

    Returns:
        What to run; None where there is nothing of the kind.
    """
    alike = _apart(list(_alike(cache, backlog, reading, now)))
    if not alike:
        return None
    requests = [_request(entry) for entry, _ in alike]
    counts = [len(slots) for _, slots in alike]
    slots = _joined([slots for _, slots in alike])
    starts = _joined([request.spans.starts for request in requests])
    lengths = _joined([request.spans.lengths for request in requests])
    revisions = _joined([request.spans.revisions for request in requests])
    layers = np.repeat([request.layer for request in requests], counts)
    fits = cache.fits_in_place(layers, slots, starts, lengths, revisions)
    fits &= lengths <= decode_queries
    if not fits.all():
        ends: NDArray[np.int64] = np.cumsum(counts, dtype=np.int64)
        whole = np.logical_and.reduceat(fits, ends - np.array(counts))
        rows = np.repeat(whole, counts)
        alike = [one for one, fit in zip(alike, whole.tolist(), strict=True) if fit]
        slots, starts, lengths, revisions, layers = (
            column[rows] for column in (slots, starts, lengths, revisions, layers)
        )
        if not alike:
            return None
    columns = np.empty((4, len(slots)), np.int32)
    columns[0], columns[1], columns[2] = layers, starts, lengths
    columns[3] = cache.enter_in_place(layers, slots, starts + lengths, revisions)
    entries = []
    row = 0
    tokens = columns[2].tolist()
    for entry, own in alike:
        entry.taken = now
        entries.append((entry, sum(tokens[row : row + len(own)])))
        row += len(own)
    return Decodes(entries, columns)


def _alike(
    cache: Cache, backlog: Sequence[Entry], reading: Set[tuple[SequenceKey, int]], now: float
) -> Iterator[tuple[Entry, NDArray[np.intp]]]:
    """Entries that one launch can serve, each with the slots of its sequences; none overtakes one of its sequences."""
    first: tuple[object, ...] | None = None
    room = MAX_RUNS
    passed: set[SequenceKey] = set()
    for entry in backlog:
        kind = _kind(entry, cache.spec.num_index_heads)
        slots = None
        if kind is not None and kind == (first or kind) and not entry.cancelled and entry.deadline > now:
            slots = _free_slots(cache, entry, reading, passed)
        if slots is None or len(slots) > room:
            passed.update(entry.sequences)
            continue
        first = kind
        room -= len(slots)
        yield entry, slots


def _kind(entry: Entry, all_heads: int) -> tuple[object, ...] | None:
    """What requests of one launch have in common; None for one that does not append and select for all heads.

    One that holds some of the heads is for a batch, where it shares its read with those that hold the others.
    """
    request = entry.request
    if not isinstance(request, TokenRequest) or request.keys is None or request.queries is None:
        return None
    queries = request.queries
    if queries.num_heads != all_heads:
        return None
    return request.keys.tensor.dtype, queries.tensor.dtype, queries.order, queries.return_scores


def _free_slots(
    cache: Cache, entry: Entry, reading: Set[tuple[SequenceKey, int]], passed: Set[SequenceKey]
) -> NDArray[np.intp] | None:
    """Slots of a request's sequences; None where one is unknown, read by a prefill, or waited for by one before it."""
    request = _request(entry)
    if passed and not passed.isdisjoint(entry.sequences):
        return None
    if reading and any((sequence, request.layer) in reading for sequence in entry.sequences):
        return None
    return cache.known_slots(request.tenant, request.epoch, request.spans)


def _apart(alike: list[tuple[Entry, NDArray[np.intp]]]) -> list[tuple[Entry, NDArray[np.intp]]]:
    """Those before the first one that names a layer of a sequence that one before it does."""
    named: set[tuple[int, int]] = set()
    for number, (entry, slots) in enumerate(alike if len(alike) > 1 else ()):
        layer = _request(entry).layer
        own = {(layer, slot) for slot in slots.tolist()}
        if not named.isdisjoint(own):
            return alike[:number]
        named |= own
    return alike


def _joined(columns: Sequence[NDArray[Number]]) -> NDArray[Number]:
    return columns[0] if len(columns) == 1 else np.concatenate(columns)


def _request(entry: Entry) -> TokenRequest:
    assert isinstance(entry.request, TokenRequest)
    return entry.request


def _bytes(half: Keys | Queries | None) -> memoryview:
    assert half is not None
    return memoryview(half.tensor.data).cast("B")
