"""The shared memory of one link: a file without a name, which is gone when the last process that holds it is."""

from __future__ import annotations

import fcntl
import mmap
import os
from dataclasses import dataclass

from blockdex.ring.layout import (
    ALIGNMENT,
    HEADER_BYTES,
    HEADER_STRUCT,
    MAGIC,
    SLOT_BYTES,
    VERSION,
    aligned,
)

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class RingError(Exception):
    """Memory, or a message in it, that is not what the layout says: the link cannot go on."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Room of a segment.

    Attributes:
        slots: requests, and answers, that can be on their way; a power of two.
        request_bytes: of the arena that holds what requests carry.
        answer_bytes: of the arena that holds what answers carry; the largest one takes at most half of it.
    """

    slots: int
    request_bytes: int
    answer_bytes: int


class Segment:
    """A segment, mapped. Sparse: memory that was never touched takes none.

    Attributes:
        fd: the file.
        memory: all its bytes.
        counters: the same as uint64, one by one.
        flags: the same as uint32, one by one.
    """

    def __init__(self, fd: int) -> None:
        """Maps the file.

        Raises:
            RingError: it is not a segment of this layout.
        """
        self.fd = fd
        size = os.fstat(fd).st_size
        if size < HEADER_BYTES or size % ALIGNMENT:
            raise RingError(f"segment: {size} bytes cannot be one")
        self.memory = memoryview(mmap.mmap(fd, size))
        self.counters = self.memory.cast("Q")
        self.flags = self.memory.cast("I")
        self._read_header(size)

    def _read_header(self, size: int) -> None:
        (
            magic,
            version,
            slot_bytes,
            self.request_slots,
            self.answer_slots,
            self.epoch,
            self.request_slots_offset,
            self.answer_slots_offset,
            self.request_arena_offset,
            self.request_arena_bytes,
            self.answer_arena_offset,
            self.answer_arena_bytes,
            segment_bytes,
        ) = HEADER_STRUCT.unpack_from(self.memory)
        if (magic, version, slot_bytes, segment_bytes) != (MAGIC, VERSION, SLOT_BYTES, size):
            raise RingError(
                f"segment: expected magic {MAGIC:x}, version {VERSION}, slots of {SLOT_BYTES} bytes, {size} bytes, "
                f"got {magic:x}, {version}, {slot_bytes}, {segment_bytes}"
            )

    @classmethod
    def create(cls, sizes: Sizes, epoch: int) -> Segment:
        """Makes a new one, empty, that nobody can shrink under the other's feet."""
        slots = sizes.slots * SLOT_BYTES
        answer_slots = HEADER_BYTES + slots
        request_arena = answer_slots + slots
        answer_arena = request_arena + aligned(sizes.request_bytes)
        size = answer_arena + aligned(sizes.answer_bytes)
        header = HEADER_STRUCT.pack(
            MAGIC,
            VERSION,
            SLOT_BYTES,
            sizes.slots,
            sizes.slots,
            epoch,
            HEADER_BYTES,
            answer_slots,
            request_arena,
            aligned(sizes.request_bytes),
            answer_arena,
            aligned(sizes.answer_bytes),
            size,
        )
        fd = os.memfd_create("blockdex-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            os.pwrite(fd, header, 0)
            return cls(fd)
        except BaseException:
            os.close(fd)
            raise
