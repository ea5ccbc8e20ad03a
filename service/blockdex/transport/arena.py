"""Room for what messages carry. Each arena has one side that gives its room out, so nothing in it is shared."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque

from blockdex.transport.layout import aligned


class Arena:
    """Extents that are given back in any order: what requests carry, since some wait and others do not.

    The lowest hole that is wide enough is taken, so that memory which was never needed is never touched.
    """

    def __init__(self, num_bytes: int) -> None:
        self._offsets, self._sizes = [0], [num_bytes]
        self._taken: dict[int, int] = {}

    def take(self, num_bytes: int) -> int | None:
        """Offset of an extent; None where no hole is wide enough. Without any bytes there is one, too."""
        wanted = aligned(max(num_bytes, 1))
        for hole, size in enumerate(self._sizes):
            if size >= wanted:
                offset = self._offsets[hole]
                if size == wanted:
                    del self._offsets[hole], self._sizes[hole]
                else:
                    self._offsets[hole] += wanted
                    self._sizes[hole] -= wanted
                self._taken[offset] = wanted
                return offset
        return None

    def give_back(self, offset: int) -> None:
        """Gives an extent back."""
        size = self._taken.pop(offset)
        hole = bisect_left(self._offsets, offset)
        if hole < len(self._offsets) and offset + size == self._offsets[hole]:
            size += self._sizes.pop(hole)
            del self._offsets[hole]
        if hole and self._offsets[hole - 1] + self._sizes[hole - 1] == offset:
            self._sizes[hole - 1] += size
        else:
            self._offsets.insert(hole, offset)
            self._sizes.insert(hole, size)


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


class Reader:
    """What was read off a tape and is still in use; told in order, whatever the order in which it is given back."""

    def __init__(self) -> None:
        self.freed = 0
        self._ends: deque[int] = deque()
        self._unused: set[int] = set()

    def hold(self, end: int) -> None:
        """Takes note of an extent that ends at that position."""
        self._ends.append(end)

    def give_back(self, end: int) -> bool:
        """Gives an extent back; whether `freed` has moved."""
        self._unused.add(end)
        before = self.freed
        while self._ends and self._ends[0] in self._unused:
            self.freed = self._ends.popleft()
            self._unused.discard(self.freed)
        return self.freed != before
