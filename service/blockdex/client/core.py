"""What both clients do alike: requests out of arguments, answers out of responses, and what a failure means."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockdex.client.answers import Info, SequenceState
from blockdex.client.call import Call, Result, nothing_to_settle
from blockdex.client.endpoint import Endpoint
from blockdex.client.forking import check_process
from blockdex.client.frames import Message
from blockdex.client.kinds import (
    APPEND_AND_SELECT,
    APPEND_KEYS,
    CLOSE_POOL,
    CLOSE_SEQUENCES,
    CREATE_POOL,
    FORK_SEQUENCE,
    GET_INFO,
    GET_SEQUENCE,
    GET_STATS,
    OPEN_SEQUENCES,
    SELECT_BLOCKS,
    SET_PAGE_TABLES,
    TRUNCATE_SEQUENCE,
    Kind,
)
from blockdex.client.ledger import Ledger
from blockdex.client.requests import Arguments, Integers, Scores, Selected, Shape, codec, integer, integers
from blockdex.client.shared_regions import Regions, SharedRegion, answer_into, array_of
from blockdex.client.tensors import array_like
from blockdex.contract import limits as checks
from blockdex.contract.errors import InvalidArgumentError, Reason
from blockdex.contract.messages import Totals
from blockdex.v1 import indexer_pb2 as pb

DEFAULT_TIMEOUT = 30.0
"""Seconds that a call may take when neither it nor its client names a timeout."""

_LONGEST_TIMEOUT = 1e9
"""Seconds: 31 years, and as long as any timeout beyond. Threads cannot wait for 10 times as long, nor can gRPC."""


class Core:
    """One client's settings and what it knows of the server. Safe to share between threads.

    The methods named after RPCs build a `Call`; sending it is the client's part.

    Args:
        endpoint: the server, and how it and the client know each other.
        tenant: sent as the metadata `blockdex-tenant`; None sends none.
        timeout: seconds that a call may take that names none.

    Attributes:
        endpoint: as above.
        address: its.
        codec: what writes data calls, and reads their answers.
        regions: memory that the client shares, if its transport can.

    Raises:
        InvalidArgumentError: the tenant cannot be (INVALID_TENANT).
        RuntimeError: a client was made before this process was forked.
        ValueError: the timeout is not a positive, finite number.
    """

    def __init__(self, endpoint: Endpoint, tenant: str | None, timeout: float) -> None:
        if tenant is not None:
            checks.check_tenant(tenant)
        self.endpoint = endpoint
        self.address = endpoint.address
        self.tenant = tenant
        self.codec = codec()
        self.regions: Regions = ()
        self._timeout = _checked(timeout)
        # A finalizer that closes a sequence may ask anew in the middle of taking up an answer; its own is as good.
        self._lock = threading.RLock()
        self._ledger: Ledger | None = None
        check_process()

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Of the next call or stream."""
        return self.endpoint.metadata(self.tenant)

    @property
    def ledger(self) -> Ledger | None:
        """What is known of the server; None before its first answer, and after it said that its epoch is another."""
        ledger = self._ledger
        return None if ledger is None or ledger.over else ledger

    def deadline(self, timeout: float | None) -> float:
        """`time.monotonic()` by which a call that begins now must have ended.

        Raises:
            RuntimeError: this process was forked from the client's.
            ValueError: the timeout is not a positive, finite number.
        """
        check_process()
        return time.monotonic() + (self._timeout if timeout is None else _checked(timeout))

    def take_up(self, evicted: Iterable[int], new_epoch: int | None = None) -> None:
        """Takes up what the server tells of: sequences that it has evicted, and that its cache was born anew."""
        ledger = self._ledger
        if ledger is None:
            return
        if new_epoch is not None:
            ledger.over |= new_epoch != ledger.info.epoch
        ledger.evict(evicted)

    def share(self, region: SharedRegion) -> None:
        """The client shares one more region."""
        with self._lock:
            self.regions = (*self.regions, region)

    def release(self, region: SharedRegion) -> None:
        """The client does not share a region any more."""
        with self._lock:
            self.regions = tuple(each for each in self.regions if each is not region)

    def get_info(self, deadline: float) -> Call[Ledger]:
        """GetInfo. The answer is what the client knows from then on; a new epoch drops every length."""

        def finish(info: Info) -> Ledger:
            with self._lock:
                ledger = self.ledger
                if ledger is None or ledger.info.epoch != info.epoch:
                    ledger = self._ledger = Ledger(info, self.codec, self._array_of)
                else:
                    ledger.info = info
                return ledger

        return Call(GET_INFO, Message(GET_INFO, pb.GetInfoRequest()), deadline, finish, repeatable=True)

    def get_stats(self, deadline: float) -> Call[Totals]:
        """GetStats."""
        return Call(GET_STATS, Message(GET_STATS, pb.GetStatsRequest()), deadline, _itself, repeatable=True)

    def open_sequences(
        self, ledger: Ledger, deadline: float, sequences: Integers, lease_seconds: Integers, epoch: int | None
    ) -> Call[None]:
        """OpenSequences; from the answer on, every length is 0. Opening again what is empty still is fine."""
        ids = integers("sequences", sequences, bits=64)
        leases = integers("lease_seconds", lease_seconds, bits=32)
        if len(leases) == 1:
            leases *= len(ids)
        if len(leases) != len(ids):
            raise InvalidArgumentError(
                f"lease_seconds: must be 1 or as many as the {len(ids)} sequences, got {len(leases)}",
                Reason.INVALID_SPANS,
            )
        request = pb.OpenSequencesRequest(
            sequences=[
                pb.NewSequence(sequence_id=sequence, lease_seconds=lease)
                for sequence, lease in zip(ids, leases, strict=True)
            ]
        )

        def finish(_: SequenceState) -> None:
            for sequence in ids:
                ledger.open(sequence, [0] * ledger.info.spec.num_layers)

        return _call(OPEN_SEQUENCES, ledger, deadline, request, epoch, finish, repeatable=True)

    def get_sequence(self, ledger: Ledger, deadline: float, sequence_id: int, epoch: int | None) -> Call[SequenceState]:
        """GetSequence; the answer settles lengths that are unknown."""
        sequence_id = integer("sequence_id", sequence_id)
        request = pb.GetSequenceRequest(sequence_id=sequence_id)
        watch = ledger.begin_question(sequence_id)

        def finish(state: SequenceState) -> SequenceState:
            ledger.end_question(watch, state.lengths)
            return state

        return _call(GET_SEQUENCE, ledger, deadline, request, epoch, finish, repeatable=True)

    def fork_sequence(
        self, ledger: Ledger, deadline: float, parent_id: int, child_id: int, length: int, epoch: int | None
    ) -> Call[tuple[int, ...]]:
        """ForkSequence; the answer is the child's lengths."""
        parent_id, child_id = integer("parent_id", parent_id), integer("child_id", child_id)
        length = integer("length", length, bits=32, reason=Reason.INVALID_LENGTH)
        request = pb.ForkSequenceRequest(parent_id=parent_id, child_id=child_id, length=length)

        def finish(child: SequenceState) -> tuple[int, ...]:
            ledger.open(child_id, child.lengths)
            return child.lengths

        return _call(FORK_SEQUENCE, ledger, deadline, request, epoch, finish, repeatable=False)

    def truncate_sequence(
        self, ledger: Ledger, deadline: float, sequence_id: int, length: int, epoch: int | None
    ) -> Call[tuple[int, ...]]:
        """TruncateSequence; the answer is the sequence's lengths."""
        sequence_id = integer("sequence_id", sequence_id)
        length = integer("length", length, bits=32, reason=Reason.INVALID_LENGTH)
        request = pb.TruncateSequenceRequest(sequence_id=sequence_id, length=length)
        watch = ledger.begin_truncation(sequence_id)

        def finish(cut: SequenceState) -> tuple[int, ...]:
            ledger.end_truncation(watch, cut.lengths)
            return cut.lengths

        def fail(changed_nothing: bool) -> None:
            ledger.fail_truncation(watch, changed_nothing)

        return _call(TRUNCATE_SEQUENCE, ledger, deadline, request, epoch, finish, repeatable=False, fail=fail)

    def close_sequences(self, ledger: Ledger, deadline: float, sequences: Integers, epoch: int | None) -> Call[None]:
        """CloseSequences; closing what is closed already is fine, so it may be repeated."""
        ids = integers("sequences", sequences, bits=64)
        request = pb.CloseSequencesRequest(sequence_ids=ids)

        def finish(_: SequenceState) -> None:
            for sequence in ids:
                ledger.close(sequence)

        return _call(CLOSE_SEQUENCES, ledger, deadline, request, epoch, finish, repeatable=True)

    def pool_id(self, pool_id: int) -> int:
        """The id of a pool; 0 stands for none.

        Raises:
            InvalidArgumentError: it is no such id (INVALID_POOL).
        """
        pool_id = integer("pool_id", pool_id, reason=Reason.INVALID_POOL)
        if not pool_id:
            raise InvalidArgumentError("pool_id must be at least 1, got 0", Reason.INVALID_POOL)
        return pool_id

    def create_pool(
        self,
        ledger: Ledger,
        deadline: float,
        pool_id: int,
        num_pages: int,
        num_rows: int,
        max_blocks: int,
        epoch: int | None,
    ) -> Call[None]:
        """CreatePool. Creating again what is still as it was created is fine."""
        request = pb.CreatePoolRequest(
            pool_id=self.pool_id(pool_id),
            num_pages=integer("num_pages", num_pages, bits=32, reason=Reason.INVALID_POOL),
            num_rows=integer("num_rows", num_rows, bits=32, reason=Reason.INVALID_POOL),
            max_blocks=integer("max_blocks", max_blocks, bits=32, reason=Reason.INVALID_POOL),
        )
        return _call(CREATE_POOL, ledger, deadline, request, epoch, _done, repeatable=True)

    def set_page_tables(
        self,
        ledger: Ledger,
        deadline: float,
        pool_id: int,
        rows: Integers,
        first_blocks: Integers,
        counts: Integers | None,
        page_ids: Integers,
        epoch: int | None,
    ) -> Call[None]:
        """SetPageTables. Nobody repeats it: that could undo what was set since."""

        def column(name: str, value: Integers) -> list[int]:
            flat = value.reshape(-1) if isinstance(value, np.ndarray) else value
            return integers(name, flat, bits=32, reason=Reason.INVALID_POOL)

        request = pb.SetPageTablesRequest(
            pool_id=self.pool_id(pool_id),
            rows=column("rows", rows),
            first_blocks=column("first_blocks", first_blocks),
            page_ids=column("page_ids", page_ids),
        )
        runs, pages = len(request.rows), len(request.page_ids)
        if len(request.first_blocks) == 1:
            request.first_blocks[:] = [request.first_blocks[0]] * runs
        if counts is not None:
            request.counts.extend(column("counts", counts))
        elif runs and pages % runs == 0:
            request.counts.extend([pages // runs] * runs)
        else:
            raise InvalidArgumentError(
                f"counts: may be left out where each row gets equally many cells, got {pages} page_ids for {runs} rows",
                Reason.INVALID_POOL,
            )
        return _call(SET_PAGE_TABLES, ledger, deadline, request, epoch, _done, repeatable=False)

    def close_pool(self, ledger: Ledger, deadline: float, pool_id: int, epoch: int | None) -> Call[None]:
        """ClosePool; closing what is closed already is fine, so it may be repeated."""
        request = pb.ClosePoolRequest(pool_id=self.pool_id(pool_id))
        return _call(CLOSE_POOL, ledger, deadline, request, epoch, _done, repeatable=True)

    def append_keys(self, ledger: Ledger, deadline: float, arguments: Arguments) -> Call[None]:
        """AppendKeys."""
        return self._append(APPEND_KEYS, ledger, deadline, arguments, _nothing)

    def append_and_select(
        self, ledger: Ledger, deadline: float, arguments: Arguments, queries: Any, return_scores: Scores, out: Any
    ) -> Call[Any]:
        """AppendAndSelect."""
        read = _selection_like(queries, return_scores, out)
        return self._append(APPEND_AND_SELECT, ledger, deadline, arguments, read, out, return_scores)

    def select_blocks(
        self, ledger: Ledger, deadline: float, arguments: Arguments, queries: Any, return_scores: Scores, out: Any
    ) -> Call[Any]:
        """SelectBlocks; without starts it asks for the last positions."""
        request = ledger.make(SELECT_BLOCKS.number, *arguments)
        if out is not None:
            answer_into(request, self.regions, out, return_scores)
        ledger.place_selection(request)
        read = _selection_like(queries, return_scores, out)

        def finish(selected: Selected) -> Any:
            return read(selected, request.shape)

        return Call(SELECT_BLOCKS, request, deadline, finish, True, ledger, epoch=request.epoch)

    def _append(
        self,
        kind: Kind,
        ledger: Ledger,
        deadline: float,
        arguments: Arguments,
        read: Callable[[Selected, Shape], Result],
        out: Any = None,
        return_scores: Scores = False,
    ) -> Call[Result]:
        request = ledger.make(kind.number, *arguments)
        if out is not None:
            answer_into(request, self.regions, out, return_scores)
        ledger.begin_append(request)

        def finish(selected: Selected) -> Result:
            result = read(selected, request.shape)
            ledger.end_append(request)
            return result

        def fail(changed_nothing: bool) -> None:
            ledger.fail_append(request, changed_nothing)

        return Call(kind, request, deadline, finish, request.repeatable, ledger, fail, request.epoch)

    def _array_of(self, name: str, tensor: Any) -> tuple[NDArray[Any], bool]:
        return array_of(self.regions, name, tensor)


def _call(
    kind: Kind,
    ledger: Ledger,
    deadline: float,
    request: Any,
    epoch: int | None,
    finish: Callable[[Any], Result],
    *,
    repeatable: bool,
    fail: Callable[[bool], None] = nothing_to_settle,
) -> Call[Result]:
    """A call about sequences; without an epoch it names the one that the client knows."""
    named = ledger.info.epoch if epoch is None else integer("epoch", epoch)
    request.header.epoch = named
    message = Message(kind, request)
    return Call(kind, message, deadline, finish, repeatable, ledger, fail, named)


def _done(_: SequenceState) -> None:
    """What a call is answered with that only has to be done."""


def _itself(answer: Result) -> Result:
    return answer


def _nothing(selected: Selected, shape: Shape) -> None:
    """What an append is answered with."""


def _selection_like(queries: Any, return_scores: Scores, out: Any) -> Callable[[Selected, Shape], Any]:
    """Makes block ids, or the pair of them and their scores, as the queries are; they may be in `out` already."""

    def read(selected: Selected, shape: Shape) -> Any:
        if out is not None:
            return out
        block_ids = array_like(queries, "block_ids", selected[0], "int32", shape)
        if return_scores is False:
            return block_ids
        return block_ids, array_like(queries, "scores", selected[1], "float32", shape)

    return read


def _checked(timeout: float) -> float:
    if not 0 < timeout < math.inf:
        raise ValueError(f"timeout must be a positive number of seconds, got {timeout}")
    return min(timeout, _LONGEST_TIMEOUT)
