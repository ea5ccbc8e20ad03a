"""Loads and stores of a segment's numbers in the order that the ring needs, on any machine."""

from __future__ import annotations

import ctypes
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from blockdex.ring.segment import Segment
from support.programs import program, run

SOURCE = Path(__file__).parent.parent / "csrc" / "atomics.c"


@cache
def _library() -> ctypes.PyDLL:
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "atomics.so")
        run(program("gcc", "build-essential"), "-std=gnu11", "-O2", "-shared", "-fPIC", SOURCE, "-o", made)
        library = ctypes.PyDLL(str(made))
    number, flag, at = ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p
    library.load_number.argtypes, library.load_number.restype = [at], number
    library.store_number.argtypes, library.store_number.restype = [at, number], None
    library.store_flag.argtypes, library.store_flag.restype = [at, flag], None
    library.take_flag.argtypes, library.take_flag.restype = [at], flag
    return library


class Atomics:
    """The counters and flags of a segment, by their offsets."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._begin: int = np.frombuffer(segment.memory, np.uint8).ctypes.data
        self._library = _library()

    def load(self, offset: int) -> int:
        """A counter; what was written before it is seen after it."""
        return int(self._library.load_number(self._begin + offset))

    def store(self, offset: int, number: int) -> None:
        """Sets a counter, after what was written before it."""
        self._library.store_number(self._begin + offset, number)

    def raise_flag(self, offset: int) -> None:
        """Sets a flag; what is loaded afterwards is loaded after that."""
        self._library.store_flag(self._begin + offset, 1)
        self._library.fence()

    def take_flag(self, offset: int) -> bool:
        """Clears a flag, after what was stored before; whether it was set."""
        self._library.fence()
        return bool(self._library.take_flag(self._begin + offset))

    def clear_flag(self, offset: int) -> None:
        """Clears a flag."""
        self._library.store_flag(self._begin + offset, 0)
