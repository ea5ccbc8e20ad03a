"""What a client knows of one epoch of a server: above all, how long it made each layer of each sequence."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from blockdex.client.answers import Info
from blockdex.contract.errors import FailedPreconditionError, NotFoundError, Reason

_WRITES, _IN_FLIGHT, _IN_A_ROW, _MEMBERS = range(1, 5)
_UNKNOWN = -1
_OVERLAPPED = -1
_NOWHERE = -2


class _Layers:
    """One sequence, by layer: its length, how many writes were begun so far, how many are in flight, whether in a row.

    Writes that overlap are in a row where each one starts at the end of the one before: the server can take them in no
    other order. Of others nobody knows which one it takes last, so that the length is unknown from then on.
    """

    __slots__ = ("_numbers",)

    def __init__(self, lengths: list[int]) -> None:
        # Side by side, since a call touches all four of a layer, and so many layers are in no cache by then.
        self._numbers = [number for length in lengths for number in (length, 0, 0, 0)]

    def length(self, layer: int) -> int:
        return self._numbers[_MEMBERS * layer]

    def put(self, layer: int, length: int) -> None:
        self._numbers[_MEMBERS * layer] = length

    def begin(self, layer: int, start: int, length: int) -> tuple[_Layers, int, int]:
        """A write from there has begun that makes the layer so long: itself, its length before, the write's number."""
        numbers, at = self._numbers, _MEMBERS * layer
        before, alone = numbers[at], numbers[at + _IN_FLIGHT] == 0
        in_a_row = start == before and (alone or bool(numbers[at + _IN_A_ROW]))
        numbers[at] = length if alone or in_a_row else _UNKNOWN
        numbers[at + _WRITES] += 1
        numbers[at + _IN_FLIGHT] += 1
        numbers[at + _IN_A_ROW] = int(in_a_row)
        return self, before, numbers[at + _WRITES]

    def end(self, layer: int) -> None:
        """A write has ended."""
        self._numbers[_MEMBERS * layer + _IN_FLIGHT] -= 1

    def undo(self, layer: int, before: int, number: int) -> None:
        """A write that has ended changed nothing: all is as it was before, unless there was another one since."""
        numbers, at = self._numbers, _MEMBERS * layer
        if number != numbers[at + _WRITES]:
            self.lose(layer)
            return
        numbers[at] = before
        numbers[at + _WRITES] -= 1

    def lose(self, layer: int) -> None:
        """The length is unknown, whatever is undone later."""
        self._numbers[_MEMBERS * layer] = _UNKNOWN
        self._numbers[_MEMBERS * layer + _WRITES] += 1

    def writes(self) -> list[int]:
        return self._numbers[_WRITES::_MEMBERS]

    def in_flight(self) -> list[int]:
        return self._numbers[_IN_FLIGHT::_MEMBERS]


@dataclass(slots=True)
class Append:
    """An append in flight. The ledger counts it from its beginning, so that the next one follows it.

    Attributes:
        changes: `[N]`, each sequence with its length before and the write's number; empty once the append has ended.
        starts: `[N]`, where each run goes.
    """

    layer: int
    changes: list[tuple[_Layers, int, int]]
    starts: list[int]


@dataclass(slots=True)
class Watch:
    """A request on a whole sequence in flight.

    Attributes:
        layers: of the sequence, though it may be closed meanwhile; None where nothing was known of it.
        writes: `[L]`, writes begun up to it, `_OVERLAPPED` where one was still in flight.
    """

    sequence: int
    layers: _Layers | None
    writes: list[int]


class Ledger:
    """Lengths by sequence and layer, as this client's own calls made them. Safe to share between threads.

    A length is unknown for a sequence that this client did not open, after a write of unknown outcome, and after writes
    that overlapped in time without each starting where the one before ends; until the server was asked, or an append
    that overlaps no other named its own start.

    Attributes:
        info: the server's answer to GetInfo.
        over: whether the server has said that its epoch is another one.
    """

    def __init__(self, info: Info) -> None:
        self.info = info
        self.over = False
        # None is for one that the server has evicted.
        self._sequences: dict[int, _Layers | None] = {}
        self._lock = threading.Lock()

    def open(self, sequence: int, lengths: Sequence[int]) -> None:
        """Takes up a sequence of known lengths."""
        with self._lock:
            self._sequences[sequence] = _Layers(list(lengths))

    def close(self, sequence: int) -> None:
        """Lets go of a sequence; finalizers may, which the collector runs wherever it likes.

        So it takes no lock, which their own thread may hold: a dict's `pop` is one step, and whoever is in the middle
        of something keeps the layers that they have found.
        """
        self._sequences.pop(sequence, None)

    def evict(self, sequences: Iterable[int]) -> None:
        """Forgets the lengths of sequences that the server has evicted; without a lock, as `close`."""
        for sequence in sequences:
            if sequence in self._sequences:
                self._sequences[sequence] = None

    def last_positions(self, layer: int, sequences: list[int], lengths: list[int]) -> list[int]:
        """Where the last `lengths[i]` positions of each sequence start.

        Raises:
            FailedPreconditionError: a length is unknown (OUTCOME_UNKNOWN).
            NotFoundError: a sequence was evicted (UNKNOWN_SEQUENCE).
        """
        with self._lock:
            return [self._length(sequence, layer) - rows for sequence, rows in zip(sequences, lengths, strict=False)]

    def begin_append(self, layer: int, sequences: list[int], lengths: list[int], starts: list[int] | None) -> Append:
        """Counts an append that is about to be sent; without starts it goes to the ends of the sequences.

        Raises:
            FailedPreconditionError: starts are left out and a length is unknown (OUTCOME_UNKNOWN).
            NotFoundError: starts are left out and a sequence was evicted (UNKNOWN_SEQUENCE).
        """
        with self._lock:
            if starts is None:
                starts = [self._length(sequence, layer) for sequence in sequences]
            known = self._sequences
            changes = [
                (known.get(sequence) or self._layers(sequence)).begin(layer, start, start + rows)
                for sequence, start, rows in zip(sequences, starts, lengths, strict=False)
            ]
        return Append(layer, changes, starts)

    def end_append(self, append: Append) -> None:
        """The append took effect."""
        with self._lock:
            for layers, _, _ in append.changes:
                layers.end(append.layer)
            append.changes = []

    def fail_append(self, append: Append, changed_nothing: bool) -> None:
        """The append failed: lengths are what they were where that is certain, else unknown."""
        layer = append.layer
        with self._lock:
            for layers, before, number in reversed(append.changes):
                layers.end(layer)
                if changed_nothing:
                    layers.undo(layer, before, number)
                else:
                    layers.lose(layer)
            append.changes = []

    def begin_question(self, sequence: int) -> Watch:
        """The lengths of a sequence are about to be asked for."""
        with self._lock:
            return self._watch(sequence, self._sequences.get(sequence))

    def end_question(self, watch: Watch, lengths: Sequence[int]) -> None:
        """What the server said; a layer that was written meanwhile stays as it is."""
        with self._lock:
            layers = watch.layers or self._layers(watch.sequence)
            writes = layers.writes()
            for layer, length in enumerate(lengths):
                if writes[layer] == watch.writes[layer]:
                    layers.put(layer, length)

    def begin_truncation(self, sequence: int) -> Watch:
        """All layers of a sequence are about to be cut."""
        with self._lock:
            layers = self._layers(sequence)
            watch = self._watch(sequence, layers)
            for layer in range(len(watch.writes)):
                layers.begin(layer, _NOWHERE, layers.length(layer))
            return watch

    def end_truncation(self, watch: Watch, lengths: Sequence[int]) -> None:
        """The sequence is cut; a layer that was written meanwhile has an unknown length."""
        layers = watch.layers
        assert layers is not None
        with self._lock:
            writes = layers.writes()
            for layer, length in enumerate(lengths):
                layers.end(layer)
                if writes[layer] == watch.writes[layer] + 1:
                    layers.put(layer, length)
                else:
                    layers.lose(layer)

    def fail_truncation(self, watch: Watch, changed_nothing: bool) -> None:
        """The truncation failed: lengths stay where it is certain that it changed nothing, else they are unknown."""
        layers = watch.layers
        assert layers is not None
        with self._lock:
            for layer in range(len(watch.writes)):
                layers.end(layer)
                if not changed_nothing:
                    layers.lose(layer)

    def _layers(self, sequence: int) -> _Layers:
        layers = self._sequences.get(sequence)
        if layers is None:
            layers = self._sequences[sequence] = _Layers([_UNKNOWN] * self.info.spec.num_layers)
        return layers

    def _watch(self, sequence: int, layers: _Layers | None) -> Watch:
        if layers is None:
            return Watch(sequence, None, [0] * self.info.spec.num_layers)
        pairs = zip(layers.writes(), layers.in_flight(), strict=True)
        return Watch(sequence, layers, [_OVERLAPPED if in_flight else writes for writes, in_flight in pairs])

    def _length(self, sequence: int, layer: int) -> int:
        layers = self._sequences.get(sequence)
        length = _UNKNOWN if layers is None else layers._numbers[_MEMBERS * layer]
        if layers is None and sequence in self._sequences:
            message = f"sequence {sequence}, layer {layer}: the server has evicted it"
            raise NotFoundError(message, Reason.UNKNOWN_SEQUENCE)
        if length == _UNKNOWN:
            raise FailedPreconditionError(
                f"sequence {sequence}, layer {layer}: its length is not known to this client; "
                "ask get_sequence, or name the starts",
                Reason.OUTCOME_UNKNOWN,
            )
        return length
