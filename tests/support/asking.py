"""Who asks a channel the short way, and waits for what becomes of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from blockdex.contract.errors import (
    BlockdexError,
)
from blockdex.ring.channel import CameTo
from blockdex.v1 import indexer_pb2 as pb
from support.running_engine import (
    SPEC,
    TIMEOUT,
)


async def eventually(holds: Callable[[], object], seconds: float = TIMEOUT) -> None:
    """Waits until something holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never came to that"
        await asyncio.sleep(0.001)


class Asked:
    """An asker, and what it was told."""

    def __init__(self) -> None:
        self.told: dict[int, bytes | BlockdexError] = {}

    def answered(self, number: int, response: bytes) -> None:
        self.told[number] = response

    def was_slow(self, number: int, rpc: str, began: float, came_to: CameTo) -> None:
        raise AssertionError(f"{rpc} {number} was slow")

    def failed(self, number: int, rpc: str, began: float, error: BlockdexError, came_to: CameTo | None) -> None:
        assert rpc == "Stream/SelectBlocks" and time.monotonic() - began < TIMEOUT
        self.told[number] = error

    async def error(self, number: int) -> BlockdexError:
        """What that request is refused with."""
        await eventually(lambda: number in self.told)
        error = self.told[number]
        assert isinstance(error, BlockdexError)
        return error


def waiting_selection(number: int, timeout_ms: int = 0, layer: int = 0) -> bytes:
    """A request of a stream: of sequence 1, whose keys do not come."""
    select = pb.SelectBlocksRequest(
        layer=layer,
        spans=pb.Spans(sequence_ids=[1], starts=[0], lengths=[1]),
        queries=pb.Tensor(dtype=pb.DTYPE_BF16, data=bytes(2 * 4 * SPEC.head_dim)),
        wait_for_keys=True,
    )
    return pb.StreamRequest(request_id=number, timeout_ms=timeout_ms, select_blocks=select).SerializeToString()
