"""What a client does in each scenario: the calls that make ready, then calls without end."""

from __future__ import annotations

import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

from blockdex.loadtest.shapes import (
    CHURN_DECODES,
    FORK_APPEND,
    LIVE_FORKS,
    Bounds,
    ChurnShape,
    DecodeShape,
    ForkShape,
    PrefillShape,
    Shape,
)
from blockdex.loadtest.steps import KeptSequence, Operation, SequenceStep, Span, Step, TokenStep

_SELECTED_ROWS = 8
_STREAMS = 2**31


class Numbers:
    """What is unique to one client of a run: sequence ids, streams of keys, and its own random numbers.

    Args:
        run: drawn for the run, so that its ids are nobody else's: below 2^24.
        client: number of the client: below 4,096.
        seed: of the streams and the random numbers.
    """

    def __init__(self, run: int, client: int, seed: int) -> None:
        self.ids = itertools.count((run << 40) + (client << 28) + 1)
        self.random = random.Random(f"script {seed} {client}")
        self.streams: Iterator[int] = iter(lambda: self.random.randrange(_STREAMS), -1)

    def sequence(self) -> KeptSequence:
        """A sequence that is not open yet."""
        return KeptSequence(next(self.ids), self.streams)


class Script(ABC):
    """One client's calls. A client whose call has failed starts over with a new script."""

    def __init__(self, numbers: Numbers, bounds: Bounds) -> None:
        self.numbers = numbers
        self.bounds = bounds

    @abstractmethod
    def set_up(self) -> Iterator[Step]:
        """The calls before the first turn."""

    @abstractmethod
    def steps(self) -> Iterator[Step]:
        """One call a turn, without end; each may rest on those before it having succeeded."""

    def open(self, sequence: KeptSequence) -> SequenceStep:
        """Opens a sequence."""
        return SequenceStep("open", sequence.id)

    def fork(self, parent: KeptSequence, child: KeptSequence) -> SequenceStep:
        """Opens what `parent.fork` made."""
        return SequenceStep("fork", child.id, parent=parent.id, length=child.length)

    def close(self, sequence: KeptSequence) -> SequenceStep:
        """Closes a sequence."""
        return SequenceStep("close", sequence.id)

    def select_appended(self, operation: Operation, spans: Iterable[Span]) -> Iterator[TokenStep]:
        """AppendAndSelect for the spans, layer after layer."""
        together = tuple(spans)
        for layer in range(self.bounds.layers):
            yield TokenStep(operation, "AppendAndSelect", layer, together)

    def append(self, spans: Iterable[Span]) -> Iterator[TokenStep]:
        """AppendKeys for the spans, layer after layer."""
        together = tuple(spans)
        for layer in range(self.bounds.layers):
            yield TokenStep("append", "AppendKeys", layer, together)

    def fill(self, targets: Iterable[tuple[KeptSequence, int]]) -> Iterator[TokenStep]:
        """Makes sequences as long as they have to be, in as few calls as bounds allow."""
        spans: list[Span] = []
        room = self.bounds.fill
        for sequence, tokens in targets:
            while sequence.length < tokens:
                spans.append(sequence.write(sequence.length, min(room, tokens - sequence.length)))
                room -= spans[-1].run.length
                if not room or len(spans) == self.bounds.max_spans:
                    yield from self.append(spans)
                    spans, room = [], self.bounds.fill
        if spans:
            yield from self.append(spans)


class DecodeScript(Script):
    """An engine that decodes one batch: every step appends to all its sequences, in all layers.

    With draft tokens, each sequence keeps a random number of those it appended; the next step begins after them, and
    so rolls the rest back.
    """

    def __init__(self, numbers: Numbers, bounds: Bounds, shape: DecodeShape) -> None:
        super().__init__(numbers, bounds)
        self._lengths = shape.lengths
        self._sequences = [numbers.sequence() for _ in shape.lengths]

    def set_up(self) -> Iterator[Step]:
        """Every sequence at its first length."""
        yield from map(self.open, self._sequences)
        yield from self.fill(zip(self._sequences, self._lengths, strict=True))

    def steps(self) -> Iterator[Step]:
        """One decode after another."""
        rows = 1 + self.bounds.draft_tokens
        starts = list(self._lengths)
        while True:
            spans = [sequence.write(start, rows) for sequence, start in zip(self._sequences, starts, strict=True)]
            yield from self.select_appended("decode", spans)
            for place, first in enumerate(self._lengths):
                starts[place] += self.numbers.random.randint(1, rows)
                if starts[place] >= first + self.bounds.block_size:
                    starts[place] = first


class PrefillScript(Script):
    """An engine that prefills: each prompt forks a prefix off one long context and appends what is new, in chunks."""

    def __init__(self, numbers: Numbers, bounds: Bounds, shape: PrefillShape) -> None:
        super().__init__(numbers, bounds)
        self._shape = shape
        self._context = numbers.sequence()

    def set_up(self) -> Iterator[Step]:
        """The context."""
        yield self.open(self._context)
        yield from self.fill([(self._context, self._shape.context)])

    def steps(self) -> Iterator[Step]:
        """One prompt after another."""
        weights = [case.weight for case in self._shape.cases]
        while True:
            (case,) = self.numbers.random.choices(self._shape.cases, weights)
            sequence = self._context.fork(next(self.numbers.ids), case.tokens - case.queries)
            yield self.fork(self._context, sequence)
            while sequence.length < case.tokens:
                rows = min(self.bounds.chunk, case.tokens - sequence.length)
                yield from self.select_appended("prefill", [sequence.write(sequence.length, rows)])
            yield self.close(sequence)


class ForkScript(Script):
    """An agent that branches: it forks any of its sequences anywhere, appends to both, and closes some."""

    def __init__(self, numbers: Numbers, bounds: Bounds, shape: ForkShape) -> None:
        super().__init__(numbers, bounds)
        self._shape = shape
        self._live = [numbers.sequence()]

    def set_up(self) -> Iterator[Step]:
        """The first sequence."""
        yield self.open(self._live[0])
        yield from self.fill([(self._live[0], self._shape.tokens)])

    def steps(self) -> Iterator[Step]:
        """Fork, append to both, and sometimes truncate or close."""
        chance = self.numbers.random
        while True:
            parent = chance.choice(self._live)
            child = parent.fork(next(self.numbers.ids), chance.randint(self._shape.common, parent.length))
            yield self.fork(parent, child)
            self._live.append(child)
            rows = chance.randint(1, FORK_APPEND)
            yield from self.select_appended("decode", [part.write(part.length, rows) for part in (parent, child)])
            for part in (parent, child):
                if part.length > self._shape.longest - FORK_APPEND:
                    part.truncate(self._shape.tokens)
                    yield SequenceStep("truncate", part.id, length=self._shape.tokens)
            if len(self._live) > LIVE_FORKS:
                # The first one stays: it holds what all have in common.
                yield self.close(self._live.pop(chance.randrange(1, len(self._live))))


class ChurnScript(Script):
    """Many short lives: open, append a prompt, select for its last tokens, decode a little, close."""

    def __init__(self, numbers: Numbers, bounds: Bounds, shape: ChurnShape) -> None:
        super().__init__(numbers, bounds)
        self._tokens = shape.tokens

    def set_up(self) -> Iterator[Step]:
        """Nothing: every sequence begins and ends in its turns."""
        return iter(())

    def steps(self) -> Iterator[Step]:
        """One sequence after another."""
        chance = self.numbers.random
        while True:
            sequence = self.numbers.sequence()
            yield self.open(sequence)
            prompt = chance.randint(1, self._tokens)
            while sequence.length < prompt:
                rows = min(self.bounds.chunk, prompt - sequence.length)
                yield from self.append([sequence.write(sequence.length, rows)])
            last = (sequence.last(min(rows, _SELECTED_ROWS)),)
            for layer in range(self.bounds.layers):
                yield TokenStep("select", "SelectBlocks", layer, last)
            for _ in range(chance.randint(1, CHURN_DECODES)):
                yield from self.select_appended("decode", [sequence.write(sequence.length, 1)])
            yield self.close(sequence)


def script_of(shape: Shape, numbers: Numbers, bounds: Bounds) -> Script:
    """The script of a client of that shape.

    Raises:
        TypeError: no script has such a shape.
    """
    match shape:
        case DecodeShape():
            return DecodeScript(numbers, bounds, shape)
        case PrefillShape():
            return PrefillScript(numbers, bounds, shape)
        case ForkShape():
            return ForkScript(numbers, bounds, shape)
        case ChurnShape():
            return ChurnScript(numbers, bounds, shape)
    raise TypeError(f"shape: {type(shape).__name__} has no script")
