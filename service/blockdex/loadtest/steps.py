"""What a client of the load test does, one call at a time, and what it knows of its sequences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from blockdex.loadtest.tensors import Run

Operation = Literal["open", "fork", "truncate", "close", "append", "select", "decode", "prefill"]
"""What latencies are told apart by. `decode` and `prefill` are AppendAndSelect of few and of many tokens a sequence."""


@dataclass(slots=True)
class KeptSequence:
    """A sequence as the load test wrote it; alike in all layers once every layer has had its call.

    Attributes:
        id: the sequence's id.
        length: tokens.
        runs: which stream the key of each position came from, without gaps.
    """

    id: int
    streams: Iterator[int]
    length: int = 0
    runs: list[Run] = field(default_factory=list)
    _continues: bool = False

    def write(self, start: int, length: int) -> Span:
        """Takes note of an append, with which all from `start` on is gone; keys in place of others differ from them."""
        self._continues &= start == self.length
        self._cut(start)
        if self._continues:
            last = self.runs.pop()
            run = Run(last.start, last.length + length, last.stream)
        else:
            run = Run(start, length, next(self.streams))
        self.runs.append(run)
        self.length = start + length
        self._continues = True
        return Span(self, Run(start, length, run.stream))

    def last(self, length: int) -> Span:
        """The last positions, all written by one append."""
        return Span(self, Run(self.length - length, length, self.runs[-1].stream))

    def fork(self, child: int, length: int) -> KeptSequence:
        """The first `length` tokens as a sequence of their own; what it writes differs from what its parent writes."""
        copy = KeptSequence(child, self.streams, self.length, list(self.runs))
        copy.truncate(length)
        return copy

    def truncate(self, length: int) -> None:
        """Takes note of a truncation."""
        self._cut(length)
        self.length = min(self.length, length)
        self._continues = False

    def _cut(self, length: int) -> None:
        while self.runs and self.runs[-1].start >= length:
            self.runs.pop()
        if self.runs and self.runs[-1].start + self.runs[-1].length > length:
            last = self.runs.pop()
            self.runs.append(Run(last.start, length - last.start, last.stream))


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of one sequence in a request."""

    sequence: KeptSequence
    run: Run


@dataclass(frozen=True, slots=True)
class SequenceStep:
    """A call on a whole sequence: `length` is where a fork or a truncation cuts, `parent` what a fork is made from."""

    operation: Literal["open", "fork", "truncate", "close"]
    sequence: int
    parent: int = 0
    length: int = 0

    @property
    def rpc(self) -> str:
        """Name of the RPC."""
        return f"{self.operation.capitalize()}Sequence{'s' if self.operation in {'open', 'close'} else ''}"


@dataclass(frozen=True, slots=True)
class TokenStep:
    """A call for tokens of one layer: it appends their keys, selects for them, or both."""

    operation: Operation
    rpc: Literal["AppendKeys", "SelectBlocks", "AppendAndSelect"]
    layer: int
    spans: tuple[Span, ...]

    @property
    def rows(self) -> int:
        """Tokens of all spans."""
        return sum(span.run.length for span in self.spans)


Step = SequenceStep | TokenStep
