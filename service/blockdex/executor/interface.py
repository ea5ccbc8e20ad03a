"""Steps of an engine on a backend: from bytes on the host to answers on the host, several on their way at once."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import add
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from blockdex._native import now
from blockdex_kernels.interface import Backend, Order, Selection, Spans
from blockdex_kernels.spec import IndexSpec

# Received bytes are read-only, and nothing here writes through a view of them. torch says so once a process: let it be
# here, whatever the process makes of warnings.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)

Bytes = bytes | memoryview | torch.Tensor
"""A tensor, uint8, lies where the device reads it by itself, until the step is done."""

STEP_BUFFERS, MAX_RUNS, MAX_TOKENS = 2, 256, 512
"""Steps that are made in memory of the host, and how large they may be."""

COLUMNS = 5

SIGNALS = 16
"""Numbers that a captured step may write when it has come to its end; a power of two."""

ANSWER_SECONDS = 30.0
"""Longest that a device may take for a step."""


class DeviceHungError(RuntimeError):
    """A device does not get on with a step. Whoever waits for it to end waits for ever."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows of a packed tensor on the host.

    Attributes:
        dtype: bfloat16, float16, float32 or float8_e4m3fn.
        heads: vectors of a token.
        parts: their bytes, one part behind the other.
    """

    dtype: torch.dtype
    heads: int
    parts: Sequence[Bytes]


class Target(NamedTuple):
    """Where some heads of a selection are written, in memory that the device writes by itself.

    Attributes:
        heads: which.
        block_ids: int32 `[T, those heads, topk]`.
        scores: float32 of the same shape, or None.
    """

    heads: slice
    block_ids: torch.Tensor
    scores: torch.Tensor | None


@dataclass(slots=True)
class Step:
    """Runs of consecutive tokens, to append, to select for, or both, in this order; R = runs, T = tokens.

    Attributes:
        columns: int32 `[5, R]`: layer, position of the first token, tokens, first row of the page table, and flags of
            each run, as `blockdex_kernels.interface.Spans` has them.
        keys: `[T, D]`; or None.
        queries: `[T, H, D]`; or None.
        order: of the selection.
        return_scores: whether it holds scores.
        raw_scores: whether these are unscaled, and forced blocks have the score that they have.
        targets: of a prefill: where its selection is written; where there is none, it is answered.
        num_tokens: T.
        longest: tokens of the longest run.
        end: position behind the last token that any run reaches.
    """

    columns: NDArray[np.int32]
    keys: Packed | None = None
    queries: Packed | None = None
    order: Order = "ascending"
    return_scores: bool = False
    raw_scores: bool = False
    targets: Sequence[Target] = ()
    num_tokens: int = field(init=False)
    longest: int = field(init=False)
    end: int = field(init=False)

    def __post_init__(self) -> None:
        # For the few runs of most steps lists are faster than arrays.
        _, starts, lengths, *_ = self.columns.tolist()
        self.num_tokens, self.longest = sum(lengths), max(lengths)
        self.end = max(map(add, starts, lengths))


@dataclass(frozen=True, slots=True)
class Answer:
    """A selection on the host: int32 and float32 `[T, H, topk]`, scores None where not asked for."""

    block_ids: NDArray[np.int32]
    scores: NDArray[np.float32] | None

    def __getitem__(self, tokens: slice) -> Answer:
        """That of some of the tokens."""
        return Answer(self.block_ids[tokens], None if self.scores is None else self.scores[tokens])


@dataclass(frozen=True, slots=True)
class StepBuffer:
    """Memory of the host in which a step is made by who wants it, without a `Step`, and where its answer appears.

    All T rows of keys and of queries have their place; those of runs that do not append, or select, are not read.

    Attributes:
        host: uint8: int32 columns `[5, R]` as those of `Step`; behind them, at the next multiple of 16, bfloat16 keys
            `[T, D]`, and right behind those bfloat16 queries `[T, H, D]`. For what is captured there are, behind
            these, addresses of the device, uint64: of rows of keys `[T]` and of queries `[T, H]` that are to be read
            from there instead, with the number of their dtype (1 bf16, 2 fp16, 3 fp32, 4 fp8 e4m3) in the last four
            bits, and of block ids `[T, H]`, which are then written there; 0 where all is here. Behind these there are
            addresses `[SIGNALS]`, 0 for none, and numbers `[SIGNALS]` that are written there behind all block ids.
        block_ids: int32 `[T, H, topk]`, in ascending order; -1 for runs that do not select.
        scores: float32 `[T, H, topk]`, beside the block ids of runs that want them: unscaled, forced blocks with the
            score that they have, -inf beside -1. A NaN product counts as -inf, so none of them is a NaN.
    """

    host: NDArray[np.uint8]
    block_ids: NDArray[np.int32]
    scores: NDArray[np.float32]


class Replay(NamedTuple):
    """A step that is captured, in each of the step buffers: launched, it does what stands there. R and T are padded.

    Attributes:
        runs: R; those that are not there have length 0.
        length: tokens of the longest; T is R times that.
        width: blocks that no run exceeds.
        programs: CUgraphExec of each step buffer, as numbers.
    """

    runs: int
    length: int
    width: int
    programs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Replays:
    """Captured steps that append and select, the smallest first.

    Attributes:
        launch: address of a C function that takes a program and `stream`, begins it, and returns 0. It writes every
            block id of R times T, -1 where there is none.
        signal: address of a C function that takes `stream`, an address, a number and 0, writes the number there when
            the stream comes so far, and returns 0.
        stream: of CUDA, as a number.
        steps: what is captured.
    """

    launch: int
    signal: int
    stream: int
    steps: list[Replay]


class Pending(ABC):
    """A step on its way.

    Attributes:
        device_seconds: how long the device worked on it, once it is done.
        device_waited: whether that holds time in which it may have waited for the host.
    """

    device_seconds: float = 0.0
    device_waited: bool = False

    @abstractmethod
    def done(self) -> bool:
        """Whether it is; to be asked again and again, oldest first, since it may take that to get on.

        Raises:
            RuntimeError: the device has failed.
            DeviceHungError: it has not answered for `ANSWER_SECONDS`.
        """

    @abstractmethod
    def answer(self) -> Answer | None:
        """What was selected, once it is done, in arrays of its own; None without queries, or with targets."""


class Executor(ABC):
    """Takes steps to a backend. What is begun takes effect in this order, but for prefills, which only read.

    Args:
        backend: the kernels and their pages.

    Attributes:
        backend: the same.
        max_pending: steps, other than prefills, that may be on their way at once.
        max_slices: slices of prefills that may be on their way at once: as many as keep the device busy.
        least_slice: tokens; of shorter slices, most is beginning and end.
        max_slice_rows: tokens times heads of a slice, at most.
        imports_memory: whether the device's own memory can be shared with other processes.
    """

    max_pending: int = 1
    max_slices: int = 2
    least_slice: int = 16
    max_slice_rows: int = 1 << 31
    imports_memory: bool = False

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def use_device(self) -> None:
        """Makes the device the calling thread's: what the thread does that begins steps, before its first."""
        self.backend.use_device()

    def warm_up(self) -> Iterator[tuple[int, int]]:
        """As `Backend.warm_up`."""
        return self.backend.warm_up()

    @abstractmethod
    def write_tables(self, cells: NDArray[np.int32], changes: NDArray[np.intp]) -> None:
        """Takes over what has changed in the page tables.

        Args:
            cells: int32 `[rows * W]`, all tables; the same array or a longer one at each call.
            changes: which of them were written since the last call.
        """

    def copy_pages(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """As `Backend.copy_pages`."""
        self.backend.copy_pages(torch.tensor(sources), torch.tensor(destinations))

    def clear_pages(self, page_ids: NDArray[np.int32]) -> None:
        """Has pages hold zeros in all layers; to be called where `copy_pages` would be."""
        pages = self.backend.pages
        for run in np.split(page_ids, np.flatnonzero(np.diff(page_ids) != 1) + 1):
            pages[int(run[0]) : int(run[-1]) + 1].view(torch.uint8).zero_()

    def pin(self, address: int, num_bytes: int) -> Callable[[], None]:  # noqa: ARG002
        """Has the device read and write memory of the host by itself; returns what ends that. From any thread.

        Raises:
            RuntimeError: the device refuses.
        """
        return lambda: None

    def import_memory(self, fd: int, num_bytes: int, handle: bytes, uuid: str) -> tuple[int, int, Callable[[], None]]:
        """Opens memory of the device that another process shares; from any thread, where `imports_memory` is set.

        Args:
            fd: the file that stands for it; or below 0.
            num_bytes: that the file has.
            handle: what stands for it where no file does.
            uuid: of the GPU that it lies on, as its owner says; hexadecimal digits.

        Returns:
            Address, bytes, and what gives it back.

        Raises:
            RuntimeError: the device refuses.
        """
        raise NotImplementedError

    @abstractmethod
    def begin(self, step: Step) -> Pending:
        """Begins to append, to decode, or both.

        Raises:
            ValueError: as the backend's methods do.
            torch.OutOfMemoryError: there is no memory to select with; what was to be appended is.
            RuntimeError: nobody knows what the pages hold.
        """

    @abstractmethod
    def step_buffers(self) -> Sequence[StepBuffer]:
        """Rooms for `STEP_BUFFERS` steps of up to `MAX_RUNS` runs and `MAX_TOKENS` tokens: the same at each call."""

    @property
    def replays(self) -> Replays | None:
        """What of the steps in step buffers is captured, as of now; None where `run_step_buffer` runs them."""
        return None

    def run_step_buffer(self, number: int, runs: int, tokens: int) -> None:
        """Runs a step that was made in a step buffer to its end, where nothing is captured.

        Args:
            number: of the step buffer.
            runs: R.
            tokens: T.
        """
        raise NotImplementedError

    def check(self, began: float) -> None:
        """Asks after a step in a step buffer that is not done.

        Args:
            began: `blockdex._native.now` seconds of its launch.

        Raises:
            RuntimeError: the device has failed.
            DeviceHungError: it has not answered for `ANSWER_SECONDS`.
        """
        check_patience(began)

    @abstractmethod
    def begin_prefill(self, step: Step) -> Pending:
        """Begins to select for one run of many queries, whose keys were appended by steps begun before.

        Whoever begins it sees to it that no page it reads is written before it is done, and copies its answer before
        another one is begun.
        """


def step_buffer_bytes(spec: IndexSpec) -> int:
    """Bytes of the largest step that a step buffer holds."""
    rows = 2 * MAX_TOKENS * spec.head_dim * (1 + spec.num_index_heads)
    return keys_offset(MAX_RUNS) + rows + 8 * addresses_of(spec, MAX_TOKENS)


def addresses_of(spec: IndexSpec, tokens: int) -> int:
    """Words behind the rows of a captured step of so many tokens: addresses of keys, queries and block ids, signals."""
    return tokens * (1 + 2 * spec.num_index_heads) + 2 * SIGNALS


def keys_offset(runs: int) -> int:
    """Where in a step buffer the keys begin, behind the columns of so many runs."""
    return -(-4 * COLUMNS * runs // 16) * 16


def step_buffer_ids(spec: IndexSpec) -> int:
    """Block ids of the largest step that a step buffer holds."""
    return MAX_TOKENS * spec.num_index_heads * spec.topk


def append_all(backend: Backend, keys: torch.Tensor, spans: Spans) -> None:
    """Appends keys `[T, 1, D]`; a RuntimeError where there is no memory for that, of which the caller knows nothing."""
    try:
        backend.append(keys[:, 0], spans)
    except torch.OutOfMemoryError as error:
        raise RuntimeError("device: no memory left to append with") from error


def write_targets(selection: Selection, targets: Sequence[Target]) -> None:
    """Copies the shares of a selection to where they are wanted, on the current stream; nobody waits for that."""
    for target in targets:
        target.block_ids.copy_(selection.block_ids[:, target.heads], non_blocking=True)
        if target.scores is not None:
            assert selection.scores is not None
            target.scores.copy_(selection.scores[:, target.heads], non_blocking=True)


def check_patience(began: float) -> None:
    """Raises DeviceHungError for a step that takes longer than any can; `began` by `blockdex._native.now`."""
    if now() - began > ANSWER_SECONDS:
        raise DeviceHungError(f"device: a step has not ended after {ANSWER_SECONDS:.0f} s")


def joined(packed: Packed, num_tokens: int, head_dim: int) -> torch.Tensor:
    """`[T, heads, D]` on the host; the received bytes themselves where they are one part."""
    parts = [
        part if isinstance(part, torch.Tensor) else torch.frombuffer(part, dtype=torch.uint8) for part in packed.parts
    ]
    data = parts[0] if len(parts) == 1 else torch.cat(parts)
    if data.data_ptr() % packed.dtype.itemsize:
        data = data.clone()
    return data.view(packed.dtype).view(num_tokens, packed.heads, head_dim)


def on_host(selection: Selection) -> Answer:
    """A selection on the host as arrays."""
    scores = selection.scores
    return Answer(selection.block_ids.numpy(), None if scores is None else scores.numpy())
