"""Who sends requests over a ring, and waits for what becomes of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.ring_messages import Answer, Queries, Request, TensorData, TokenAnswer, TokenRequest
from blockdex.contract.errors import BlockdexError
from blockdex.contract.messages import (
    SequenceState,
)
from blockdex.ring.caller import CameTo
from blockdex.ring.client import RingChannel
from blockdex.v1 import indexer_pb2 as pb
from support import ring_caller
from support.running_engine import SPEC, TIMEOUT

DTYPES = {"bf16": pb.DTYPE_BF16, "fp16": pb.DTYPE_FP16, "fp32": pb.DTYPE_FP32, "fp8_e4m3": pb.DTYPE_FP8_E4M3}
ORDERS = {"ascending": pb.SELECTION_ORDER_ASCENDING, "score": pb.SELECTION_ORDER_SCORE}
RESPONSES: tuple[Any, ...] = (pb.AppendKeysResponse, pb.SelectBlocksResponse, pb.AppendAndSelectResponse)


async def eventually(holds: Callable[[], object], seconds: float = TIMEOUT) -> None:
    """Waits until something holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never came to that"
        await asyncio.sleep(0.001)


def wire_of(request: TokenRequest) -> tuple[int, bytes]:
    """The number of a token request's RPC, and its bytes on the wire."""
    spans, keys, queries = request.spans, request.keys, request.queries
    columns = (spans.sequence_ids, spans.starts, spans.lengths, spans.revisions)
    ids, starts, lengths, revisions = (column.tolist() for column in columns)
    fields: dict[str, Any] = {"layer": request.layer, "header": pb.RequestHeader(epoch=request.epoch)}
    fields["spans"] = pb.Spans(
        sequence_ids=ids, starts=starts, lengths=lengths, revisions=revisions, pool_id=request.pool_id
    )
    if keys is not None:
        fields |= {"keys": _tensor(keys.tensor), "rollback": keys.rollback}
    if queries is None:
        return 0, pb.AppendKeysRequest(**fields).SerializeToString()
    fields |= {
        "queries": _tensor(queries.tensor),
        "first_head": queries.first_head,
        "num_heads": queries.num_heads,
        "order": ORDERS[queries.order],
        "return_scores": _score_format(queries),
    }
    if keys is not None:
        return 2, pb.AppendAndSelectRequest(**fields).SerializeToString()
    return 1, pb.SelectBlocksRequest(**fields, wait_for_keys=queries.wait_for_keys).SerializeToString()


def _score_format(queries: Queries) -> pb.ScoreFormat:
    if not queries.return_scores:
        return pb.SCORE_FORMAT_UNSPECIFIED
    return pb.SCORE_FORMAT_RAW if queries.raw_scores else pb.SCORE_FORMAT_SCALED


def _tensor(tensor: TensorData) -> pb.Tensor:
    return pb.Tensor(dtype=DTYPES[tensor.dtype], data=bytes(tensor.data))


class PendingAnswer(ring_caller.PendingAnswer):
    """The `Caller` of one plain message, and its answer to come."""

    def __init__(self, request: Request) -> None:
        super().__init__()
        self.request = request

    def answered(self, number: int, response: bytes) -> None:
        """As `Caller.answered`."""
        assert isinstance(self.request, TokenRequest)
        keys, queries = self.request.keys, self.request.queries
        message = RESPONSES[0 if queries is None else 1 if keys is None else 2].FromString(response)
        ids = scores = None
        if queries is not None:
            shape = (self.request.spans.num_tokens, queries.num_heads, -1)
            ids = np.frombuffer(message.block_ids.data, "<i4").reshape(shape)
            if queries.return_scores:
                scores = np.frombuffer(message.scores.data, "<f4").reshape(shape)
        self.set_result(TokenAnswer(message.epoch, ids, scores))

    def changed(self, number: int, state: SequenceState) -> None:
        """As `Caller.changed`."""
        self.set_result(state)

    def took(self, number: int, rpc: str, came_to: CameTo) -> None:
        """As `Caller.took`."""
        self.phase, self.stage_seconds = came_to.phase, came_to.stage_seconds

    def failed(self, number: int, rpc: str, began: float, error: BlockdexError, came_to: CameTo | None) -> None:
        """As `Caller.failed`."""
        self.set_exception(error)
        self.exception()  # whoever asked may have gone


class MessageChannel(RingChannel):
    """A channel for those who have a plain message rather than its bytes on the wire."""

    def submit(self, request: Request, timeout: float = TIMEOUT) -> PendingAnswer:
        """Sends a request; raises where none can be sent now."""
        self.check()
        pending = PendingAnswer(request)
        if isinstance(request, TokenRequest):
            rpc, message = wire_of(request)
            assert self.send(pending, rpc, request.tenant, timeout, message), "protobuf's own encoding is read"
        else:
            self.send_sequence(pending, 0, type(request).__name__, request, timeout)
        pending.add_done_callback(self._give_up)
        return pending

    def _give_up(self, pending: asyncio.Future[Answer]) -> None:
        if pending.cancelled():
            assert isinstance(pending, PendingAnswer)
            self.give_up(pending, 0)


class Asked:
    """A caller that is a stream, and what it was told."""

    def __init__(self) -> None:
        self.told: dict[int, bytes | BlockdexError] = {}
        self.came_to: dict[int, CameTo] = {}

    def answered(self, number: int, response: bytes) -> None:
        assert number not in self.told
        self.told[number] = response

    def changed(self, number: int, state: SequenceState) -> None:
        raise AssertionError(f"{number} came to {state}")

    def took(self, number: int, rpc: str, came_to: CameTo) -> None:
        self.came_to[number] = came_to

    def failed(self, number: int, rpc: str, began: float, error: BlockdexError, came_to: CameTo | None) -> None:
        assert rpc.startswith("Stream/") and time.monotonic() - began < TIMEOUT and number not in self.told
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
