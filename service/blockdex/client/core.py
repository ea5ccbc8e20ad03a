"""What both clients do alike: requests out of arguments, answers out of responses, and what a failure means."""

from __future__ import annotations

import math
import threading
import time
from typing import Any

import numpy as np

from blockdex.client.answers import SequenceState, info_of
from blockdex.client.call import Call
from blockdex.client.failures import message_of
from blockdex.client.kinds import APPEND_AND_SELECT, APPEND_KEYS, SELECT_BLOCKS, Kind
from blockdex.client.ledger import Append, Ledger
from blockdex.client.requests import Integers, Named, Queries, Shape, integer, spans_of
from blockdex.client.selection import selection_of
from blockdex.contract import limits as checks
from blockdex.v1 import indexer_pb2 as pb

DEFAULT_TIMEOUT = 30.0
"""Seconds that a call may take when neither it nor its client names a timeout."""

_LONGEST_TIMEOUT = 1e9
"""Seconds: 31 years, and as long as any timeout beyond. Threads cannot wait for 10 times as long, nor can gRPC."""

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
        # A finalizer that closes a sequence may ask anew in the middle of taking up an answer; its own is as good.
        self._lock = threading.RLock()
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

        def finish(answer: bytes) -> Ledger:
            response = message_of(pb.GetInfoResponse, answer)
            info = info_of(response)
            with self._lock:
                ledger = self.ledger
                if ledger is None or ledger.info.epoch != info.epoch:
                    ledger = self._ledger = Ledger(info)
                else:
                    ledger.learn(info)
                return ledger

        return Call("GetInfo", pb.GetInfoRequest().SerializeToString(), deadline, finish, repeatable=True)

    def open_sequence(
        self, ledger: Ledger, deadline: float, sequence_id: int, lease_seconds: int, epoch: int | None
    ) -> Call[None]:
        """OpenSequence; from the answer on, every length is 0."""
        sequence_id = integer("sequence_id", sequence_id)
        lease_seconds = integer("lease_seconds", lease_seconds, bits=32)
        request = pb.OpenSequenceRequest(
            sequence_id=sequence_id, lease_seconds=lease_seconds, epoch=_epoch(ledger, epoch)
        )

        def finish(answer: bytes) -> None:
            message_of(pb.OpenSequenceResponse, answer)
            ledger.open(sequence_id, [0] * ledger.info.spec.num_layers)

        return Call(
            "OpenSequence",
            request.SerializeToString(),
            deadline,
            finish,
            repeatable=False,
            ledger=ledger,
            epoch=request.epoch,
        )

    def get_sequence(self, ledger: Ledger, deadline: float, sequence_id: int, epoch: int | None) -> Call[SequenceState]:
        """GetSequence; the answer settles lengths that are unknown."""
        sequence_id = integer("sequence_id", sequence_id)
        request = pb.GetSequenceRequest(sequence_id=sequence_id, epoch=_epoch(ledger, epoch))
        watch = ledger.begin_question(sequence_id)

        def finish(answer: bytes) -> SequenceState:
            response = message_of(pb.GetSequenceResponse, answer)
            state = SequenceState(tuple(response.lengths), tuple(response.revisions), response.epoch)
            ledger.end_question(watch, state.lengths)
            return state

        return Call(
            "GetSequence",
            request.SerializeToString(),
            deadline,
            finish,
            repeatable=True,
            ledger=ledger,
            epoch=request.epoch,
        )

    def fork_sequence(
        self, ledger: Ledger, deadline: float, parent_id: int, child_id: int, length: int, epoch: int | None
    ) -> Call[tuple[int, ...]]:
        """ForkSequence; the answer is the child's lengths."""
        parent_id, child_id = integer("parent_id", parent_id), integer("child_id", child_id)
        checks.check_length(ledger.info.spec, parent_id, length)
        request = pb.ForkSequenceRequest(
            parent_id=parent_id, child_id=child_id, length=length, epoch=_epoch(ledger, epoch)
        )

        def finish(answer: bytes) -> tuple[int, ...]:
            response = message_of(pb.ForkSequenceResponse, answer)
            lengths = tuple(response.lengths)
            ledger.open(child_id, lengths)
            return lengths

        return Call(
            "ForkSequence",
            request.SerializeToString(),
            deadline,
            finish,
            repeatable=False,
            ledger=ledger,
            epoch=request.epoch,
        )

    def truncate_sequence(
        self, ledger: Ledger, deadline: float, sequence_id: int, length: int, epoch: int | None
    ) -> Call[tuple[int, ...]]:
        """TruncateSequence; the answer is the sequence's lengths."""
        sequence_id = integer("sequence_id", sequence_id)
        checks.check_length(ledger.info.spec, sequence_id, length)
        request = pb.TruncateSequenceRequest(sequence_id=sequence_id, length=length, epoch=_epoch(ledger, epoch))
        watch = ledger.begin_truncation(sequence_id)

        def finish(answer: bytes) -> tuple[int, ...]:
            response = message_of(pb.TruncateSequenceResponse, answer)
            lengths = tuple(response.lengths)
            ledger.end_truncation(watch, lengths)
            return lengths

        def fail(changed_nothing: bool) -> None:
            ledger.fail_truncation(watch, changed_nothing)

        return Call(
            "TruncateSequence",
            request.SerializeToString(),
            deadline,
            finish,
            repeatable=False,
            ledger=ledger,
            fail=fail,
            epoch=request.epoch,
        )

    def close_sequence(self, ledger: Ledger, deadline: float, sequence_id: int, epoch: int | None) -> Call[None]:
        """CloseSequence; closing what is closed already is fine, so it may be repeated."""
        sequence_id = integer("sequence_id", sequence_id)
        request = pb.CloseSequenceRequest(sequence_id=sequence_id, epoch=_epoch(ledger, epoch))

        def finish(answer: bytes) -> None:
            message_of(pb.CloseSequenceResponse, answer)
            ledger.close(sequence_id)

        return Call(
            "CloseSequence",
            request.SerializeToString(),
            deadline,
            finish,
            repeatable=True,
            ledger=ledger,
            epoch=request.epoch,
        )

    def append_keys(self, ledger: Ledger, deadline: float, named: Named, keys: Any) -> Call[None]:
        """AppendKeys."""
        return self._append(APPEND_KEYS, ledger, deadline, named, keys, None)

    def append_and_select(
        self, ledger: Ledger, deadline: float, named: Named, keys: Any, queries: Queries
    ) -> Call[Any]:
        """AppendAndSelect."""
        return self._append(APPEND_AND_SELECT, ledger, deadline, named, keys, queries)

    def select_blocks(self, ledger: Ledger, deadline: float, named: Named, queries: Queries) -> Call[Any]:
        """SelectBlocks; without starts it asks for the last positions."""
        spans = spans_of(*named, name="queries", tensor=queries.tensor)
        checks.check_layer(ledger.info.spec, spans.layer)
        starts = spans.starts
        if starts is None:
            starts = ledger.last_positions(spans.layer, spans.sequences, spans.lengths)
        request, shape = ledger.writer.write(SELECT_BLOCKS, spans, starts, None, queries)

        def finish(answer: bytes) -> Any:
            return selection_of(SELECT_BLOCKS, answer, queries, shape)

        return Call(
            SELECT_BLOCKS.rpc,
            request,
            deadline,
            finish,
            repeatable=True,
            ledger=ledger,
            epoch=_epoch(ledger, spans.epoch),
            kind=SELECT_BLOCKS,
        )

    def _append(
        self, kind: Kind, ledger: Ledger, deadline: float, named: Named, keys: Any, queries: Queries | None
    ) -> Call[Any]:
        request, shape, append = ledger.write_append(kind, named, keys, queries) or _begin_append(
            kind, ledger, named, keys, queries
        )
        *_, revisions, epoch = named

        def finish(answer: bytes) -> Any:
            if queries is None:
                message_of(pb.AppendKeysResponse, answer)
                result = None
            else:
                result = selection_of(kind, answer, queries, shape)
            ledger.end_append(append)
            return result

        def fail(changed_nothing: bool) -> None:
            ledger.fail_append(append, changed_nothing)

        return Call(
            kind.rpc,
            request,
            deadline,
            finish,
            repeatable=_are_all_checked(revisions),
            ledger=ledger,
            fail=fail,
            epoch=_epoch(ledger, epoch),
            kind=kind,
        )


def _are_all_checked(revisions: Integers | None) -> bool:
    if revisions is None:
        return False
    if isinstance(revisions, list):
        return bool(revisions) and all(revisions)
    return np.size(revisions) > 0 and bool(np.all(revisions))


def _begin_append(
    kind: Kind, ledger: Ledger, named: Named, keys: Any, queries: Queries | None
) -> tuple[bytes, Shape, Append]:
    """As `Ledger.write_append`, of whatever may be appended."""
    spans = spans_of(*named, name="keys", tensor=keys)
    checks.check_layer(ledger.info.spec, spans.layer)
    append = ledger.begin_append(spans.layer, spans.sequences, spans.lengths, spans.starts)
    try:
        request, shape = ledger.writer.write(kind, spans, append.starts, keys, queries)
    except BaseException:
        ledger.fail_append(append, changed_nothing=True)
        raise
    return request, shape, append


def _epoch(ledger: Ledger, epoch: int | None) -> int:
    return ledger.info.epoch if epoch is None else integer("epoch", epoch)


def _checked(timeout: float) -> float:
    if not 0 < timeout < math.inf:
        raise ValueError(f"timeout must be a positive number of seconds, got {timeout}")
    return min(timeout, _LONGEST_TIMEOUT)
