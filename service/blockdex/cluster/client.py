"""The client of a cluster, for threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from blockdex.client.answers import Info, SequenceState
from blockdex.client.client import Client
from blockdex.client.core import DEFAULT_TIMEOUT
from blockdex.client.requests import Integers, integer, integers
from blockdex.cluster.directory import Directory, Watch
from blockdex.cluster.routing import Batch, Router, Rows, failure_of
from blockdex.contract.errors import BlockdexError, DeadlineExceededError, NotFoundError, Reason

Answer = TypeVar("Answer")

_MOST_THREADS = 64


class ClusterClient:
    """The servers of a cluster as one: `Client`'s calls on sequences, each sent to the member that holds it.

    A sequence is where rendezvous hashing of its tenant and its root puts it: a fork is beside its parent. The client
    knows the roots of forks that it made; calls on others name them by `root_id`, one for each sequence or one for all.
    A sequence opened before a member joined is looked for by the older views of the directory.

    A batch is cut by members, sent side by side, and answered in its order. It happens entirely or not at all on each
    member. If it fails on one, the error is the member's, and its metadata have `member`, the sequences `failed` and
    those `done`. A member that is gone is UNAVAILABLE to calls on its own sequences alone. One that has lost its cache
    answers as if it had never known them.

    Pools, shared memory and device channels are of one server: `member` is its client. Threads may share a cluster
    client, and everything else is as `Client` says.

    Args:
        directory: of the members; watched from a thread.
        tenant: whose sequences these are; None: `default` for the hash, and nothing is sent.
        timeout: seconds that a call may take when it names no timeout, all its parts and attempts together.
        interval: seconds between two questions to the directory.
        options: the others of `Client`, the same for all members.

    Raises:
        OSError, ValueError: the directory cannot be read, or makes no sense.
    """

    def __init__(
        self,
        directory: Directory,
        *,
        tenant: str | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        interval: float = 1.0,
        **options: Any,
    ) -> None:
        self._connect: Callable[[str], Client] = partial(Client, tenant=tenant, timeout=timeout, **options)
        self._timeout = timeout
        self._router = Router(tenant or "default")
        self._clients: dict[str, Client] = {}
        self._lock = threading.Lock()
        self._watch = Watch(directory, self._router.take_views, interval)
        self._threads = ThreadPoolExecutor(_MOST_THREADS, "blockdex-cluster")

    def __enter__(self) -> ClusterClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Fails what is in flight, and every later call, with `CancelledError`. Sequences stay open."""
        self._watch.close()
        with self._lock:
            clients = list(self._clients.values())
        for client in clients:
            client.close()
        self._threads.shutdown()

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the members, in the order of the directory."""
        return tuple(member.name for member in self._watch.views[0].members)

    @property
    def problem(self) -> str:
        """Why the directory's last answer was not taken; empty where it was."""
        return self._watch.problem

    def member(self, name: str) -> Client:
        """The client of one member.

        Raises:
            UnavailableError: the newest view has none of that name (UNREACHABLE).
        """
        address = self._router.address(name)
        client = self._clients.get(address)
        if client is None:
            with self._lock:
                client = self._clients.get(address)
                if client is None:
                    client = self._clients[address] = self._connect(address)
        return client

    def owner(self, root_id: int) -> str:
        """The member that a new root goes to."""
        return self._router.newest(integer("root_id", root_id))

    def info(self, *, timeout: float | None = None) -> dict[str, Info | BlockdexError]:
        """What each member is, by name; the error of one that does not say."""

        def ask(member: str) -> Info | BlockdexError:
            try:
                return self.member(member).info(timeout=timeout)
            except BlockdexError as error:
                return error

        members = self.members
        return dict(zip(members, self._threads.map(ask, members), strict=True))

    def open_sequence(self, sequence_id: int, *, root_id: int | None = None, **others: Any) -> None:
        """As `Client.open_sequence`, on the member that owns the root."""
        self.open_sequences([sequence_id], root_id=root_id, **others)

    def open_sequences(self, sequences: Integers, *, root_id: Integers | None = None, **others: Any) -> None:
        """As `Client.open_sequences`: all or none of those on one member."""
        timeout = others.pop("timeout", None)
        ids = integers("sequences", sequences, bits=64)
        batch = Batch(ids, self._router.roots(ids, root_id), others)
        for sequence, root in zip(ids, batch.roots, strict=True):
            self._router.place_new(sequence, root)
        self._scatter(batch, self._deadline(timeout), Client.open_sequences)

    def get_sequence(self, sequence_id: int, *, root_id: int | None = None, **others: Any) -> SequenceState:
        """As `Client.get_sequence`."""
        return self._one(sequence_id, root_id, others, Client.get_sequence)

    def fork_sequence(
        self, parent_id: int, child_id: int, length: int, *, root_id: int | None = None, **others: Any
    ) -> tuple[int, ...]:
        """As `Client.fork_sequence`: the child is where its parent is. `root_id` is the parent's."""
        parent, child = integer("parent_id", parent_id), integer("child_id", child_id)

        def fork(client: Client, parent: int, **rest: Any) -> tuple[int, ...]:
            return client.fork_sequence(parent, child, length, **rest)

        lengths = self._one(parent, root_id, others, fork)
        root = self._router.roots([parent], root_id)[0]
        self._router.found(child, self._router.candidates(parent, root)[0], root)
        return lengths

    def truncate_sequence(
        self, sequence_id: int, length: int, *, root_id: int | None = None, **others: Any
    ) -> tuple[int, ...]:
        """As `Client.truncate_sequence`."""

        def truncate(client: Client, sequence: int, **rest: Any) -> tuple[int, ...]:
            return client.truncate_sequence(sequence, length, **rest)

        return self._one(sequence_id, root_id, others, truncate)

    def close_sequence(self, sequence_id: int, *, root_id: int | None = None, **others: Any) -> None:
        """As `Client.close_sequence`."""
        self.close_sequences([sequence_id], root_id=root_id, **others)

    def close_sequences(self, sequences: Integers, *, root_id: Integers | None = None, **others: Any) -> None:
        """As `Client.close_sequences`; what no member knows is closed already."""
        timeout = others.pop("timeout", None)
        ids = integers("sequences", sequences, bits=64)
        batch = Batch(ids, self._router.roots(ids, root_id), others)
        self._scatter(batch, self._deadline(timeout), Client.close_sequences)
        self._router.forget(ids)

    def append_keys(
        self, layer: int, *, sequences: Integers, keys: Any, root_id: Integers | None = None, **others: Any
    ) -> None:
        """As `Client.append_keys`."""
        self._tokens(Client.append_keys, layer, sequences, root_id, {**others, "keys": keys})

    def select_blocks(
        self, layer: int, *, sequences: Integers, queries: Any, root_id: Integers | None = None, **others: Any
    ) -> Any:
        """As `Client.select_blocks`, without `out`."""
        return self._tokens(Client.select_blocks, layer, sequences, root_id, {**others, "queries": queries})

    def append_and_select(
        self,
        layer: int,
        *,
        sequences: Integers,
        keys: Any,
        queries: Any,
        root_id: Integers | None = None,
        **others: Any,
    ) -> Any:
        """As `Client.append_and_select`, without `out`."""
        arguments = {**others, "keys": keys, "queries": queries}
        return self._tokens(Client.append_and_select, layer, sequences, root_id, arguments)

    def _tokens(
        self,
        call: Callable[..., Answer],
        layer: int,
        sequences: Integers,
        root_id: Integers | None,
        arguments: dict[str, Any],
    ) -> Answer:
        timeout = arguments.pop("timeout", None)
        deadline = self._deadline(timeout)
        ids = integers("sequences", sequences, bits=64)
        member = self._router.place_of_all(ids)
        if member is not None and root_id is None:
            # What calls mostly are: of sequences that one member is known to hold.
            try:
                return call(self.member(member), layer, sequences=ids, timeout=timeout, **arguments)
            except BlockdexError as error:
                if error.reason != Reason.EPOCH_MISMATCH:  # else nothing was done, and it is made anew
                    self._router.lost(ids, error)
                    raise failure_of(Batch(ids, ids, arguments), [(member, list(range(len(ids))), error)], []) from None
        batch = Batch(ids, self._router.roots(ids, root_id), arguments)

        def send(client: Client, **rest: Any) -> Answer:
            return call(client, layer, **rest)

        answer: Answer = self._scatter(batch, deadline, send)
        return answer

    def _one(
        self, sequence_id: int, root_id: int | None, others: dict[str, Any], call: Callable[..., Answer]
    ) -> Answer:
        timeout = others.pop("timeout", None)
        sequence = integer("sequence_id", sequence_id)
        batch = Batch([sequence], self._router.roots([sequence], root_id), others)

        def send(client: Client, sequences: list[int], **rest: Any) -> Answer:
            return call(client, sequences[0], **rest)

        answer: Answer = self._scatter(batch, self._deadline(timeout), send)
        return answer

    def _deadline(self, timeout: float | None) -> float:
        return time.monotonic() + (self._timeout if timeout is None else timeout)

    def _scatter(self, batch: Batch, deadline: float, send: Callable[..., Any]) -> Any:
        done: list[tuple[Rows, Any]] = []
        failures: list[tuple[str, Rows, BlockdexError]] = []
        parts = self._parts(batch, list(range(len(batch.sequences))), deadline)
        for (member, part), answer in zip(parts, self._side_by_side(batch, parts, deadline, send), strict=True):
            if isinstance(answer, BlockdexError):
                failures.append((member, part, answer))
            else:
                done.append((part, answer))
        if not failures:
            return batch.together(done)
        for _, part, error in failures:
            self._router.lost([batch.sequences[row] for row in part], error)
        raise failure_of(batch, failures, done)

    def _parts(self, batch: Batch, rows: Rows, deadline: float) -> list[tuple[str, Rows]]:
        """Rows by the member that holds them."""
        parts: dict[str, Rows] = {}
        for row in rows:
            parts.setdefault(self._place(batch.sequences[row], batch.roots[row], deadline), []).append(row)
        return list(parts.items())

    def _place(self, sequence: int, root: int, deadline: float) -> str:
        """The member that holds a sequence; where several may, they are asked. The likeliest where none knows it."""
        members = self._router.candidates(sequence, root) or [self._router.newest(root)]
        if len(members) > 1:
            for member in members:
                try:
                    self.member(member).get_sequence(sequence, epoch=0, timeout=_remaining(deadline))
                except NotFoundError as error:
                    if error.reason != Reason.UNKNOWN_SEQUENCE:
                        raise
                else:
                    self._router.found(sequence, member, root)
                    return member
        return members[0]

    def _side_by_side(
        self, batch: Batch, parts: Sequence[tuple[str, Rows]], deadline: float, send: Callable[..., Any]
    ) -> list[Any]:
        """The answer of each part, or the error that it failed with; the first part is this thread's own."""
        calls = [partial(self._send, member, batch.part(part), deadline, send) for member, part in parts]
        others = [self._threads.submit(call) for call in calls[1:]]
        return [calls[0](), *(other.result() for other in others)] if calls else []

    def _send(self, member: str, arguments: dict[str, Any], deadline: float, send: Callable[..., Any]) -> Any:
        try:
            client = self.member(member)
            try:
                return send(client, timeout=_remaining(deadline), **arguments)
            except BlockdexError as error:
                # The member was born anew, and has refused without doing anything: its new self says what it has.
                if error.reason != Reason.EPOCH_MISMATCH or arguments.get("epoch") is not None:
                    raise
                return send(client, timeout=_remaining(deadline), **arguments)
        except BlockdexError as error:
            return error


def _remaining(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise DeadlineExceededError("no answer of all members within the timeout", Reason.DEADLINE_EXCEEDED)
    return seconds
