"""How long the layers of sequences are, as far as a client knows, and what its writes do to that."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    _Array = array[int]
else:
    _Array = array  # which is no generic class yet where this runs

_WRITES, _IN_FLIGHT, _IN_A_ROW, _MEMBERS = range(1, 5)
_UNKNOWN = -1


class Layers(_Array):
    """One sequence, by layer: its length, how many writes were begun so far, how many are in flight, whether in a row.

    Writes that overlap are in a row where each one starts at the end of the one before: the server can take them in no
    other order. Of others nobody knows which one it takes last, so that the length is unknown from then on.

    The four numbers of a layer lie side by side, as int64: the compiled module reads and writes them where they are.
    """

    __slots__ = ()

    @classmethod
    def of(cls, lengths: Iterable[int]) -> Layers:
        """Of a sequence of such lengths, that nobody writes to."""
        return cls("q", [number for length in lengths for number in (length, 0, 0, 0)])

    def has(self, layer: int) -> bool:
        return _MEMBERS * layer < len(self)

    def length(self, layer: int) -> int:
        return self[_MEMBERS * layer]

    def put(self, layer: int, length: int) -> None:
        self[_MEMBERS * layer] = length

    def begin(self, layer: int, start: int, length: int) -> tuple[int, int]:
        """A write from there has begun that makes the layer so long: its length before, and the write's number."""
        at = _MEMBERS * layer
        before, alone = self[at], self[at + _IN_FLIGHT] == 0
        in_a_row = start == before and (alone or bool(self[at + _IN_A_ROW]))
        self[at] = length if alone or in_a_row else _UNKNOWN
        self[at + _WRITES] += 1
        self[at + _IN_FLIGHT] += 1
        self[at + _IN_A_ROW] = int(in_a_row)
        return before, self[at + _WRITES]

    def end(self, layer: int) -> None:
        """A write has ended."""
        self[_MEMBERS * layer + _IN_FLIGHT] -= 1

    def undo(self, layer: int, before: int, number: int) -> None:
        """A write that has ended changed nothing: all is as it was before, unless there was another one since."""
        at = _MEMBERS * layer
        if number != self[at + _WRITES]:
            self.lose(layer)
            return
        self[at] = before
        self[at + _WRITES] -= 1

    def lose(self, layer: int) -> None:
        """The length is unknown, whatever is undone later."""
        self[_MEMBERS * layer] = _UNKNOWN
        self[_MEMBERS * layer + _WRITES] += 1

    def writes(self) -> list[int]:
        return self[_WRITES::_MEMBERS].tolist()

    def in_flight(self) -> list[int]:
        return self[_IN_FLIGHT::_MEMBERS].tolist()


class Sequences(dict[int, Layers | None]):
    """Sequences by id; None is for one that the server has evicted, and whatever is asked for is of unknown length."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self._num_layers = num_layers

    def __missing__(self, sequence: int) -> Layers:
        layers = self[sequence] = Layers.of([_UNKNOWN] * self._num_layers)
        return layers
