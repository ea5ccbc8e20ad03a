"""A stand-in for a core beside a channel's memory: it reads slots as docs/ring.md has them, and answers or does not."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from blockdex.device_channel.memory import ChannelMemory
from blockdex.ring.channel_layout import CONTROL_AT
from blockdex.ring.layout import AT, HEADER_BYTES, REQUEST_STRUCT, SLOT_BYTES, RequestSlot
from blockdex_kernels import IndexSpec, cuda_driver

REGION = 77


class Rung(NamedTuple):
    """A request as the core finds it.

    Attributes:
        slot: its numbers.
        columns: uint64 `[4, N]`.
        keys: uint16 `[T, D]`, of bfloat16 numbers; None without.
        queries: uint16 `[T, H, D]`; None without.
    """

    slot: RequestSlot
    columns: NDArray[np.uint64]
    keys: NDArray[np.uint16] | None
    queries: NDArray[np.uint16] | None


class ChannelCore:
    """Answers each query vector with its own first elements, so that an answer shows whose it is.

    Attributes:
        rung: requests, in their order.
        deaf: whether it answers none.
    """

    def __init__(self, memory: ChannelMemory, spec: IndexSpec) -> None:
        self.rung: list[Rung] = []
        self.deaf = False
        self._memory, self._spec = memory, spec
        self._stop = False
        self._on_device = memory.device.type == "cuda"
        self._answered = memory.bytes[:8].view(torch.int64)
        memory.bytes[CONTROL_AT["region"] :][:4].view(torch.int32).fill_(REGION)
        if self._on_device:
            self._stream = torch.cuda.Stream(memory.device)  # type: ignore[no-untyped-call]
            self._staged = torch.zeros(1 << 20, dtype=torch.uint8, pin_memory=True)
            torch.cuda.synchronize()

    def run(self) -> None:
        """Looks for requests until it is stopped."""
        if self._on_device:
            cuda_driver.use_primary_context(self._memory.device.index or 0)
        seen = self._memory.segment.counters[AT["requests_written"] // 8]
        while not self._stop:
            if self.deaf or self._memory.segment.counters[AT["requests_written"] // 8] == seen:
                time.sleep(0)
                continue
            seen += 1
            self._serve(seen)

    def stop(self) -> None:
        """Ends `run`."""
        self._stop = True

    def _serve(self, number: int) -> None:
        segment, spec = self._memory.segment, self._spec
        at = HEADER_BYTES + (number - 1) % segment.request_slots * SLOT_BYTES
        slot = RequestSlot(*REQUEST_STRUCT.unpack_from(segment.memory, at))
        columns = np.frombuffer(segment.memory, "<u8", 4 * slot.num_spans, segment.request_arena_offset).copy()
        keys = self._read(slot.keys_offset, slot.keys_bytes)
        queries = self._read(slot.queries_offset, slot.queries_bytes)
        self.rung.append(
            Rung(
                slot,
                columns.reshape(4, -1),
                keys.reshape(int(columns.reshape(4, -1)[2].sum()), -1) if slot.keys_dtype else None,
                queries.reshape(-1, slot.num_heads, spec.head_dim) if slot.queries_dtype else None,
            )
        )
        if slot.queries_dtype:
            found = self.rung[-1].queries[..., : spec.topk]  # type: ignore[index]
            self._write(slot.block_ids_offset, found.astype(np.int32))
            if slot.scores_region:
                self._write(slot.scores_offset, found.astype(np.float32) / 4)
        self._answer(number)

    def _read(self, offset: int, size: int) -> NDArray[np.uint16]:
        there = self._memory.bytes[offset : offset + size]
        if not self._on_device:
            return there.numpy().view(np.uint16).copy()
        with torch.cuda.stream(self._stream):
            self._staged[:size].copy_(there, non_blocking=True)
        self._stream.synchronize()
        return self._staged[:size].numpy().view(np.uint16).copy()

    def _write(self, offset: int, numbers: NDArray[Any]) -> None:
        data = torch.from_numpy(numbers.reshape(-1).view(np.uint8))
        there = self._memory.bytes[offset : offset + len(data)]
        if not self._on_device:
            there.copy_(data)
            return
        self._staged[: len(data)].copy_(data)
        with torch.cuda.stream(self._stream):
            there.copy_(self._staged[: len(data)], non_blocking=True)

    def _answer(self, number: int) -> None:
        if self._on_device:
            cuda_driver.call("cuStreamWriteValue64_v2", self._stream.cuda_stream, self._memory.address, number, 0)
        else:
            self._answered[0] = number


@contextmanager
def channel_core(memory: ChannelMemory, spec: IndexSpec) -> Iterator[ChannelCore]:
    """One that runs beside the test."""
    core = ChannelCore(memory, spec)
    thread = threading.Thread(target=core.run, daemon=True)
    thread.start()
    try:
        yield core
    finally:
        core.stop()
        thread.join(timeout=20)
        assert not thread.is_alive()
