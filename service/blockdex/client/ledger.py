"""What a client knows of one epoch of a server: above all, how long it made each layer of each sequence."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType

from blockdex.client.answers import Info
from blockdex.client.lengths import Layers, Sequences
from blockdex.client.requests import ArrayOf, TokenRequest, copied, maker_of

_OVERLAPPED = -1
_NOWHERE = -2


@dataclass(slots=True)
class Watch:
    """A request on a whole sequence in flight.

    Attributes:
        layers: of the sequence, though it may be closed meanwhile; None where nothing was known of it.
        writes: `[L]`, writes begun up to it, `_OVERLAPPED` where one was still in flight.
    """

    sequence: int
    layers: Layers | None
    writes: list[int]


class Ledger:
    """Lengths by sequence and layer, as this client's own calls made them. Safe to share between threads.

    A length is unknown for a sequence that this client did not open, after a write of unknown outcome, and after writes
    that overlapped in time without each starting where the one before ends; until the server was asked, or an append
    that overlaps no other named its own start.

    Attributes:
        info: the server's answer to GetInfo.
        make: makes requests to such a server, as `RequestMaker.make`.
        over: whether the server has said that its epoch is another one.
    """

    def __init__(self, info: Info, codec: ModuleType, array_of: ArrayOf = copied) -> None:
        self.info = info
        self.make = maker_of(info, codec, array_of).make
        self.over = False
        self._sequences = Sequences(info.spec.num_layers)
        self._lock = threading.Lock()

    def open(self, sequence: int, lengths: Sequence[int]) -> None:
        """Takes up a sequence of known lengths."""
        with self._lock:
            self._sequences[sequence] = Layers.of(lengths)

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

    def place_selection(self, request: TokenRequest) -> None:
        """Has a selection without starts ask for the last positions.

        Raises:
            FailedPreconditionError: a length is unknown (OUTCOME_UNKNOWN).
            NotFoundError: a sequence was evicted (UNKNOWN_SEQUENCE).
        """
        with self._lock:
            request.place(self._sequences)

    def begin_append(self, request: TokenRequest) -> None:
        """Counts an append that is about to be sent, so that the next one follows it.

        Without starts it goes to the ends of the sequences, and raises as `place_selection`.
        """
        with self._lock:
            request.begin(self._sequences)

    def end_append(self, request: TokenRequest) -> None:
        """The append took effect."""
        with self._lock:
            request.end()

    def fail_append(self, request: TokenRequest, changed_nothing: bool) -> None:
        """The append failed: lengths are what they were where that is certain, else unknown."""
        with self._lock:
            request.fail(changed_nothing)

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

    def _layers(self, sequence: int) -> Layers:
        return self._sequences.get(sequence) or self._sequences.__missing__(sequence)

    def _watch(self, sequence: int, layers: Layers | None) -> Watch:
        if layers is None:
            return Watch(sequence, None, [0] * self.info.spec.num_layers)
        pairs = zip(layers.writes(), layers.in_flight(), strict=True)
        return Watch(sequence, layers, [_OVERLAPPED if in_flight else writes for writes, in_flight in pairs])
