"""The compiled part: see `csrc/`."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

NOTICED: int
FOR_PYTHON: int
SET_CELLS: int
LATE: int
BROKEN: int
MAX_RUNS: int
MAX_TOKENS: int
STEPS: int
SIGNALS: int
MAX_REGIONS: int

class ServerLink:
    """One link, as the engine's thread sees it: requests come off it, answers go onto it.

    Args:
        segment: the shared memory, a `Segment` that this process has made.
        bell: the engine's end of the datagram pair that the client sleeps on.
        own_bell: the engine's end of the pair that the engine sleeps on.
        tenant: of all its requests; without one each names its own.

    Attributes:
        memory: the segment's bytes.
        filled: requests that are there and were not taken; -1 where the frontend says what cannot be.
        waits: whether the oldest one is for Python to take now; of who does not read its answers, none is.
        gone: whether nobody is there to be answered.
        crowded: whether Python has answers that wait for room.
        longest: bytes of an answer that there is room for at some time.
        has_unwritten: whether answers wait for room, of those that the core wrote.
    """

    def __init__(self, segment: object, bell: int, own_bell: int, tenant: str = "") -> None: ...
    @property
    def memory(self) -> memoryview: ...
    @property
    def filled(self) -> int: ...
    @property
    def waits(self) -> bool: ...
    gone: bool
    crowded: bool
    @property
    def longest(self) -> int: ...
    @property
    def has_unwritten(self) -> bool: ...
    def head(self) -> int:
        """Offset in the segment of the oldest request's slot, which stays as it is until `release`."""

    def release(self) -> None:
        """Gives the oldest request's slot back."""

    def claim(self, num_bytes: int, /) -> tuple[int, int, int] | None:
        """Offset in the segment of a slot for an answer; offset in the arena and end of room for what it carries.

        None while there is none of either.
        """

    def share(self, region: object, /) -> int:
        """Enters a region, by its `address`, `bytes` and `on_device`, that requests may name; its number, not 0.

        Raises:
            ValueError: there are `MAX_REGIONS` already.
        """

    def make_channel(self, memory: object, bound_seconds: float, epoch: int, /) -> int:
        """Makes it a channel, before a core serves it: a GPU writes its requests. The number of its memory, a region.

        Raises:
            ValueError: the memory has no room for what a channel counts, or the bound is not above 0.
        """

    def give_back(self, region: int, /) -> bool:
        """Has no request name a region any more; whether none uses it, and it was let go of. Else ask again.

        Raises:
            KeyError: the link has none of that number.
        """

    def wait_for_room(self) -> None:
        """Has the engine's bell rung when there is room again; who has said so looks once more."""

    def publish(self) -> None:
        """Shows the frontend what was written, and wakes it if it sleeps."""

class SequenceIndex:
    """Which entry each open sequence, and each pool, has: the one index of both, whose ids are apart.

    Its hash is keyed at random in each process, so ids cannot be chosen to collide; it takes memory by what it holds.
    Its length is the number of sequences, which other threads may ask for too.
    """

    def __init__(self) -> None: ...
    def __len__(self) -> int: ...
    @property
    def num_pools(self) -> int:
        """Pools that there are."""

    def open(self, tenant: str, sequence_id: int, entry: int, pool: bool = False, /) -> int:
        """Enters a sequence, or a pool; the tenant's number, which is its own while it has open sequences or requests.

        Raises:
            ValueError: it is open already.
        """

    def close(self, tenant_number: int, sequence_id: int, pool: bool = False, /) -> None:
        """Takes a sequence, or a pool, out.

        Raises:
            KeyError: it is not open.
        """

    def find(self, tenant: str, sequence_id: int, pool: bool = False, /) -> int | None:
        """The entry of a sequence, or a pool; None where it is not open."""

    def tenant(self, number: int, /) -> str:
        """The tenant of a number.

        Raises:
            KeyError: it is nobody's.
        """

Bounds = tuple[float, ...]
HistogramCounts = tuple[list[int], float]
"""Counts by bucket, and the total."""

class Core:
    """Where every request is checked, entered, run in a step of the device and answered: see `csrc/core/core.h`.

    Belongs to one thread, but for `notice`, `counts`, `queued` and `waiting`. Requests have numbers.

    Args:
        layers, heads, head_dim, topk, init_blocks, local_blocks, block_size, scale: of the indexer; at most 64 heads.
        longest: most tokens of a decode's span; longer ones are Python's to run.
        max_sequence_tokens: of the indexer.
        max_spans, max_message_bytes: limits of a request.
        max_queued: requests that may be unanswered; more are refused as OVERLOADED.
        max_queue_seconds: once one of a tenant has waited for so long, more of the tenant's are refused likewise.
        odd_keys, odd_queries: whether they are rounded to odd where they become bfloat16, as a cache needs it that
            rounds them once more.
        nudge: eventfd that `notice` writes and `run` sleeps on.
        spin_seconds: after a request or an answer, how long `run` looks for requests before it sleeps.
        hold_seconds: how long a channel's request is held for those of other channels that came with it the last time.
        seconds_bounds, size_bounds: of the histograms.

    Raises:
        ValueError: numbers that no index has.

    Attributes:
        steps: steps begun so far.
        in_flight: steps on their way.
        launched: `time.monotonic` of the oldest one's launch, 0 where there is none.
        time_beside: a clock that stands still while steps are on their way.
        looked: `time.monotonic` of its last look at the rings: requests that it left came since the look before.
        queued: requests that are not begun, those still in the rings too.
        waiting: selections that wait for keys.
        unanswered: requests that were taken and not answered.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        head_dim: int,
        topk: int,
        init_blocks: int,
        local_blocks: int,
        block_size: int,
        longest: int,
        max_sequence_tokens: int,
        max_spans: int,
        max_queued: int,
        max_queue_seconds: float,
        max_message_bytes: int,
        scale: float,
        odd_keys: bool,
        odd_queries: bool,
        nudge: int,
        spin_seconds: float,
        hold_seconds: float,
        seconds_bounds: Bounds,
        size_bounds: Bounds,
    ) -> None: ...
    @property
    def steps(self) -> int: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def launched(self) -> float: ...
    @property
    def time_beside(self) -> float: ...
    @property
    def looked(self) -> float: ...
    @property
    def contended(self) -> bool: ...
    @property
    def queued(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def unanswered(self) -> int: ...
    def run(self, seconds: float, /) -> int:
        """Serves until there is something for Python, or so many seconds have passed; once, with 0.

        Returns:
            Why, added up: `NOTICED`, `FOR_PYTHON` (see `take` and `take_cut`), `SET_CELLS` (see `take_set_cells`),
            `LATE` (the device should be asked after), `BROKEN` (see `take_broken`); or 0.

        Raises:
            RuntimeError: a call of the driver failed: its name, and the number of its CUDA error.
            MemoryError: there is none for an answer.
            Exception: whatever the `run_step` raises.
        """

    def notice(self) -> None:
        """Has `run` return; from any thread."""

    def try_again(self) -> None:
        """Has what is held back, or waits, tried again: something ended that may have been in its way."""

    def expect_no_more(self) -> None:
        """No frontend sends more, clients of links are refused, and so is what waits for keys that are not there."""

    def add(self, line: ServerLink, /) -> None:
        """Serves one more line."""

    def drop(self, line: ServerLink, /) -> None:
        """Serves a line no more: nothing is written for it, and what it asked for is given up."""

    def take_broken(self) -> tuple[ServerLink, str] | None:
        """A line whose client wrote what cannot be, and what that was; it is read no more."""

    def set_sequence_columns(
        self,
        index: SequenceIndex,
        lengths: NDArray[np.int64],
        revisions: NDArray[np.uint64],
        reading: NDArray[np.int32],
        held: NDArray[np.int64],
        forked: NDArray[np.int64],
        last_calls: NDArray[np.float64],
        first_rows: NDArray[np.int32],
        reading_sequence: NDArray[np.int32],
        cells: NDArray[np.int32],
        holders: NDArray[np.int32],
        free_pages: NDArray[np.int64],
        owners: NDArray[np.uint32],
        num_rows: NDArray[np.int32],
        max_blocks: NDArray[np.int32],
        filled: NDArray[np.int64],
        page_numbers: NDArray[np.int32],
        /,
    ) -> None:
        """Shares a cache's columns, which the core reads and writes: see `blockdex.cache.SequenceColumns`.

        Raises:
            ValueError: sizes that do not go together, or requests are there that name another cache's sequences.
        """

    def weight(self, tenant: int, /) -> float:
        """The weight of a tenant that has requests, by its number."""

    def set_epoch(self, epoch: int, /) -> None:
        """The cache's epoch."""

    def set_step(
        self, number: int, host: NDArray[np.uint8], block_ids: NDArray[np.int32], scores: NDArray[np.float32], /
    ) -> None:
        """Memory that one of the steps is made in and answered in: see `StepBuffer`."""

    def set_replays(self, replays: list[tuple[int, ...]], launch: int, stream: int, signal: int = 0, /) -> None:
        """The device's programs (runs, length, width, address by step), smallest first, and what launches them.

        `signal` is what tells channels in the device's memory: see `Replays`.
        """

    def set_run_step(self, run_step: Callable[[int, int, int], None], /) -> None:
        """What runs a step of (number, runs, tokens) to its end, where no program does."""

    def take_cut(self) -> bytes:
        """uint32 entries of sequences that were cut, and may have pages to give back."""

    def take_set_cells(self) -> bytes:
        """int64 places in the page tables of cells that were set, of which the device is to be told."""

    def name_pages(self, number: int, block_ids: NDArray[np.int32], /) -> None:
        """Makes page numbers of the block ids of a request's answer, in place.

        Raises:
            ValueError: the request wants none, or not so many.
        """

    def take(self) -> tuple[Any, ...] | None:
        """The next request for Python, by what is to be done for it; None when there is no other one.

        `(number, "pages", layer, rows)` is to be granted its pages, or refused, or asks again when tried again;
        `(number, "large", layer, rows, tenant number, link, keys dtype, keys, queries dtype, queries, block ids,
        scores, first head, heads, order, flags)` is entered, to be run and answered; `(number, kind, tenant, sequence,
        child, number)`, of a kind `open`, `get`, `fork`, `truncate` or `close`, is to be done and answered. Rows are
        uint64 ids, uint32 entries, int64 starts, int64 lengths, and bool for those to be written. Tensors are (region,
        offset, bytes), the region None for the link's memory; where an answer goes is None for the answers' arena.
        """

    def grant(self, number: int, /) -> None:
        """The pages that a request writes are there, and its sequences' alone."""

    def begin(self, number: int, phase: int, /) -> None:
        """A kernel was launched for a request; its phase, numbered as on the ring."""

    def drop_if_gone(self, number: int, /) -> bool:
        """Answers a request whose caller is gone or whose deadline has passed; whether it did."""

    def answer(
        self,
        number: int,
        flags: int,
        num_tokens: int,
        num_heads: int,
        topk: int,
        num_layers: int,
        first: NDArray[Any] | None,
        second: NDArray[Any] | None,
        /,
    ) -> None:
        """Answers a request with up to two arrays; the numbers are those of its slot.

        What goes to a region is written there, or was before where it is None; a region on the device has to be.
        """

    def refuse(self, number: int, code: int, reason: str, message: str, /) -> None:
        """Refuses a request."""

    def abandon(self, code: int, reason: str, message: str, /) -> None:
        """Refuses all requests, and forgets the steps on their way."""

    def counts(self) -> dict[str, Any]:
        """What was counted so far: histograms as `HistogramCounts`, of stages by phase and stage, and numbers."""

SENT: int
QUEUED: int
UNUSUAL: int
NOTHING_LEFT: int
MORE_TO_COPY: int
WAITS_FOR_ROOM: int

Refusal = tuple[int, int, int, str, str]
"""What a request is refused with: its RPC and number, canonical code, reason, and message.

Behind the message, a line each, what of its numbers has a name: `name=value`.
"""

Taken = tuple[Any, int, int, int, int, int, int, int]
"""A request that was taken from its caller.

Caller, number, RPC, `received` of its slot, layer, spans, tokens, and bytes of its payload, 0 where it was sent.
"""

Rest = tuple[int, int, bytes, bytes, int, int, int]
"""What there is to say of an answer beside its response.

RPC, `received` of its request's slot, the answer's slot, its payload, and the request's layer, spans, tokens.
"""

class ClientLink:
    """The frontend's side of a ring, on one thread: slots, tickets, the requests' arena, the answers'.

    Requests of one caller are sent in their order. What there is no room for waits, and all of its tenant that comes
    behind it; what is long is copied slice by slice, beside which others' requests are sent. Both go on with `flush`.

    RPCs are numbers: 0 AppendKeys, 1 SelectBlocks, 2 AppendAndSelect, 3 to 5 the same over a stream, then those about
    sequences.

    Args:
        memory: the whole segment, writable.
        engine_bell: the client's end of the pair that the engine sleeps on; it must stay open until `close`.
        num_heads, max_spans, max_message_bytes: as `IndexSpec` and `Limits` say.
        max_waiting: requests that may be waited for; more are refused.
        tell_seconds: of an answer that took longer the rest is told, too.
        num_rpcs: RPCs there are.
        time_bounds: upper bounds of the buckets in which good answers are counted, rising.
        spin_seconds: after a request or an answer, how long `may_sleep` looks for more; 0: nobody calls that.

    Raises:
        ValueError: it is no segment of this layout, or a bound is none.
    """

    def __new__(
        cls,
        memory: memoryview,
        engine_bell: int,
        num_heads: int,
        max_spans: int,
        max_message_bytes: int,
        max_waiting: int,
        tell_seconds: float,
        num_rpcs: int,
        time_bounds: tuple[float, ...],
        spin_seconds: float = 0.0,
    ) -> ClientLink: ...
    @property
    def answered(self) -> bool:
        """Whether there are answers to take."""

    @property
    def waiting(self) -> int:
        """Requests that somebody waits for."""

    def may_begin(self, tenant: str, size: int, /) -> bool:
        """Whether a tenant's share lets it have one more request in flight, of so many bytes."""

    def send(self, caller: object, rpc: int, tenant: str, timeout: float, message: bytes, /) -> int | Refusal:
        """Takes a token request as it came off the wire; `rpc` is 0 to 3, 3 for one of a stream.

        Returns:
            `SENT`, or `QUEUED`: `flush` goes on with it. `UNUSUAL`, and nothing has changed: protobuf has to write it
            anew, or it is none of the token requests. What it is refused with: no slot can carry it, it has the number
            of another one of the caller, or there are too many.

        Raises:
            ValueError: the tenant is none.
        """

    def send_sequence(
        self,
        caller: object,
        number: int,
        rpc: int,
        tenant: str,
        timeout: float,
        kind: int,
        epoch: int,
        sequence_id: int,
        child_id: int,
        argument: int,
        num_spans: int,
        columns: bytes,
        /,
    ) -> int | Refusal:
        """Takes a request about sequences, whose kind and fields are those of its slot; otherwise as `send`."""

    def flush(self) -> int:
        """Tells the engine what was given up, sends what there is room for, and copies a slice of what is long.

        Returns:
            `NOTHING_LEFT`; `MORE_TO_COPY`, to be called again at once; `WAITS_FOR_ROOM`, after a while.
        """

    def overdue(self, seconds: float, /) -> list[Taken]:
        """Gives up what has waited for room for so many seconds."""

    def give_up(self, caller: object, number: int, /) -> Taken | None:
        """Takes a request from its caller, who is told of no answer; the engine hears of it with `flush` at last."""

    def give_up_all(self, caller: object | None, /) -> list[Taken]:
        """The same of all requests of a caller; None stands for all callers."""

    def take(self) -> list[tuple[Any, int, bytes | None, Rest | None]]:
        """The answers that are there: caller, number, response and rest. Their room is free again.

        The response is that of a token request which was answered well; the rest is None where it says all. Where none
        is there, the bell rings when one comes, or, while it spins, `may_sleep` sees it; else it has to be asked again.

        Raises:
            ValueError: the oldest answer is not what the layout says.
        """

    def close(self) -> None:
        """Writes nothing into the ring from now on, and takes nothing from it."""

    def await_alone(self, epoll: int, seconds: float, /) -> bool:
        """Waits so long for the only request in flight, if it spins at all; whether answers are there.

        It waits no longer where an epoll has events: there is something else to do.
        """

    def may_sleep(self, epoll: int, seconds: float, /) -> bool:
        """Looks for answers and for events of an epoll, without the interpreter's lock.

        For as long as it spins since the last request or answer, so many seconds at most, and no longer once another
        thread has wanted the core that it looks on.

        Returns:
            Whether nothing came: from now on the bell rings for the next answer. Otherwise it need not.
        """

    def take_times(self) -> list[tuple[list[int], float]]:
        """What was timed since the last call: of every RPC, good answers by bucket, and their seconds in all.

        The last bucket has no bound.
        """

class TokenRequest:
    """A data call of the Python client, made by a `RequestMaker`: see `blockdex.client.requests`."""

    @property
    def shape(self) -> tuple[int, int, int]: ...
    @property
    def epoch(self) -> int: ...
    @property
    def repeatable(self) -> bool: ...
    def place(self, sequences: dict[int, Any], /) -> None: ...
    def begin(self, sequences: dict[int, Any], /) -> None: ...
    def end(self) -> None: ...
    def fail(self, changed_nothing: bool, /) -> None: ...
    def message(self) -> bytes: ...
    def frame(self, number: int, timeout_ms: int, /) -> bytes: ...
    def answer_into(self, block_ids: int, scores: int, /) -> None:
        """Has the answer written to these addresses, in memory that is lent; 0: it brings them along."""

    def submit(self, connection: RingConnection, timeout: float, /) -> int | RequestRefusal:
        """Sends it over a ring; its ticket, or why it was not sent. What lies in memory that is lent is not copied."""

class RequestMaker:
    """Makes them for one server.

    Args:
        num_heads, head_dim, topk, max_message_bytes, epoch: the server's.
        array: numpy's type of arrays.
        dtypes: the wire's numbers by dtype of such arrays.
        array_of: makes an array of a dtype in `dtypes`, contiguous in C's order, of a tensor by name that is none, and
            says whether what it looks at is memory of a device, which only a ring can carry.
        refuse: raises what stands for a code, a reason, a message and its numbers.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        head_dim: int,
        topk: int,
        max_message_bytes: int,
        epoch: int,
        array: type,
        dtypes: dict[Any, int],
        array_of: Callable[[str, Any], tuple[NDArray[Any], bool]],
        refuse: Callable[[int, str, str, dict[str, int] | None], object],
    ) -> None: ...
    def make(
        self,
        kind: int,
        layer: int,
        sequences: object,
        lengths: object,
        starts: object,
        revisions: object,
        epoch: object,
        keys: object,
        queries: object,
        first_head: int,
        num_heads: int,
        order: object,
        return_scores: object,
        wait_for_keys: bool,
        rollback: bool,
        pool_id: int,
        ids: object,
        /,
    ) -> TokenRequest: ...

def read_selection(kind: int, streamed: bool, answer: bytes, /) -> tuple[bytearray | None, bytearray | None] | None:
    """Block ids and scores of a response of that kind, of a stream or alone; None where protobuf has to read it."""

RequestRefusal = tuple[int, str, str]
"""What a request came to that failed: canonical code, reason, and message; its numbers behind that, a line each."""

RequestAnswer = tuple[int, int, tuple[int, ...], bytearray | None, bytearray | None]
"""Code 0, epoch, shape, and two arrays of the shape, copies: int32 block ids `[T, num_heads, topk]` and float32 scores,
or int64 lengths and uint64 revisions `[num_layers]`; None for what the answer does not have."""

class RingConnection:
    """A client's link to a server on the same host (`blockdex_client.h`), for one thread at a time of one process.

    Token requests of kind 0 append keys, of 1 select blocks, of 2 do both. Timeouts are in seconds, and no wait is
    longer. A request is dropped by the server once its timeout is over; it does not end its wait.

    Args:
        path: of the server's socket; one that begins with @ is abstract.
        tenant: of all requests; empty: the one that the server knows this process by.
        timeout: of connecting.
        num_heads, max_spans, max_message_bytes: as `IndexSpec` and `Limits` say.
        spin_seconds: how long a wait looks for an answer before it sleeps.
        room_seconds: how long a request waits for room before it is refused as OVERLOADED; 0: it does not.

    Attributes:
        epoch: the cache's when the link began; 0 once it is closed.
        over: why the link is over: the server is gone, or broke the rules; None while it is not.

    Raises:
        ConnectionError: the server cannot be reached, or speaks another version of the ring.
        PermissionError: it does not let this process in, and says why.
        RuntimeError: from any method: another process has made it, or another thread is using it.
    """

    def __new__(
        cls,
        path: str,
        tenant: str,
        timeout: float,
        num_heads: int,
        max_spans: int,
        max_message_bytes: int,
        spin_seconds: float = 50e-6,
        room_seconds: float = 2.0,
    ) -> RingConnection: ...
    @property
    def epoch(self) -> int: ...
    @property
    def over(self) -> RequestRefusal | None: ...
    def submit(self, kind: int, message: bytes, timeout: float, /) -> int | RequestRefusal:
        """Sends a token request, which is encoded as protobuf; its ticket, or why it was not sent."""

    def submit_sequences(
        self,
        kind: int,
        epoch: int,
        sequence_id: int,
        child_id: int,
        number: int,
        num_spans: int,
        columns: bytes,
        timeout: float,
        /,
    ) -> int | RequestRefusal:
        """Sends a request about sequences or a pool, whose kind and fields are those of its slot (docs/ring.md)."""

    def wait(self, ticket: int, timeout: float, /) -> RequestAnswer | RequestRefusal | None:
        """Waits for the answer to a ticket, without the interpreter's lock; None where it is not there in time.

        With an answer or a refusal the ticket is done with; otherwise wait again, or give it up.
        """

    def poll(self) -> list[tuple[int, RequestAnswer | RequestRefusal]]:
        """The answers that are there, by ticket, without waiting; from then on `fileno` tells of the next."""

    def give_up(self, ticket: int, /) -> None:
        """Nobody waits for a ticket any more; the server is told."""

    def take_events(self) -> list[bytes]:
        """What the server has told since the last call, as JSON; heard while it is used, 1024 at most."""

    def ask(self, question: str, files: Sequence[int], timeout: float, /) -> bytes | RequestRefusal:
        """Asks the server something beside the ring (docs/ring.md), and waits for its reply.

        Args:
            question: a JSON object.
            files: that come with it, four at most.
            timeout: after which it is refused as DEADLINE_EXCEEDED.
        """

    def begin_question(self, question: str, files: Sequence[int], /) -> RequestRefusal | None:
        """Asks the same without waiting; why it was not asked, or None."""

    def take_reply(self) -> bytes | RequestRefusal | None:
        """The reply to the question that was begun last, once `poll` has heard it."""

    def lend(self, address: int, num_bytes: int, region: int, /) -> None:
        """The server has this memory as that region: requests name it where their tensors lie in it."""

    def take_back(self, region: int, /) -> None:
        """No request names the region any more."""

    def fileno(self) -> int:
        """A file that can be read when there is something to take with `poll`, or the link is over; -1 once closed."""

    def hang_up(self) -> None:
        """Ends the link, and with it a wait in another thread; the one method that any thread may call."""

    def close(self) -> None:
        """Gives everything back; what was in flight is unknown."""

def now() -> float:
    """`time.monotonic` seconds, as the core, the cache and the scheduler read them."""

def hold_clock(seconds: float | None, /) -> None:
    """Has `now` stand still there; None: has it go on.

    Raises:
        ValueError: it is not 0 to 1e9.
    """

def arm_faults(seed: int, leap_seconds: float, odds: tuple[float, ...], /) -> None:
    """Has seams fail from now on.

    Args:
        seed: of when.
        leap_seconds: that a clock which fails is then ahead.
        odds: of each seam of `blockdex.faults.SEAMS`, 0 to 1.

    Raises:
        ValueError: the odds are not, or the leap is longer than 1e9 seconds.
    """

def fault_strikes(seam: int, /) -> bool:
    """Whether a seam is to fail now, by its place in `blockdex.faults.SEAMS`."""

def set_weight(tenant: str, weight: float, /) -> None:
    """What a tenant weighs in this process, instead of 1: its share of room and time, beside those of others.
    To be called before requests come.

    Raises:
        ValueError: the weight is not above 0.
    """
