"""Device channels: an engine's CUDA graph asks, and is answered, without its host."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from blockdex.contract.errors import (
    BlockdexError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    Reason,
    UnavailableError,
)
from blockdex.contract.messages import Order
from blockdex.device_channel.calls import Call, Heads, check, launch
from blockdex.device_channel.connection import Connection
from blockdex.device_channel.memory import ChannelMemory
from blockdex.ring import channel_layout
from blockdex.ring.layout import ALIGNMENT, aligned
from blockdex_kernels import IndexSpec

MAX_TOKENS, MAX_ROWS = 512, 256
"""Of a call: what one step of a core holds."""

_GENERATION = 1 << 32
"""Numbers of requests go on so far behind the last one at each opening: a late answer has none of them."""


class DeviceChannel:
    """Calls on torch CUDA tensors, which are enqueued on the current stream and return at once.

    They can be captured in a CUDA graph, whose replays read ids, positions, lengths and revisions from the tensors as
    they are then. One call is on its way at a time; for several, have several channels, each used on one stream.

    A call that is refused, or not answered in time, fills its block ids with -1 and ends the channel: all later ones
    give -1 at once, `check` says why, and `reopen` begins anew. No wait goes on for longer than the bound.

    Args:
        address: of the engine's Unix socket.
        tenant: whose sequences these are.
        spec: of the indexer.
        epoch: of the engine's cache.
        device: where the calls' tensors are.
        max_tokens: of a call, padding included; at most 512.
        max_rows: sequences of a call, likewise; at most 256. Left out: one for each token.
        first_head, num_heads: which heads the queries have; 0: all from the first one on.
        bound_seconds: longest that a call waits for its answer; at most 60.
        own_bytes: room for tensors of `empty`.

    Raises:
        ValueError: numbers that no channel can have.
        BlockdexError: the engine refuses it, or cannot be reached.
        blockdex_kernels.cuda_driver.CudaError: there is no memory left that can be shared.
    """

    def __init__(
        self,
        address: str,
        tenant: str,
        spec: IndexSpec,
        epoch: int,
        *,
        device: torch.device | str = "cuda",
        max_tokens: int = 64,
        max_rows: int = 0,
        first_head: int = 0,
        num_heads: int = 0,
        bound_seconds: float = 2.0,
        own_bytes: int = 0,
    ) -> None:
        if not 0 <= first_head < spec.num_index_heads:
            raise ValueError(f"first_head must be 0 to {spec.num_index_heads - 1}, got {first_head}")
        num_heads = num_heads or spec.num_index_heads - first_head
        max_rows = max_rows or min(max_tokens, MAX_ROWS)
        for name, number, most in (
            ("max_tokens", max_tokens, MAX_TOKENS),
            ("max_rows", max_rows, MAX_ROWS),
            ("num_heads", num_heads, spec.num_index_heads - first_head),
        ):
            if not 1 <= number <= most:
                raise ValueError(f"{name} must be 1 to {most}, got {number}")
        self._spec, self._tenant = spec, tenant
        self._heads = Heads(first_head, num_heads)
        self._max_tokens, self._max_rows = max_tokens, max_rows
        self._bound_seconds = bound_seconds
        self._device = torch.empty(0, device=device).device
        self._memory = ChannelMemory(self._device, spec, num_heads, max_tokens, max_rows, own_bytes)
        self._own_end = self._memory.places.own
        self._connection: Connection | None = None
        self._number = 0
        self._open(address, epoch)

    def append_and_select(
        self,
        layer: int,
        *,
        sequences: torch.Tensor,
        starts: torch.Tensor,
        lengths: torch.Tensor,
        keys: torch.Tensor,
        queries: torch.Tensor,
        revisions: torch.Tensor | None = None,
        replays: torch.Tensor | None = None,
        pool: int = 0,
        rollback: bool = False,
        order: Order = "ascending",
        scores: torch.Tensor | None = None,
        raw_scores: bool = False,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Appends keys, and selects blocks for the same tokens. R = rows, n = tokens of a row at most.

        Args:
            layer: of the indexer.
            sequences: int32 or int64 `[R]`: ids; or rows of a pool.
            starts: int32 or int64 `[R]`: position of each row's first token.
            lengths: int32 or int64 `[R]`: how many of the row's n tokens there are; a row of length 0 is padding.
            keys: `[R, n, D]`, bfloat16, float16, float32 or float8_e4m3fn.
            queries: `[R, n, H, D]`, of any of these.
            revisions: int32 or int64 `[R]`; 0 is unchecked. A pool has one, so that those of its rows are the same.
            replays: int32 or int64 `[1]`, added to each revision: how often a graph was replayed, say.
            pool: id of a pool of the channel's tenant, whose rows are meant; 0: none.
            rollback: whether an append may cut what lies behind its start.
            order: of a row's blocks: `ascending` (by id) or `score` (init blocks, local blocks, then by falling score).
            scores: float32 `[R, n, H, topk]` to be filled, contiguous; +inf for forced blocks, -inf beside -1.
            raw_scores: whether these are unscaled, and those of forced blocks too.
            out: int32 `[R, n, H, topk]` to be filled, contiguous.

        Returns:
            int32 `[R, n, H, topk]`; -1 where there is no token, no block, or no answer. A call with scores, or in the
            order of scores, fits no captured step of a server on a GPU: it takes milliseconds.

        Raises:
            ValueError: a tensor is not as it should be.
        """
        call = Call(layer, sequences, starts, lengths, keys, queries, revisions, replays, order, scores, raw_scores)
        call.rollback, call.pool = rollback, pool
        return self._select(call, out)

    def select_blocks(
        self,
        layer: int,
        *,
        sequences: torch.Tensor,
        starts: torch.Tensor,
        lengths: torch.Tensor,
        queries: torch.Tensor,
        revisions: torch.Tensor | None = None,
        replays: torch.Tensor | None = None,
        pool: int = 0,
        wait_for_keys: bool = False,
        order: Order = "ascending",
        scores: torch.Tensor | None = None,
        raw_scores: bool = False,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Selects blocks; as `append_and_select`, and `wait_for_keys` waits for keys that another one appends."""
        call = Call(layer, sequences, starts, lengths, None, queries, revisions, replays, order, scores, raw_scores)
        call.wait_for_keys, call.pool = wait_for_keys, pool
        return self._select(call, out)

    def append_keys(
        self,
        layer: int,
        *,
        sequences: torch.Tensor,
        starts: torch.Tensor,
        lengths: torch.Tensor,
        keys: torch.Tensor,
        revisions: torch.Tensor | None = None,
        replays: torch.Tensor | None = None,
        pool: int = 0,
        rollback: bool = False,
    ) -> None:
        """Appends keys; as `append_and_select`."""
        call = Call(layer, sequences, starts, lengths, keys, None, revisions, replays, rollback=rollback, pool=pool)
        self._check(call)
        launch(self._memory, self._spec, self._heads, call, None, self._bound_seconds)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in the channel's own memory: keys and queries that were made there are not copied.

        Raises:
            ValueError: there is no room left of `own_bytes`.
        """
        num_bytes, memory = math.prod(shape) * dtype.itemsize, self._memory
        begin, end = self._own_end, self._own_end + num_bytes
        if end > memory.size:
            raise ValueError(f"own_bytes: {memory.size - begin} bytes are left, {num_bytes} are needed")
        self._own_end = aligned(end)
        assert begin % ALIGNMENT == 0
        return memory.bytes[begin:end].view(dtype).view(*shape)

    def check(self) -> None:
        """Raises why the channel is dead, as far as that is known: of calls whose kernels have run.

        Raises:
            BlockdexError: the refusal of a call, or why it was not answered.
        """
        if error := self._memory.error:
            raise self._error_of(error)

    def close(self) -> None:
        """Ends the channel. Its memory stays mapped: graphs that are replayed give -1.

        Raises:
            BlockdexError: the engine has not said that it is done with the channel's memory.
        """
        self._memory.kill(channel_layout.CLOSED)
        if self._connection is None:
            return
        connection, self._connection = self._connection, None
        try:
            connection.ask({"close_channel": self._number})
        except UnavailableError:
            pass  # it is gone, and has ended what it did
        finally:
            connection.close()

    def reopen(self, address: str, epoch: int) -> None:
        """Opens the channel again, of another engine too; graphs that were captured stay valid.

        Waits for the device: no kernel of the channel may run meanwhile.

        Args:
            address: of the engine's Unix socket.
            epoch: of the engine's cache.

        Raises:
            BlockdexError: the engine refuses it, or cannot be reached. The channel stays dead.
        """
        self.close()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._open(address, epoch)

    def _open(self, address: str, epoch: int) -> None:
        memory = self._memory
        connection = Connection(address, self._tenant, lambda: memory.kill(channel_layout.ENGINE_GONE))
        words = {"open_channel": memory.kind, "bytes": memory.size, "device": memory.uuid}
        words |= {"epoch": epoch, "bound_seconds": self._bound_seconds}
        written = memory.begin_anew(_GENERATION)
        try:
            answer = connection.ask(words, [memory.segment.fd, memory.fd])
        except BaseException:
            connection.close()
            raise
        self._number = answer["channel"]
        memory.open(written, answer["region"])
        self._connection = connection

    def _select(self, call: Call, out: torch.Tensor | None) -> torch.Tensor:
        self._check(call)
        shape = (call.rows, call.row_tokens, self._heads.count, self._spec.topk)
        if out is None:
            out = torch.empty(shape, dtype=torch.int32, device=self._device)
        for name, tensor, dtype in (("out", out, torch.int32), ("scores", call.scores, torch.float32)):
            if tensor is None:
                continue
            good = tensor.shape == shape and tensor.dtype == dtype and tensor.device == self._device
            if not good or not tensor.is_contiguous():
                kind = str(dtype).removeprefix("torch.")
                raise ValueError(f"{name}: must be contiguous {kind} {list(shape)} on {self._device}")
        launch(self._memory, self._spec, self._heads, call, out, self._bound_seconds)
        return out

    def _check(self, call: Call) -> None:
        check(call, self._device, self._spec, self._heads, self._max_tokens, self._max_rows)

    def _error_of(self, error: int) -> BlockdexError:
        if error == channel_layout.REFUSED:
            return self._memory.refusal()
        if error == channel_layout.TIMED_OUT:
            message = f"channel: no answer within {self._bound_seconds:g} s"
            return DeadlineExceededError(message, Reason.DEADLINE_EXCEEDED)
        if error == channel_layout.INVALID_LENGTHS:
            return InvalidArgumentError("lengths: must be 0 to the tokens of a row", Reason.INVALID_SPANS)
        if error == channel_layout.UNANSWERED:
            message = "channel: a call began before the one ahead of it was answered; it is used on several streams"
            return FailedPreconditionError(message, Reason.OVERLOADED)
        if error == channel_layout.CLOSED:
            return FailedPreconditionError("channel: it is closed", Reason.CANCELLED)
        return UnavailableError("engine: it is gone, and so is the channel", Reason.UNREACHABLE)
