"""The client for threads."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, Unpack, overload

from blockdex.client.answers import Info, SequenceState
from blockdex.client.arguments import AppendAndSelectArguments, SelectArguments
from blockdex.client.call import Call, Result
from blockdex.client.core import DEFAULT_TIMEOUT, Core
from blockdex.client.device_channels import ChannelOptions, open_channel, reopen_channel
from blockdex.client.endpoint import TLS, Endpoint, Token
from blockdex.client.forking import is_forked
from blockdex.client.ledger import Ledger
from blockdex.client.pool import Pool
from blockdex.client.requests import NO_POOL, NO_QUERIES, Integers, Scores
from blockdex.client.ring_transport import RingTransport
from blockdex.client.shared_regions import SharedRegion, new_region, no_regions
from blockdex.client.tensors import Array
from blockdex.client.transports import StreamTransport, Transport, UnaryTransport
from blockdex.contract.errors import BlockdexError
from blockdex.contract.messages import Order, Totals

if TYPE_CHECKING:
    from blockdex.device_channel.channel import DeviceChannel

Arguments = ParamSpec("Arguments")

_TRANSPORTS: dict[str, Callable[[Core], Transport]] = {
    "ring": RingTransport,
    "stream": StreamTransport,
    "unary": UnaryTransport,
}


class Client:
    """A blockdex server, for code that blocks.

    Threads may share a client. A process that has made one may fork, but the forked one cannot have any: `RuntimeError`
    at once. Start processes by spawning them, or before the first client.

    The client counts what it appends, so `starts` may be left out: an append then goes to the end of its layer, and a
    selection asks for the last positions. It cannot count for a sequence that it did not open, after a write whose
    outcome it did not learn (deadline, lost connection, fault of the server), nor after writes that overlapped in time
    without each starting where the one before ends: such calls raise `FailedPreconditionError` (OUTCOME_UNKNOWN) until
    `get_sequence` was asked or an append named its start. Calls on one sequence and layer that overlap in time should
    name theirs.

    A server that has lost its cache says so once, by `FailedPreconditionError` (EPOCH_MISMATCH): its sequences are
    gone, and the client forgets them too.

    Every call ends inside its timeout. Calls that change nothing, opening, closing, and appends whose spans all carry a
    revision are repeated while the server is unavailable; nothing else is.

    Every method raises the exceptions of `blockdex.contract.errors`.

    Args:
        address: `HOST:PORT`, or any gRPC target, such as `unix:/path`.
        tenant: whose sequences these are, where the server knows no callers; None leaves it to the server.
        timeout: seconds that a call may take when it names no timeout.
        transport: `stream` (calls go over streams that stay open, as many as there are calls in flight; the default,
            since its calls were measured to be faster than `unary` ones), `unary` (each is an RPC of its own), or
            `ring` (they go through memory that a server on the same host shares which was started with `--socket`;
            gRPC only tells what the server is). `blockdex.connect` takes the fastest that there is.
        tls: `blockdex.TLS(ca=...)`, with `cert` and `key` where the server asks clients for a certificate; True: with
            the authorities that gRPC brings; None: plain text.
        token: that the server's access file has the hash of, or a function that says it anew for each call and stream.

    Attributes:
        transport: which it is.
        why: where `blockdex.connect` chose it, why it is no faster one.
        channel_device: where `blockdex.connect` was told an engine's GPU, the same if channels can be opened from it.

    Raises:
        InvalidArgumentError: the tenant cannot be (INVALID_TENANT).
        RuntimeError: a client was made before this process was forked.
        ValueError: the timeout is not a positive, finite number, the transport is unknown, or a token would go over a
            network in plain text.
        OSError: a file of `tls` cannot be read.
    """

    def __init__(
        self,
        address: str,
        *,
        tenant: str | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        transport: Literal["ring", "stream", "unary"] = "stream",
        tls: TLS | bool | None = None,
        token: Token | None = None,
    ) -> None:
        if transport not in _TRANSPORTS:
            raise ValueError(f"transport must be one of {', '.join(_TRANSPORTS)}, got {transport!r}")
        self._core = Core(Endpoint(address, tls, token), tenant, timeout)
        self.transport = transport
        self.why = ""
        self.channel_device: str | None = None
        self._transport = _TRANSPORTS[transport](self._core)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Fails what is in flight, and every later call, with `CancelledError`. Sequences stay open.

        In a process that was forked from the client's it does nothing.
        """
        if not is_forked():
            self._transport.close()

    def info(self, *, timeout: float | None = None) -> Info:
        """What the server is, holds and can do, asked anew."""
        return self._complete(self._core.get_info(self._core.deadline(timeout))).info

    def stats(self, *, timeout: float | None = None) -> Totals:
        """What the server did since it started."""
        return self._complete(self._core.get_stats(self._core.deadline(timeout)))

    def share(self, num_bytes: int, *, device: str | None = None, timeout: float | None = None) -> SharedRegion:
        """New memory that the server reads and writes where it lies: keys, queries and `out` in it are not copied.

        Takes a client over a ring. The server may know of it over each of the client's links.

        Args:
            num_bytes: that it has.
            device: `cuda` (the first) or `cuda:N`, the server's GPU: for torch tensors there. None = of the host.
            timeout: seconds; None = the client's.

        Raises:
            UnimplementedError: the client's transport has no regions (REGION_UNSUPPORTED).
            OSError, RuntimeError: there is not so much memory, or no such device.
        """
        ring, deadline = self._ring(), self._core.deadline(timeout)
        region = new_region(num_bytes, device)
        self._core.share(region)
        try:
            ring.share(self._ledger(deadline).info, deadline)
        except BaseException:
            self._core.release(region)
            raise
        return region

    def release(self, region: SharedRegion, *, timeout: float | None = None) -> None:
        """Shares a region no more: what lies there is copied like anything else. Its memory goes with the last array.

        The server has given it back when this returns, but over links that calls of other threads are using: over these
        before they are used again.
        """
        ring, deadline = self._ring(), self._core.deadline(timeout)
        self._core.release(region)
        ring.release(deadline)

    def device_channel(self, **options: Unpack[ChannelOptions]) -> DeviceChannel:
        """A channel of its own to a server on the same host: calls on torch CUDA tensors, for CUDA graphs too.

        Needs torch and Triton, a server on a GPU that was started with `--socket`, and, if both are on one GPU, MPS to
        be fast; on another GPU, one that the server's can reach. What goes over the channel the client does not count:
        calls on the same sequences name their starts.

        Args:
            options: see `blockdex.client.device_channels.ChannelOptions`.
        """
        return open_channel(self._core, self.info(), **options)

    def reopen_channel(self, channel: DeviceChannel) -> None:
        """Opens a channel again that is dead, after a restart of the server, say: captured graphs stay valid."""
        reopen_channel(self._core, self.info(), channel)

    def open_sequence(
        self, sequence_id: int, *, lease_seconds: int = 0, epoch: int | None = None, timeout: float | None = None
    ) -> None:
        """Opens an empty sequence. Opening one again that is still as it was opened is fine.

        Args:
            sequence_id: unique inside the tenant and never used again; 64 bits.
            lease_seconds: seconds without a call after which it may be evicted when pages run out; 0 = the server's.
            epoch: None = the one that the client knows, 0 = any.
            timeout: seconds; None = the client's.
        """
        self._run(timeout, self._core.open_sequences, sequence_id, lease_seconds, epoch)

    def open_sequences(
        self,
        sequences: Integers,
        *,
        lease_seconds: Integers = 0,
        epoch: int | None = None,
        timeout: float | None = None,
    ) -> None:
        """Opens empty sequences, all or, on any error, none, as `open_sequence` does one.

        Args:
            sequences: `[N]`, no two alike.
            lease_seconds: `[N]`, or one for all.
            epoch: None = the one that the client knows, 0 = any.
            timeout: seconds; None = the client's.
        """
        self._run(timeout, self._core.open_sequences, sequences, lease_seconds, epoch)

    def get_sequence(
        self, sequence_id: int, *, epoch: int | None = None, timeout: float | None = None
    ) -> SequenceState:
        """Length and revision of every layer; settles what the client does not know."""
        return self._run(timeout, self._core.get_sequence, sequence_id, epoch)

    def fork_sequence(
        self, parent_id: int, child_id: int, length: int, *, epoch: int | None = None, timeout: float | None = None
    ) -> tuple[int, ...]:
        """Opens a child that starts as the first `length` tokens of its parent; the answer is its length by layer."""
        return self._run(timeout, self._core.fork_sequence, parent_id, child_id, length, epoch)

    def truncate_sequence(
        self, sequence_id: int, length: int, *, epoch: int | None = None, timeout: float | None = None
    ) -> tuple[int, ...]:
        """Cuts every layer to at most `length` tokens; the answer is the length by layer."""
        return self._run(timeout, self._core.truncate_sequence, sequence_id, length, epoch)

    def close_sequence(self, sequence_id: int, *, epoch: int | None = None, timeout: float | None = None) -> None:
        """Gives up a sequence; closing what is closed already is fine."""
        self._run(timeout, self._core.close_sequences, sequence_id, epoch)

    def close_sequences(self, sequences: Integers, *, epoch: int | None = None, timeout: float | None = None) -> None:
        """Gives up sequences, no two alike; closing what is closed already is fine."""
        self._run(timeout, self._core.close_sequences, sequences, epoch)

    def create_pool(
        self,
        pool_id: int,
        *,
        num_pages: int,
        num_rows: int,
        max_blocks: int,
        epoch: int | None = None,
        timeout: float | None = None,
    ) -> Pool:
        """Sets pages aside that the caller numbers, and a table of rows that name them: see `Pool`.

        Creating one again that is still as it was created is fine.

        Args:
            pool_id: unique among the pools of the tenant, not 0; 64 bits.
            num_pages: pages, `IndexSpec.block_size` tokens of all layers each, numbered from 0.
            num_rows: rows of the table, one for each sequence that the engine runs at a time.
            max_blocks: cells of a row.
            epoch: None = the one that the client knows, 0 = any.
            timeout: seconds; None = the client's.
        """
        self._run(timeout, self._core.create_pool, pool_id, num_pages, num_rows, max_blocks, epoch)
        return self.pool(pool_id)

    def pool(self, pool_id: int) -> Pool:
        """A pool that is there already: created by another rank of the engine, say. Asks the server nothing."""
        return Pool(self._core, self._run, self._core.pool_id(pool_id))

    def append_keys(
        self,
        layer: int,
        *,
        sequences: Integers,
        lengths: Integers | None = None,
        keys: Array,
        starts: Integers | None = None,
        revisions: Integers | None = None,
        rollback: bool = False,
        epoch: int | None = None,
        timeout: float | None = None,
    ) -> None:
        """Writes index keys of one layer for one or many sequences: all of them, or, on any error, none.

        Args:
            layer: 0 to L-1.
            sequences: `[N]`, no two alike.
            lengths: `[N]`, tokens of each; may be left out for a single sequence. T is their sum.
            keys: `[T, D]`, sequence after sequence: numpy or torch, bfloat16, float16, float32 or float8_e4m3fn.
            starts: `[N]`, position of the first token of each; None = at the end.
            revisions: `[N]`, 0 = unchecked; None = all unchecked.
            rollback: starts may lie before the end of a layer, which loses what lies behind them; without it that takes
                a revision.
            epoch: None = the one that the client knows, 0 = any.
            timeout: seconds; None = the client's.
        """
        arguments = (layer, sequences, lengths, starts, revisions, epoch, keys, *NO_QUERIES, rollback, *NO_POOL)
        self._run(timeout, self._core.append_keys, arguments)

    @overload
    def select_blocks(
        self,
        layer: int,
        *,
        queries: Array,
        return_scores: Literal[False] = ...,
        **others: Unpack[SelectArguments],
    ) -> Array: ...

    @overload
    def select_blocks(
        self, layer: int, *, queries: Array, return_scores: Literal[True, "raw"], **others: Unpack[SelectArguments]
    ) -> tuple[Array, Array]: ...

    def select_blocks(
        self,
        layer: int,
        *,
        sequences: Integers,
        lengths: Integers | None = None,
        queries: Any,
        starts: Integers | None = None,
        order: Order = "ascending",
        return_scores: Scores = False,
        revisions: Integers | None = None,
        first_head: int = 0,
        num_heads: int = 0,
        wait_for_keys: bool = False,
        out: Any = None,
        epoch: int | None = None,
        timeout: float | None = None,
    ) -> Any:
        """Selects the key blocks that each query reads.

        Args:
            layer: 0 to L-1.
            sequences: `[N]`, no two alike.
            lengths: `[N]`, queries of each; may be left out for a single sequence. T is their sum.
            queries: `[T, num_heads, D]`, sequence after sequence, as `keys` of `append_keys` otherwise.
            starts: `[N]`, position of the first query of each; None = the last `lengths[i]` positions.
            order: of a row: `ascending` (by block id) or `score` (init blocks, local blocks, then by falling score).
            return_scores: answer with scores as well: True = times the spec's scale, +inf for forced blocks; `raw` = as
                they rank, unscaled and those of forced blocks too. -inf beside -1.
            revisions: `[N]`, must be the layer's; 0 = unchecked, None = all unchecked.
            first_head: first head that `queries` holds.
            num_heads: heads that `queries` holds; 0 = all from `first_head`.
            wait_for_keys: wait for the revision (without one: for the keys) until the timeout, instead of failing.
            out: in memory of `share`: block ids are written there, with `return_scores` into a pair; then that is
                returned.
            epoch: None = the one that the client knows, 0 = any.
            timeout: seconds; None = the client's.

        Returns:
            Block ids, int32 `[T, num_heads, topk]`, -1 in unused places at the end of a row; with `return_scores` also
            float32 scores of that shape. Of the kind of `queries`, and on their device.
        """
        selection = (queries, first_head, num_heads, order, return_scores, wait_for_keys)
        arguments = (layer, sequences, lengths, starts, revisions, epoch, None, *selection, False, *NO_POOL)
        return self._run(timeout, self._core.select_blocks, arguments, queries, return_scores, out)

    @overload
    def append_and_select(
        self,
        layer: int,
        *,
        queries: Array,
        return_scores: Literal[False] = ...,
        **others: Unpack[AppendAndSelectArguments],
    ) -> Array: ...

    @overload
    def append_and_select(
        self,
        layer: int,
        *,
        queries: Array,
        return_scores: Literal[True, "raw"],
        **others: Unpack[AppendAndSelectArguments],
    ) -> tuple[Array, Array]: ...

    def append_and_select(
        self,
        layer: int,
        *,
        sequences: Integers,
        lengths: Integers | None = None,
        keys: Any,
        queries: Any,
        starts: Integers | None = None,
        order: Order = "ascending",
        return_scores: Scores = False,
        revisions: Integers | None = None,
        first_head: int = 0,
        num_heads: int = 0,
        rollback: bool = False,
        out: Any = None,
        epoch: int | None = None,
        timeout: float | None = None,
    ) -> Any:
        """`append_keys`, then `select_blocks`, for the same tokens: what an engine does once a layer.

        Arguments and answer are theirs; the queries are those of the tokens appended.
        """
        selection = (queries, first_head, num_heads, order, return_scores, False)
        arguments = (layer, sequences, lengths, starts, revisions, epoch, keys, *selection, rollback, *NO_POOL)
        return self._run(timeout, self._core.append_and_select, arguments, queries, return_scores, out)

    def _ring(self) -> RingTransport:
        if not isinstance(self._transport, RingTransport):
            raise no_regions(self.transport)
        return self._transport

    def _run(
        self,
        timeout: float | None,
        build: Callable[Concatenate[Ledger, float, Arguments], Call[Result]],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        deadline = self._core.deadline(timeout)
        return self._complete(build(self._ledger(deadline), deadline, *args, **kwargs))

    def _ledger(self, deadline: float) -> Ledger:
        return self._core.ledger or self._complete(self._core.get_info(deadline))

    def _complete(self, call: Call[Result]) -> Result:
        try:
            while True:
                try:
                    response = self._transport.send(call)
                except BlockdexError as error:
                    time.sleep(call.retry_after(error))
                else:
                    return call.finish(response)
        except BaseException as failure:
            call.failed(failure)
            raise
