"""What a device channel is made of: a segment of the host that both GPUs map, and memory of the engine's GPU."""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Any

import numpy as np
import torch

from blockdex.contract.errors import BlockdexError
from blockdex.ring.channel_layout import CONTROL_AT, REFUSAL_BYTES, REQUEST_SLOTS, places_of
from blockdex.ring.codec import read_error
from blockdex.ring.layout import ANSWER_STRUCT, AT, SLOT_BYTES, AnswerSlot
from blockdex.ring.segment import Segment, Sizes
from blockdex_kernels import IndexSpec, cuda_driver

_PAGE = mmap.PAGESIZE
_COLUMN_BYTES = 4 * 8


class ChannelMemory:
    """The memory of a channel, which outlives its connections: addresses that graphs were captured with stay valid.

    On a CPU, where there is no kernel to ask, a memfd takes the place of the device's memory.

    Args:
        device: the engine's.
        spec: of the indexer.
        num_heads: of the queries.
        max_tokens, max_rows: of a call, padding included.
        own_bytes: for tensors of the caller, behind all else.

    Attributes:
        places: where its parts begin.
        kind: as regions have it, `cuda_fd` or `memfd`.
        fd: the device's memory, to be handed over.
        uuid: of the device; hexadecimal digits.
        size: its bytes.
        address: where it is, on the device.
        bytes: uint8 `[size]`, the same.
        words: int32 `[size / 4]`, the same.
        segment: the ring's.
        segment_address: where the device finds it.

    Raises:
        blockdex_kernels.cuda_driver.CudaError: there is no such memory left, or none that can be shared.
    """

    def __init__(
        self, device: torch.device, spec: IndexSpec, num_heads: int, max_tokens: int, max_rows: int, own_bytes: int
    ) -> None:
        self.device = device
        self.places = places_of(max_tokens, num_heads, spec.head_dim, spec.topk)
        self.segment = Segment.create(Sizes(REQUEST_SLOTS, _COLUMN_BYTES * max_rows, REFUSAL_BYTES), epoch=0)
        needed = self.places.own + own_bytes
        if device.type == "cuda":
            self._take_device_memory(needed)
        else:
            self._take_host_memory(needed)
        self.words = self.bytes.view(torch.int32)

    def _take_device_memory(self, needed: int) -> None:
        index = self.device.index or 0
        torch.zeros(1, device=self.device)  # makes the context, where there is none yet
        cuda_driver.use_primary_context(index)
        whole = cuda_driver.granularity(index)
        self.uuid = cuda_driver.device_uuid(index).hex()
        self.kind, self.size = "cuda_fd", -(-needed // whole) * whole
        handle = cuda_driver.create(index, self.size, shared=True)
        self.fd = cuda_driver.export_file(handle)
        self.address = cuda_driver.reserve(self.size, whole)
        cuda_driver.map_memory(self.address, self.size, handle, index)
        self.bytes = torch.as_tensor(self, device=self.device)
        self.bytes.zero_()
        self.segment_address = cuda_driver.register(_address(self.segment.memory), _whole_pages(self.segment.memory))

    def _take_host_memory(self, needed: int) -> None:
        self.uuid = ""
        self.kind, self.size = "memfd", -(-needed // _PAGE) * _PAGE
        self.fd = os.memfd_create("blockdex-channel", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, self.size)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self.bytes = torch.frombuffer(mmap.mmap(self.fd, self.size), dtype=torch.uint8)
        self.address = self.bytes.data_ptr()
        self.segment_address = _address(self.segment.memory)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """What torch makes a tensor of."""
        return {"shape": (self.size,), "typestr": "|u1", "data": (self.address, False), "version": 2}

    def offset_of(self, tensor: torch.Tensor) -> int:
        """Where a tensor lies in this memory; -1 where it does not."""
        offset = tensor.data_ptr() - self.address
        return offset if self.places.own <= offset < self.size else -1

    @property
    def error(self) -> int:
        """Why the channel is dead, as its kernels and this process have said; 0 while it is not."""
        return int(self.segment.flags[AT["channel_error"] // 4])

    def refusal(self) -> BlockdexError:
        """The first answer that was not taken: what the engine has against a request."""
        segment = self.segment
        taken = segment.counters[AT["answers_read"] // 8]
        at = segment.answer_slots_offset + taken % segment.answer_slots * SLOT_BYTES
        numbers = AnswerSlot(*ANSWER_STRUCT.unpack_from(segment.memory, at))
        begin = segment.answer_arena_offset + numbers.payload_offset
        return read_error(numbers, np.frombuffer(segment.memory, np.uint8, numbers.payload_bytes, begin))

    def begin_anew(self, skipped: int) -> int:
        """Takes up what earlier kernels left, none of which runs any more; the number of the last request.

        Args:
            skipped: numbers that are left out, so that no late answer has one of those to come.
        """
        counters = self.segment.counters
        written = counters[AT["requests_written"] // 8] + skipped
        for name in ("requests_written", "requests_read"):
            counters[AT[name] // 8] = written
        counters[AT["answers_read"] // 8] = counters[AT["answers_written"] // 8]
        counters[AT["answer_bytes_freed"] // 8] = 0
        return written

    def open(self, written: int, region: int) -> None:
        """Lets kernels ask again.

        Args:
            written: number of the last request.
            region: the memory's, as requests name it.
        """
        for name, number in (("answered", written), ("written", written)):
            self.bytes[CONTROL_AT[name] :][:8].view(torch.int64).fill_(number)
        for name, number in (("error", 0), ("arrived", 0), ("region", region)):
            self.bytes[CONTROL_AT[name] :][:4].view(torch.int32).fill_(number)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.segment.flags[AT["channel_error"] // 4] = 0

    def kill(self, error: int) -> None:
        """Ends every wait, within the 20 us that kernels look here, unless it has ended."""
        if not self.error:
            self.segment.flags[AT["channel_error"] // 4] = error


def _address(memory: memoryview) -> int:
    return int(np.frombuffer(memory, np.uint8).ctypes.data)


def _whole_pages(memory: memoryview) -> int:
    return -(-len(memory) // _PAGE) * _PAGE
