"""Room for what answers carry, which the engine alone gives out, so that nothing in it is shared."""

from __future__ import annotations

from blockdex.transport.layout import aligned


class Tape:
    """Extents that are given back in order, round and round: what answers carry, which are read as they come.

    Positions count bytes from the beginning of time; an extent lies at its position modulo the size.
    """

    def __init__(self, num_bytes: int) -> None:
        self._size = num_bytes
        self._end = 0

    @property
    def longest(self) -> int:
        """Bytes of an extent that there is room for whenever the tape is empty, wherever it stands."""
        return self._size // 2

    def take(self, num_bytes: int, freed: int) -> tuple[int, int] | None:
        """Offset of an extent and the position of its end; None where there is no room.

        Args:
            num_bytes: of the extent.
            freed: position up to which the other side has given back.
        """
        wanted = aligned(num_bytes)
        begin = self._end
        to_the_edge = self._size - begin % self._size
        # From the front again where nothing is in use, so that memory which was never needed is never touched.
        unused = freed == begin and to_the_edge + wanted <= self._size
        if wanted > to_the_edge or unused:
            begin += to_the_edge
        if begin + wanted - freed > self._size:
            return None
        self._end = begin + wanted
        return begin % self._size, self._end
