"""The compiled part: see `csrc/`."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

NOTICED: int
FOR_PYTHON: int
LATE: int
ROOM: int
MAX_RUNS: int
MAX_TOKENS: int
STEPS: int

class Line:
    """One link, as the engine's thread sees it: requests come off it, answers go onto it.

    Args:
        segment: the shared memory, a `Segment` that this process has made.
        bell: the engine's end of the datagram pair that the client sleeps on.
        own_bell: the engine's end of the pair that the engine sleeps on.
        tenant: of all its requests; without one each names its own.

    Attributes:
        filled: requests that are there and were not taken; -1 where the frontend says what cannot be.
        waits: whether the oldest one is for Python to take now; of who does not read its answers, none is.
        gone: whether nobody is there to be answered.
        crowded: whether Python has answers that wait for room.
        longest: bytes of an answer that there is room for at some time.
        has_unwritten: whether answers wait for room, of those that the core wrote.
    """

    def __init__(self, segment: object, bell: int, own_bell: int, tenant: str = "") -> None: ...
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

    def wait_for_room(self) -> None:
        """Has the engine's bell rung when there is room again; who has said so looks once more."""

    def publish(self) -> None:
        """Shows the frontend what was written, and wakes it if it sleeps."""

class Core:
    """The engine's short way: decodes that go on in place, from the rings to the device and back, in C.

    It takes requests that append to the ends of sequences, in pages that these have to themselves, and select for what
    they append, with bfloat16 keys and queries, ids in ascending order and no scores. Whatever else comes is left where
    it is, and so are requests for sequences that it knows nothing of or that are `blocked`. Requests of all lines,
    sequences and layers share a step; no step names a layer of a sequence twice. Belongs to one thread, but for
    `notice` and `counts`.

    Args:
        layers, heads, head_dim, topk, block_size: of the indexer.
        longest: most tokens of a span.
        max_sequence_tokens: of the indexer.
        max_spans, max_message_bytes: limits of a request.
        nudge: eventfd that `notice` writes and `run` sleeps on.
        spin_seconds: after a request or an answer, how long `run` looks for requests before it sleeps.
        seconds_bounds, size_bounds: of the histograms.

    Attributes:
        steps: steps begun so far.
        in_flight: steps on their way.
        launched: `time.monotonic` seconds of the oldest one's launch.
        time_beside: `time.monotonic` seconds less those with steps on their way: a clock that stands still meanwhile.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        head_dim: int,
        topk: int,
        block_size: int,
        longest: int,
        max_sequence_tokens: int,
        max_spans: int,
        max_message_bytes: int,
        nudge: int,
        spin_seconds: float,
        seconds_bounds: tuple[float, ...],
        size_bounds: tuple[float, ...],
    ) -> None: ...
    @property
    def steps(self) -> int: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def launched(self) -> float: ...
    @property
    def time_beside(self) -> float: ...
    def run(self, seconds: float, /) -> int:
        """Serves until there is something for Python, or so many seconds have passed; once, with 0.

        Returns:
            Why, added up: `NOTICED`, `FOR_PYTHON` (a line `waits`), `LATE` (the device should be asked after), `ROOM`
            (a line that is `crowded` has some again); or 0.

        Raises:
            RuntimeError: the device takes no step.
            Exception: whatever the `run_step` raises.
        """

    def drain(self, seconds: float, /) -> bool:
        """Answers what is on its way and begins nothing, for so many seconds; whether all has ended."""

    def notice(self) -> None:
        """Has `run` return; from any thread."""

    def touch(self) -> None:
        """Something came or went beside it: it spins for a while."""

    def add(self, line: Line, /) -> None:
        """Serves one more line."""

    def drop(self, line: Line, /) -> None:
        """Serves a line no more; nothing is written for it."""

    def set_books(
        self,
        lengths: NDArray[np.int64],
        revisions: NDArray[np.uint64],
        held: NDArray[np.int64],
        forked: NDArray[np.int64],
        last_calls: NDArray[np.float64],
        first_rows: NDArray[np.int32],
        generations: NDArray[np.uint32],
        blocked: NDArray[np.uint8],
        /,
    ) -> None:
        """Shares the cache's columns, which it reads and writes from now on; forgets whose they are."""

    def set_epoch(self, epoch: int, /) -> None:
        """The cache's epoch."""

    def learn(self, tenant: str, sequence_ids: NDArray[np.uint64], columns: NDArray[np.int64], /) -> None:
        """Takes note of the columns of a tenant's sequences."""

    def set_step(self, number: int, host: NDArray[np.uint8], block_ids: NDArray[np.int32], /) -> None:
        """Memory that one of the steps is made in, as `blockdex.executor.interface.StepBuffer`."""

    def set_replays(self, steps: Sequence[tuple[int, ...]], launch: int, stream: int, /) -> None:
        """The device's programs `(runs, length, width, program of each step)`, and what launches them."""

    def set_run_step(self, run_step: Callable[[int, int, int], Any], /) -> None:
        """What runs a step to its end, where no program does: it gets the step's number, runs and tokens."""

    def abandon(self, code: int, reason_bytes: int, text: bytes, /) -> None:
        """Answers what is on its way with an error."""

    def counts(
        self,
    ) -> tuple[list[tuple[list[int], float]], tuple[list[int], float], tuple[list[int], float], int, int, float, float]:
        """What it did so far; from any thread.

        Returns:
            Histograms, as counts and total: seconds of each stage, requests of a step, tokens of a step. Then steps,
            tokens, seconds of steps on the device, and seconds with any of them there.
        """

# --- The frontend's side ---

Taken = tuple[Any, int, int, int, int]
"""A request that was taken from who asked: asker, number, RPC, `received` of its slot, ticket."""

Rest = tuple[int, int, bytes, bytes]
"""What there is to say of an answer beside its response: RPC, `received` of its request's slot, slot, payload."""

class Link:
    """The frontend's side of a ring, on one thread: slots, tickets, the requests' arena and the answers' tape.

    RPCs are numbers: 0 AppendKeys, 1 SelectBlocks, 2 AppendAndSelect, 3 to 5 the same over a stream, 255 a request that
    Python wrote. Nothing is taken the short way before it is opened.

    Args:
        memory: the whole segment, writable.
        engine_bell: the eventfd that the engine sleeps on; it must stay open while this is used.
        spin_seconds: after a request or an answer, how long `may_sleep` looks for more; 0: nobody calls that.

    Raises:
        ValueError: it is no segment of this layout.
    """

    def __new__(cls, memory: memoryview, engine_bell: int, spin_seconds: float = 0.0) -> Link: ...
    @property
    def answered(self) -> bool:
        """Whether there are answers to take."""

    @property
    def waiting(self) -> int:
        """Requests that somebody waits for."""

    @property
    def on_short_way(self) -> int:
        """Those of them that took the short way."""

    def open_short_way(
        self,
        *,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        max_sequence_tokens: int,
        max_spans: int,
        max_message_bytes: int,
        max_waiting: int,
        slow_seconds: float,
        time_bounds: tuple[float, ...],
    ) -> None:
        """Takes requests the short way from now on, within the bounds of `IndexSpec` and `Limits`.

        While `max_waiting` are waited for, all are left to Python. Of an answer that took longer than `slow_seconds`
        the rest is told, too. Answers are counted in buckets whose upper bounds `time_bounds` are, rising.
        """

    def send(self, asker: object, rpc: int, tenant: str, timeout: float, message: bytes, /) -> bool:
        """Writes a request as it came off the wire into the ring; `rpc` is 0 to 3, 3 for one of a stream.

        Returns:
            False where it is not for the short way: something is wrong with it or unusual, it has the number of another
            one of the asker, or there is no room. Nothing has changed then.
        """

    def claim(self, asker: object, num_bytes: int, /) -> tuple[int, int, int] | None:
        """Ticket, offset of a slot in the segment and offset of a payload in the arena, for Python to write a request.

        None while one of them is not free. The engine sees it after `publish`.
        """

    def publish(self) -> None:
        """Shows the engine what was claimed."""

    def cancel(self, ticket: int, /) -> bool:
        """Tells the engine that nobody waits for a request: none hears of its answer. False while no slot is free."""

    def awaits(self, asker: object, number: int, /) -> bool:
        """Whether such a request is on the short way, and not given up."""

    def give_up(self, asker: object, number: int, /) -> Taken | None:
        """Takes a request on the short way from its asker; the engine is yet to be told."""

    def give_up_all(self, asker: object | None, /) -> list[Taken]:
        """The same of all requests of an asker; None stands for all askers."""

    def take(self) -> list[tuple[Any, int, bytes | None, Rest | None]]:
        """The answers that are there: asker, number, response and rest. Their room is free again.

        The response is that of a request on the short way which was answered well; the rest is None where it says all.
        Where none is there, the bell rings when one comes, or, while it spins, `may_sleep` sees it; else it has to be
        asked again.

        Raises:
            ValueError: the oldest answer is not what the layout says.
        """

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
        """What was timed since the last call: of every RPC from 0 to 5, answers by bucket, and their seconds in all.

        Of the short way alone, and empty before that is opened. The last bucket has no bound.
        """
