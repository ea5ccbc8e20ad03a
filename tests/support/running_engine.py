"""A real engine behind a real ring, with CPU kernels that can be watched, held up and made to fail."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.ring_messages import Answer, Keys, Queries, Request, TensorData, TokenAnswer, TokenRequest
from blockdex.contract.errors import BlockdexError
from blockdex.contract.messages import (
    ClosePool,
    CloseSequences,
    CreatePool,
    FloatDtype,
    ForkSequence,
    GetSequence,
    Limits,
    OpenSequences,
    Order,
    SetPageTables,
    TruncateSequence,
)
from blockdex.ring.server import RingInbox
from blockdex.scheduler.loop import Engine
from blockdex_kernels import IndexSpec
from blockdex_kernels.cpu import CpuBackend
from blockdex_kernels.interface import Selection
from blockdex_kernels.interface import Spans as KernelSpans
from support.cache_state import spans
from support.ring_caller import PendingAnswer, RingCaller

SPEC = IndexSpec(
    num_layers=3, num_index_heads=4, head_dim=16, block_size=8, topk=4, init_blocks=1, max_sequence_tokens=4096
)
LIMITS = Limits(
    max_message_bytes=1 << 24, max_spans=64, max_queued_requests=4096, max_stream_requests=64, max_wait_ms=20_000
)
DECODE_QUERIES = 4
TIMEOUT = 10.0
TENANT = "tenant"

Phase = Literal["append", "decode", "prefill"]

NUMPY_DTYPES: dict[FloatDtype, Any] = {
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "fp32": np.float32,
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
}


class Call(NamedTuple):
    """One call of a kernel: its phase, the rows of its packed tensor, their heads (0 for keys), and their layers."""

    phase: Phase
    tokens: int
    heads: int
    layers: list[int]


class WatchedBackend(CpuBackend):
    """The CPU kernels and a note of every call.

    Attributes:
        calls: what was called so far, in order.
        fault: a phase whose next call raises instead, once.
        error: what it raises.
        lost: whether the device does not answer any more.
    """

    def __init__(self, spec: IndexSpec, num_pages: int) -> None:
        super().__init__(spec, num_pages, reason="watched")
        self.calls: list[Call] = []
        self.fault: Phase | None = None
        self.error: Exception = RuntimeError("a fault of the kernels, made for this test")
        self.lost = False
        self._held: Phase | None = None
        self._entered = threading.Event()
        self._gate = threading.Event()

    @contextmanager
    def held(self, phase: Phase) -> Iterator[threading.Event]:
        """Holds up the next call of a phase until the block ends; the event says that the engine has come there."""
        self._entered.clear()
        self._gate.clear()
        self._held = phase
        try:
            yield self._entered
        finally:
            self._gate.set()

    def tokens(self, phase: Phase) -> int:
        """Rows that the kernels of a phase were given so far."""
        return sum(call.tokens for call in self.calls if call.phase == phase)

    def synchronize(self) -> None:
        """As `Backend.synchronize`."""
        if self.lost:
            raise RuntimeError("the device does not answer, made for this test")

    def append(self, keys: torch.Tensor, spans: KernelSpans) -> None:
        """As `Backend.append`."""
        self._note("append", len(keys), 0, spans)
        super().append(keys, spans)

    def decode(
        self, queries: torch.Tensor, spans: KernelSpans, *, order: Order, return_scores: bool, raw_scores: bool = False
    ) -> Selection:
        """As `Backend.decode`."""
        self._note("decode", len(queries), queries.shape[1], spans)
        return super().decode(queries, spans, order=order, return_scores=return_scores, raw_scores=raw_scores)

    def prefill(
        self, queries: torch.Tensor, spans: KernelSpans, *, order: Order, return_scores: bool, raw_scores: bool = False
    ) -> Selection:
        """As `Backend.prefill`."""
        self._note("prefill", len(queries), queries.shape[1], spans)
        return super().prefill(queries, spans, order=order, return_scores=return_scores, raw_scores=raw_scores)

    def _note(self, phase: Phase, tokens: int, heads: int, spans: KernelSpans) -> None:
        if self.fault == phase:
            self.fault = None
            raise self.error
        self.calls.append(Call(phase, tokens, heads, spans.layers.tolist()))
        if self._held == phase:
            self._held = None
            self._entered.set()
            assert self._gate.wait(TIMEOUT), "held up for too long"


@dataclass
class Running:
    """An engine, its kernels and its caller, which is to be started."""

    backend: WatchedBackend
    engine: Engine
    channel: Any  # A RingCaller, or a frontend's channel.

    def submit(self, request: Request, timeout: float = TIMEOUT) -> PendingAnswer:
        """Queues a request."""
        pending: PendingAnswer = self.channel.submit(request, timeout)
        return pending

    async def ask(self, request: Request, timeout: float = TIMEOUT) -> Answer:
        """Queues a request and waits for its answer."""
        return await asyncio.wait_for(self.submit(request, timeout), 2 * TIMEOUT)

    async def select(self, request: TokenRequest) -> NDArray[np.int32]:
        """Block ids that a request is answered."""
        return block_ids(await self.ask(request))

    async def refusal(self, request: Request, timeout: float = TIMEOUT) -> BlockdexError:
        """The error that a request is answered."""
        return await refusal(self.submit(request, timeout))

    async def reached(self, entered: threading.Event) -> None:
        """Waits until the engine has come to where it is held up."""
        assert await asyncio.to_thread(entered.wait, TIMEOUT), "the engine did not get there"

    async def settled(self) -> None:
        """Waits until the engine has taken up everything that was queued, or given up, before."""
        await asyncio.sleep(0)
        await self.refusal(get(2**64 - 1))


@asynccontextmanager
async def running(
    spec: IndexSpec = SPEC,
    *,
    num_pages: int = 512,
    limits: Limits = LIMITS,
    start: bool = True,
    lease_seconds: float = 600.0,
    prefill_slice_seconds: float = 1e-6,
    spin_seconds: float = 0.0,
) -> AsyncIterator[Running]:
    """Runs an engine; without `start` the first pass begins when the test starts the channel.

    A slice of a prefill has the fewest tokens that it can have, unless said otherwise.
    """
    backend = WatchedBackend(spec, num_pages)
    inbox = RingInbox(spin_seconds)
    engine = Engine(
        backend,
        limits=limits,
        inbox=inbox,
        lease_seconds=lease_seconds,
        decode_queries=DECODE_QUERIES,
        prefill_slice_seconds=prefill_slice_seconds,
    )
    channel = RingCaller(engine, inbox)
    if start:
        channel.start()
    try:
        yield Running(backend, engine, channel)
    finally:
        channel.stop()


async def refusal(future: asyncio.Future[Answer]) -> BlockdexError:
    """The error that a request in flight is answered."""
    try:
        answer = await asyncio.wait_for(future, 2 * TIMEOUT)
    except BlockdexError as error:
        return error
    raise AssertionError(f"answered: {answer}")


def block_ids(answer: Answer | BlockdexError) -> NDArray[np.int32]:
    """The block ids of an answer."""
    assert isinstance(answer, TokenAnswer)
    assert answer.block_ids is not None
    return answer.block_ids


def values(random: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    """Small integers: exact in every dtype, so are their products' sums, and many scores are equal."""
    return random.integers(-4, 5, shape).astype(np.float32)


def keys_of(random: np.random.Generator, length: int) -> NDArray[np.float32]:
    """Random keys `[T, D]`."""
    return values(random, length, SPEC.head_dim)


def queries_of(random: np.random.Generator, length: int, heads: int = SPEC.num_index_heads) -> NDArray[np.float32]:
    """Random queries `[T, heads, D]`."""
    return values(random, length, heads, SPEC.head_dim)


def tensor(values: NDArray[np.float32], dtype: FloatDtype = "bf16") -> TensorData:
    """Values as they come over the wire."""
    return TensorData(dtype, values.astype(NUMPY_DTYPES[dtype]).tobytes())


def open_sequence(sequence_id: int, *, tenant: str = TENANT, epoch: int = 0, lease: int = 0) -> OpenSequences:
    """A request to open a sequence."""
    return OpenSequences(tenant, epoch, (sequence_id,), (lease,))


def get(sequence_id: int, *, tenant: str = TENANT, epoch: int = 0) -> GetSequence:
    """A request for a sequence's state."""
    return GetSequence(tenant, epoch, sequence_id)


def fork(parent_id: int, child_id: int, length: int, *, tenant: str = TENANT, epoch: int = 0) -> ForkSequence:
    """A request to fork a sequence."""
    return ForkSequence(tenant, epoch, parent_id, child_id, length)


def truncate(sequence_id: int, length: int, *, tenant: str = TENANT, epoch: int = 0) -> TruncateSequence:
    """A request to truncate a sequence."""
    return TruncateSequence(tenant, epoch, sequence_id, length)


def close(sequence_id: int, *, tenant: str = TENANT, epoch: int = 0) -> CloseSequences:
    """A request to close a sequence."""
    return CloseSequences(tenant, epoch, (sequence_id,))


def create_pool(pool_id: int, num_pages: int, num_rows: int, max_blocks: int, *, tenant: str = TENANT) -> CreatePool:
    """A request for a pool."""
    return CreatePool(tenant, 0, pool_id, num_pages, num_rows, max_blocks)


def set_cells(pool_id: int, *runs: tuple[int, int, Sequence[int]], tenant: str = TENANT) -> SetPageTables:
    """A request to set runs of cells: row, first block, page numbers."""
    rows, first_blocks, page_ids = zip(*runs, strict=True)
    counts = tuple(map(len, page_ids))
    return SetPageTables(tenant, 0, pool_id, rows, first_blocks, counts, [page for run in page_ids for page in run])


def close_pool(pool_id: int, *, tenant: str = TENANT) -> ClosePool:
    """A request to close a pool."""
    return ClosePool(tenant, 0, pool_id)


def tokens(
    layer: int,
    rows: Sequence[tuple[int, ...]],
    *,
    keys: NDArray[np.float32] | None = None,
    queries: NDArray[np.float32] | None = None,
    first_head: int = 0,
    order: Order = "ascending",
    scores: bool = False,
    raw: bool = False,
    wait: bool = False,
    rollback: bool = True,
    dtype: FloatDtype = "bf16",
    tenant: str = TENANT,
    epoch: int = 0,
    pool: int = 0,
    pages: bool = False,
) -> TokenRequest:
    """A request for the tokens of rows (sequence id, start, length[, revision]): an append, a selection, or both.

    With a pool the first of each is a row of it.
    """
    half = None
    if queries is not None:
        half = Queries(tensor(queries, dtype), first_head, queries.shape[1], order, scores, wait, raw, pages)
    appended = None if keys is None else Keys(tensor(keys, dtype), rollback)
    return TokenRequest(tenant, epoch, layer, spans(*rows), appended, half, pool)
