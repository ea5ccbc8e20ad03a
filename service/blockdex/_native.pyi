"""The compiled part: see `native/`."""

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
        bell: eventfd that the front door sleeps on.
        own_bell: eventfd that the engine sleeps on.

    Attributes:
        filled: requests that are there and were not taken; -1 where the front door says what cannot be.
        waits: whether the oldest one is for Python.
        gone: whether nobody is there to be answered.
        longest: bytes of an answer that there is room for at some time.
    """

    def __init__(self, segment: object, bell: int, own_bell: int) -> None: ...
    @property
    def filled(self) -> int: ...
    @property
    def waits(self) -> bool: ...
    gone: bool
    @property
    def longest(self) -> int: ...
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
        """Shows the front door what was written, and wakes it if it sleeps."""

class Lane:
    """The engine's short way: decodes that go on in place, from the rings to the device and back, in C.

    It takes requests that append to the ends of sequences, in pages that these have to themselves, and select for what
    they append, with bfloat16 keys and queries, ids in ascending order and no scores. Whatever else comes is left where
    it is, and so are requests for sequences that it knows nothing of or that are `blocked`. Requests of all lines,
    sequences and layers share a step; no step names a layer of a sequence twice. Belongs to one thread, but for
    `notice` and `counts`.

    Args:
        layers, heads, head_dim, topk, block_size: of the indexer.
        longest: most tokens of a span.
        nudge: eventfd that `notice` writes and `run` sleeps on.
        spin_seconds: after a request or an answer, how long `run` looks for requests before it sleeps.
        seconds_bounds, size_bounds: of the histograms.

    Attributes:
        in_flight: steps on their way.
        launched: `time.monotonic` seconds of the oldest one's launch.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        head_dim: int,
        topk: int,
        block_size: int,
        longest: int,
        nudge: int,
        spin_seconds: float,
        seconds_bounds: tuple[float, ...],
        size_bounds: tuple[float, ...],
    ) -> None: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def launched(self) -> float: ...
    def run(self, seconds: float, /) -> int:
        """Serves until there is something for Python, or so many seconds have passed; once, with 0.

        Returns:
            Why, added up: `NOTICED`, `FOR_PYTHON` (a line `waits`), `LATE` (the device should be asked after), `ROOM`
            (for answers of a line that waited for it); or 0.

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
        """Memory that one of the steps is made in, as `blockdex_kernels.runner.Room`."""

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
