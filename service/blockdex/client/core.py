"""What both clients do alike: requests out of arguments, answers out of responses, and what a failure means."""

from __future__ import annotations

import math
import threading
import time
from typing import Any

from blockdex import checks
from blockdex.client.answers import SequenceState, info_of
from blockdex.client.call import Call
from blockdex.client.ledger import Ledger
from blockdex.client.requests import Queries, Spans, fill, integer
from blockdex.client.tensors import tensor_like
from blockdex.v1 import indexer_pb2 as pb

DEFAULT_TIMEOUT = 30.0
"""Seconds that a call may take when neither it nor its client names a timeout."""

CHANNEL_OPTIONS = (
    # 16,384 queries are answered with 4 MiB of block ids; requests are checked against the server's own limit.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # The client repeats what may be repeated, and gRPC nothing.
    ("grpc.enable_retries", 0),
    # gRPC would wait a second at first, then minutes, before it looks for a server again.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


class Core:
    """One client's settings and what it knows of the server. Safe to share between threads.

    The methods named after RPCs build a `Call`; sending it is the client's part.

    Args:
        address: `HOST:PORT`, or a gRPC target such as `unix:/path`.
        tenant: sent as the metadata `blockdex-tenant`; None sends none.
        timeout: seconds that a call may take that names none.

    Raises:
        InvalidArgumentError: the tenant cannot be (INVALID_TENANT).
        ValueError: the timeout is not a positive, finite number.
    """

    def __init__(self, address: str, tenant: str | None, timeout: float) -> None:
        if tenant is not None:
            checks.check_tenant(tenant)
        self.address = address
        self.metadata = () if tenant is None else ((checks.TENANT_KEY, tenant),)
        self._timeout = _checked(timeout)
        self._lock = threading.Lock()
        self._ledger: Ledger | None = None

    @property
    def ledger(self) -> Ledger | None:
        """What is known of the server; None before its first answer, and after it said that its epoch is another."""
        ledger = self._ledger
        return None if ledger is None or ledger.over else ledger

    def deadline(self, timeout: float | None) -> float:
        """`time.monotonic()` by which a call that begins now must have ended.

        Raises:
            ValueError: the timeout is not a positive, finite number.
        """
        return time.monotonic() + (self._timeout if timeout is None else _checked(timeout))

    def get_info(self, deadline: float) -> Call[Ledger]:
        """GetInfo. The answer is what the client knows from then on; a new epoch drops every length."""

        def finish(response: pb.GetInfoResponse) -> Ledger:
            info = info_of(response)
            with self._lock:
                ledger = self.ledger
                if ledger is None or ledger.info.epoch != info.epoch:
                    ledger = self._ledger = Ledger(info)
                ledger.info = info
                return ledger

        return Call("GetInfo", pb.GetInfoRequest(), deadline, finish, repeatable=True)

    def open_sequence(
        self, ledger: Ledger, deadline: float, sequence_id: int, lease_seconds: int, epoch: int | None
    ) -> Call[None]:
        """OpenSequence; from the answer on, every length is 0."""
        sequence_id = integer("sequence_id", sequence_id)
        lease_seconds = integer("lease_seconds", lease_seconds, bits=32)
        request = pb.OpenSequenceRequest(
            sequence_id=sequence_id, lease_seconds=lease_seconds, epoch=_epoch(ledger, epoch)
        )

        def finish(_: pb.OpenSequenceResponse) -> None:
            ledger.open(sequence_id, [0] * ledger.info.spec.num_layers)

        return Call("OpenSequence", request, deadline, finish, repeatable=False, ledger=ledger)

    def get_sequence(self, ledger: Ledger, deadline: float, sequence_id: int, epoch: int | None) -> Call[SequenceState]:
        """GetSequence; the answer settles lengths that are unknown."""
        sequence_id = integer("sequence_id", sequence_id)
        request = pb.GetSequenceRequest(sequence_id=sequence_id, epoch=_epoch(ledger, epoch))
        watch = ledger.begin_question(sequence_id)

        def finish(response: pb.GetSequenceResponse) -> SequenceState:
            state = SequenceState(tuple(response.lengths), tuple(response.revisions), response.epoch)
            ledger.end_question(watch, state.lengths)
            return state

        return Call("GetSequence", request, deadline, finish, repeatable=True, ledger=ledger)

    def fork_sequence(
        self, ledger: Ledger, deadline: float, parent_id: int, child_id: int, length: int, epoch: int | None
    ) -> Call[tuple[int, ...]]:
        """ForkSequence; the answer is the child's lengths."""
        parent_id, child_id = integer("parent_id", parent_id), integer("child_id", child_id)
        checks.check_length(ledger.info.spec, parent_id, length)
        request = pb.ForkSequenceRequest(
            parent_id=parent_id, child_id=child_id, length=length, epoch=_epoch(ledger, epoch)
        )

        def finish(response: pb.ForkSequenceResponse) -> tuple[int, ...]:
            lengths = tuple(response.lengths)
            ledger.open(child_id, lengths)
            return lengths

        return Call("ForkSequence", request, deadline, finish, repeatable=False, ledger=ledger)

    def truncate_sequence(
        self, ledger: Ledger, deadline: float, sequence_id: int, length: int, epoch: int | None
    ) -> Call[tuple[int, ...]]:
        """TruncateSequence; the answer is the sequence's lengths."""
        sequence_id = integer("sequence_id", sequence_id)
        checks.check_length(ledger.info.spec, sequence_id, length)
        request = pb.TruncateSequenceRequest(sequence_id=sequence_id, length=length, epoch=_epoch(ledger, epoch))
        watch = ledger.begin_truncation(sequence_id)

        def finish(response: pb.TruncateSequenceResponse) -> tuple[int, ...]:
            lengths = tuple(response.lengths)
            ledger.end_truncation(watch, lengths)
            return lengths

        def fail(changed_nothing: bool) -> None:
            ledger.fail_truncation(watch, changed_nothing)

        return Call("TruncateSequence", request, deadline, finish, repeatable=False, ledger=ledger, fail=fail)

    def close_sequence(self, ledger: Ledger, deadline: float, sequence_id: int, epoch: int | None) -> Call[None]:
        """CloseSequence; closing what is closed already is fine, so it may be repeated."""
        sequence_id = integer("sequence_id", sequence_id)
        request = pb.CloseSequenceRequest(sequence_id=sequence_id, epoch=_epoch(ledger, epoch))

        def finish(_: pb.CloseSequenceResponse) -> None:
            ledger.close(sequence_id)

        return Call("CloseSequence", request, deadline, finish, repeatable=True, ledger=ledger)

    def append_keys(self, ledger: Ledger, deadline: float, spans: Spans, keys: Any) -> Call[None]:
        """AppendKeys."""
        envelope = pb.StreamRequest()
        return self._append("AppendKeys", envelope, envelope.append_keys, ledger, deadline, spans, keys, None)

    def append_and_select(
        self, ledger: Ledger, deadline: float, spans: Spans, keys: Any, queries: Queries
    ) -> Call[Any]:
        """AppendAndSelect."""
        envelope = pb.StreamRequest()
        request = envelope.append_and_select
        return self._append("AppendAndSelect", envelope, request, ledger, deadline, spans, keys, queries)

    def select_blocks(self, ledger: Ledger, deadline: float, spans: Spans, queries: Queries) -> Call[Any]:
        """SelectBlocks; without starts it asks for the last positions."""
        checks.check_layer(ledger.info.spec, spans.layer)
        starts = spans.starts
        if starts is None:
            starts = ledger.last_positions(spans.layer, spans.sequences, spans.lengths)
        envelope = pb.StreamRequest()
        request = envelope.select_blocks
        shape = fill(request, ledger.info, spans, starts, None, queries)

        def finish(response: pb.SelectBlocksResponse) -> Any:
            return _selection(response, queries, shape)

        return Call("SelectBlocks", request, deadline, finish, repeatable=True, ledger=ledger, envelope=envelope)

    def _append(
        self,
        rpc: str,
        envelope: pb.StreamRequest,
        request: Any,
        ledger: Ledger,
        deadline: float,
        spans: Spans,
        keys: Any,
        queries: Queries | None,
    ) -> Call[Any]:
        checks.check_layer(ledger.info.spec, spans.layer)
        append = ledger.begin_append(spans.layer, spans.sequences, spans.lengths, spans.starts)
        try:
            shape = fill(request, ledger.info, spans, append.starts, keys, queries)
        except BaseException:
            ledger.fail_append(append, changed_nothing=True)
            raise

        def finish(response: Any) -> Any:
            answer = None if queries is None else _selection(response, queries, shape)
            ledger.end_append(append)
            return answer

        def fail(changed_nothing: bool) -> None:
            ledger.fail_append(append, changed_nothing)

        repeatable = bool(spans.revisions) and all(spans.revisions)
        return Call(rpc, request, deadline, finish, repeatable, ledger, fail, envelope)


def _selection(response: Any, queries: Queries, shape: tuple[int, int, int]) -> Any:
    block_ids = tensor_like(queries.tensor, "block_ids", response.block_ids, shape)
    if not queries.return_scores:
        return block_ids
    return block_ids, tensor_like(queries.tensor, "scores", response.scores, shape)


def _epoch(ledger: Ledger, epoch: int | None) -> int:
    return ledger.info.epoch if epoch is None else epoch


def _checked(timeout: float) -> float:
    if not (timeout > 0 and math.isfinite(timeout)):
        raise ValueError(f"timeout must be a positive number of seconds, got {timeout}")
    return timeout
