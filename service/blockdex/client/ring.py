"""What the ring transports of both clients do alike: links to a server on the same host, and what goes over them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from blockdex.client.answers import Info, SequenceState
from blockdex.client.call import Call
from blockdex.client.core import Core
from blockdex.client.failures import reason_of
from blockdex.client.frames import Message
from blockdex.client.shared_regions import Regions, SharedRegion
from blockdex.contract.errors import BlockdexError, Reason, UnauthenticatedError, UnavailableError, error_of
from blockdex.contract.limits import check_even_columns
from blockdex.ring import SUPPORTED, layout
from blockdex.v1 import indexer_pb2 as pb

if TYPE_CHECKING:
    from blockdex._native import RequestAnswer, RequestRefusal, RingConnection

_RING = "ring:"
_SPIN_SECONDS = 100e-6
"""A call of a few sequences is answered by then."""
_SPINNING_CORES = 4


class Question(NamedTuple):
    """What is asked beside a ring of a region: a JSON object, and the files that come with it."""

    text: str
    files: tuple[int, ...]
    region: SharedRegion


class Link:
    """A link to a server, and what of its client's memory the server has over it.

    Args:
        connection: the link itself.
    """

    def __init__(self, connection: RingConnection) -> None:
        self.connection = connection
        self._has: Regions = ()
        self._numbers: dict[SharedRegion, int] = {}

    def question(self, regions: Regions) -> Question | None:
        """What to ask next, so that the server has these regions and no other; None where that is so."""
        if self._has is regions:
            return None
        for region, number in self._numbers.items():
            if region not in regions:
                self.connection.take_back(number)
                return Question(json.dumps({"release": number}), (), region)
        for region in regions:
            if region not in self._numbers:
                words = {"share": region.memory.kind, **region.memory.words}
                return Question(json.dumps(words), (region.memory.fd,), region)
        self._has = regions
        return None

    def settle(self, question: Question, reply: bytes | RequestRefusal) -> None:
        """Takes up the reply; a region that requests still use is asked for again.

        Raises:
            BlockdexError: it is refused.
        """
        region, released = question.region, question.region in self._numbers
        if isinstance(reply, tuple):
            refusal = refusal_of(reply)
            if released and refusal.reason == Reason.OVERLOADED:
                return
            raise refusal
        if released:
            del self._numbers[region]
            return
        number = self._numbers[region] = int(json.loads(reply)["answer"]["region"])
        self.connection.lend(region.memory.address, region.bytes, number)


def socket_of(info: Info) -> str:
    """Path of the socket that a server offers to clients on its host; empty where it offers none."""
    return next((each.removeprefix(_RING) for each in info.transports if each.startswith(_RING)), "")


def socket_to(core: Core, info: Info) -> str:
    """Path of the socket of the server that said this of itself.

    Raises:
        UnavailableError: it offers no ring (UNREACHABLE).
    """
    path = socket_of(info)
    if not path:
        message = f"{core.address} offers no ring: it was started without --socket"
        raise UnavailableError(message, Reason.UNREACHABLE)
    return path


def obstacle(core: Core, info: Info, timeout: float) -> str:
    """Why a client cannot use the ring of such a server, as a sentence; empty where it can."""
    if not SUPPORTED:
        return "this install has no compiled module: the ring needs Linux on x86-64 or aarch64"
    path = socket_of(info)
    if not path:
        return "the server offers no ring: it was started without --socket"
    try:
        connection = open_link(core, info, timeout)
    except BlockdexError as error:
        return error.message
    epoch = connection.epoch
    connection.close()
    if epoch != info.epoch:
        return f"another server listens on {path}: its epoch is {epoch}, the one that was asked has {info.epoch}"
    return ""


def open_link(core: Core, info: Info, timeout: float, *, room_seconds: float = 2.0) -> RingConnection:
    """A link to the server that said this of itself.

    Raises:
        UnavailableError: it offers no ring, or cannot be reached over it (UNREACHABLE).
        UnauthenticatedError: it does not let this process in (UNKNOWN_CREDENTIALS).
    """
    import blockdex._native as native  # noqa: PLC0415 - not in every install

    path = socket_to(core, info)
    spins = len(os.sched_getaffinity(0)) >= _SPINNING_CORES
    try:
        return native.RingConnection(
            path,
            core.tenant or "",
            timeout,
            num_heads=info.spec.num_index_heads,
            max_spans=info.limits.max_spans,
            max_message_bytes=info.limits.max_message_bytes,
            spin_seconds=_SPIN_SECONDS if spins else 0.0,
            room_seconds=room_seconds,
        )
    except PermissionError as error:
        raise UnauthenticatedError(str(error), Reason.UNKNOWN_CREDENTIALS) from None
    except OSError as error:
        raise UnavailableError(str(error), Reason.UNREACHABLE) from None


def submit(connection: RingConnection, call: Call[Any], timeout: float) -> int:
    """Sends a call; its ticket.

    Raises:
        BlockdexError: no slot can carry it, there is no room for it, or the link is over.
    """
    request: Any = call.request  # of a data call the compiled one, where there are rings
    if isinstance(request, Message):
        ticket = connection.submit_sequences(*_slot_of(request.body), timeout)
    else:
        ticket = request.submit(connection, timeout)
    if isinstance(ticket, int):
        return ticket
    raise refusal_of(ticket)


def answer_of(call: Call[Any], answer: RequestAnswer | RequestRefusal) -> Any:
    """What an answer holds, as `blockdex.client.frames.plain` has it.

    Raises:
        BlockdexError: it is a refusal.
    """
    if len(answer) == 3:
        raise refusal_of(answer)
    _, epoch, _, first, second = answer
    if call.kind.number >= 0:
        return first, second
    lengths = () if first is None else np.frombuffer(first, "<i8").tolist()
    revisions = () if second is None else np.frombuffer(second, "<u8").tolist()
    return SequenceState(tuple(lengths), tuple(revisions), epoch)


def refusal_of(refusal: RequestRefusal) -> BlockdexError:
    """The exception that a refusal stands for."""
    code, reason, text = refusal
    message, *numbers = text.split("\n")
    named = (each.partition("=") for each in numbers)
    return error_of(code, message, reason_of(reason), {name: value for name, _, value in named})


def take_up_events(connection: RingConnection, core: Core) -> None:
    """Takes up what the server has told over a link."""
    for event in map(json.loads, connection.take_events()):
        match event:
            case {"new_epoch": int(epoch)}:
                core.take_up((), epoch)
            case {"evicted": list(ids)}:
                core.take_up(ids)


def _slot_of(request: Any) -> tuple[int, int, int, int, int, int, bytes]:
    """Kind, epoch, ids, number, rows and columns of a request about sequences or pools, as its slot has them."""
    epoch = request.header.epoch
    match request:
        case pb.OpenSequencesRequest(sequences=opened):
            columns = [[each.sequence_id for each in opened], [each.lease_seconds for each in opened]]
            slot = layout.OPEN, 0, 0, 0, len(opened), _words(*columns)
        case pb.CloseSequencesRequest(sequence_ids=ids):
            slot = layout.CLOSE, 0, 0, 0, len(ids), _words(ids)
        case pb.ForkSequenceRequest():
            slot = layout.FORK, request.parent_id, request.child_id, request.length, 0, b""
        case pb.TruncateSequenceRequest():
            slot = layout.TRUNCATE, request.sequence_id, 0, request.length, 0, b""
        case pb.CreatePoolRequest(pool_id=pool, num_pages=pages, num_rows=rows, max_blocks=blocks):
            slot = layout.CREATE_POOL, pool, blocks, pages, rows, b""
        case pb.SetPageTablesRequest(rows=rows, first_blocks=first_blocks, counts=counts, page_ids=pages):
            check_even_columns(rows=rows, first_blocks=first_blocks, counts=counts)
            cells = _words(rows, first_blocks, counts, pages)
            slot = layout.SET_PAGE_TABLES, request.pool_id, 0, len(pages), len(rows), cells
        case pb.ClosePoolRequest():
            slot = layout.CLOSE_POOL, request.pool_id, 0, 0, 0, b""
        case _:
            slot = layout.GET, request.sequence_id, 0, 0, 0, b""
    kind, *numbers = slot
    return kind, epoch, *numbers


def _words(*columns: Iterable[int]) -> bytes:
    return b"".join(np.array(list(column), "<u8").tobytes() for column in columns)
