"""How large a scenario is: the published shapes, made to fit what the server has free."""

from __future__ import annotations

import dataclasses
import random
from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from blockdex.client import Info
from blockdex.loadtest.workloads import DECODE_CASES, PREFILL_CASES, DecodeCase, PrefillCase, lengths_around

_FREE_SHARE = 0.9
_FEWEST_BLOCKS = 4
_HALVINGS = 40
_FORK_TOKENS = 8_000
_CHURN_TOKENS = 4_000
_LAYERS = 4
_LEAST_PREFILL = 32
_FILL_TOKENS = 8_192
_PREFILL_SHARE = 4

LIVE_FORKS = 6
"""Sequences that a client of the scenario `forks` keeps at a time; while it makes a further one, one more."""
FORKED_SHARE = 0.875
"""Share of the first one's tokens that they all have in common with it."""
FORK_APPEND = 8
"""Most tokens that one of its calls appends to a sequence."""
CHURN_DECODES = 8
"""Most tokens that a sequence of the scenario `churn` grows by after its prompt."""


class ShapeError(Exception):
    """A scenario that the server has no room for: one line that says what it has and what is needed."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What every client keeps to.

    Attributes:
        layers: calls of a step go to layers 0 to this, exclusively.
        draft_tokens: tokens that a decode appends beside the one that is certain.
        chunk: most tokens of a prefill's call.
        fill: most tokens of a call that only makes a sequence as long as it has to be.
        max_spans: most sequences of a call.
        block_size: tokens of a block.
        floor: tokens that decoding sequences and prompts are not scaled below.
    """

    layers: int
    draft_tokens: int
    chunk: int
    fill: int
    max_spans: int
    block_size: int
    floor: int


class Shape(Protocol):
    """What one client is."""

    @property
    def held(self) -> tuple[int, ...]:
        """Tokens of each sequence that the client holds at a time, at their most; of a fork, what it does not share."""
        ...

    @property
    def longest(self) -> int:
        """Tokens of its longest sequence, at its longest."""
        ...


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """Sequences that decode together; each starts over at its first length when it has grown by about a block.

    Attributes:
        case: the published one.
        lengths: first lengths of the sequences.
        growth: most tokens that a sequence grows by.
    """

    case: DecodeCase
    lengths: tuple[int, ...]
    growth: int

    @property
    def held(self) -> tuple[int, ...]:
        """All of them."""
        return tuple(length + self.growth for length in self.lengths)

    @property
    def longest(self) -> int:
        """As the others, and grown."""
        return max(self.lengths) + self.growth

    def __str__(self) -> str:
        mean = sum(self.lengths) // len(self.lengths)
        published = f"{self.case.batch} x {self.case.tokens:,}"
        return f"decode: {len(self.lengths)} x about {mean:,} tokens (published: {published})"


@dataclass(frozen=True, slots=True)
class PrefillShape:
    """New tokens at the end of prefixes of one long context.

    Attributes:
        cases: what is prefilled, and how often.
        block_size: tokens of a block.
    """

    cases: tuple[PrefillCase, ...]
    block_size: int

    @property
    def context(self) -> int:
        """Tokens of the context."""
        return max(case.tokens - case.queries for case in self.cases)

    @property
    def held(self) -> tuple[int, ...]:
        """The context and one fork of it, which copies a partly filled block."""
        return self.context, max(case.queries for case in self.cases) + self.block_size

    @property
    def longest(self) -> int:
        """The longest prompt."""
        return max(case.tokens for case in self.cases)

    def __str__(self) -> str:
        queries = [case.queries for case in self.cases]
        tokens = [case.tokens for case in self.cases]
        return f"prefill: {min(queries):,} to {max(queries):,} tokens at the end of {min(tokens):,} to {max(tokens):,}"


@dataclass(frozen=True, slots=True)
class ForkShape:
    """Sequences forked from one another, each of which is truncated whenever it has grown enough.

    Attributes:
        tokens: that the first one begins with.
        growth: most tokens that a sequence grows by.
        block_size: tokens of a block.
    """

    tokens: int
    growth: int
    block_size: int

    @property
    def common(self) -> int:
        """Tokens from its beginning on that every sequence shares with the first one."""
        return int(FORKED_SHARE * self.tokens)

    @property
    def held(self) -> tuple[int, ...]:
        """The first one, and of each other what it does not share, with the block that is copied."""
        return self.longest, *(self.longest - self.common + self.block_size,) * LIVE_FORKS

    @property
    def longest(self) -> int:
        """Before it is truncated."""
        return self.tokens + self.growth

    def __str__(self) -> str:
        return f"forks: {LIVE_FORKS} sequences of up to {self.longest:,} tokens, {self.common:,} in common"


@dataclass(frozen=True, slots=True)
class ChurnShape:
    """One sequence after another, each with a prompt of 1 to `tokens`."""

    tokens: int

    @property
    def held(self) -> tuple[int, ...]:
        """One."""
        return (self.longest,)

    @property
    def longest(self) -> int:
        """The longest prompt and its decodes."""
        return self.tokens + CHURN_DECODES

    def __str__(self) -> str:
        return f"churn: prompts of 1 to {self.tokens:,} tokens, then 1 to {CHURN_DECODES} decodes"


@dataclass(frozen=True, slots=True)
class Plan:
    """What every client of a run is.

    Attributes:
        bounds: what all keep to.
        shapes: one for each client.
        scale: what the published token counts were multiplied by.
        free_tokens: what the server had free.
    """

    bounds: Bounds
    shapes: tuple[Shape, ...]
    scale: float
    free_tokens: int

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence of any client."""
        return max(shape.longest for shape in self.shapes)


def _decode_shapes(clients: int, scale: float, seed: int, bounds: Bounds) -> list[Shape]:
    """One case a client, spread evenly over the cases by weight, so that few clients stand for all of them.

    Where there is little room, batches get smaller before sequences get shorter than `bounds.floor`.
    """
    cases = sorted(DECODE_CASES, key=lambda case: case.batch * case.tokens)
    edges = list(accumulate(case.weight for case in cases))
    shapes: list[Shape] = []
    for client in range(clients):
        case = cases[bisect(edges, edges[-1] * (client + 0.5) / clients)]
        tokens = max(round(case.tokens * scale), min(case.tokens, bounds.floor))
        batch = min(max(1, round(case.batch * min(1.0, case.tokens * scale / tokens))), bounds.max_spans)
        lengths = lengths_around(batch, tokens, random.Random(f"lengths {seed} {client}"))
        shapes.append(DecodeShape(case, lengths, bounds.block_size + 1 + bounds.draft_tokens))
    return shapes


def _prefill_shapes(clients: int, scale: float, bounds: Bounds) -> list[Shape]:
    cases = []
    for case in PREFILL_CASES:
        queries = max(round(case.queries * scale), _LEAST_PREFILL)
        tokens = max(round(case.tokens * scale), queries + bounds.block_size, min(case.tokens, bounds.floor))
        cases.append(PrefillCase(queries, tokens, case.weight))
    return [PrefillShape(tuple(cases), bounds.block_size)] * clients


def _shapes(scenario: str, clients: int, scale: float, seed: int, bounds: Bounds) -> list[Shape]:
    match scenario:
        case "decode-fleet":
            return _decode_shapes(clients, scale, seed, bounds)
        case "prefill-storm":
            return _prefill_shapes(clients, scale, bounds)
        case "mixed":
            prefilling = max(1, clients // _PREFILL_SHARE)
            return [
                *_decode_shapes(clients - prefilling, scale, seed, bounds),
                *_prefill_shapes(prefilling, scale, bounds),
            ]
        case "forks":
            tokens = max(round(_FORK_TOKENS * min(scale, 1.0)), bounds.block_size)
            return [ForkShape(tokens, bounds.block_size // 2 + FORK_APPEND, bounds.block_size)] * clients
        case "churn":
            return [ChurnShape(max(round(_CHURN_TOKENS * min(scale, 1.0)), bounds.block_size))] * clients
    raise ValueError(f"scenario: unknown {scenario!r}")


def make_plan(
    info: Info,
    scenario: str,
    *,
    clients: int,
    scale: float,
    seed: int,
    layers: int | None,
    draft_tokens: int,
    chunk: int,
) -> Plan:
    """The largest plan that fits what the server has free, and is no larger than `scale` says.

    Decoding sequences and prompts are long enough for a selection to leave half of their blocks out, wherever there is
    room for it.

    Args:
        info: the server's own account of itself.
        scenario: its name.
        clients: how many; `mixed` needs 2.
        scale: most that published token counts are multiplied by.
        seed: of what is drawn.
        layers: how many to use; 0 for all, None for a few.
        draft_tokens: of a decode.
        chunk: most tokens of a prefill's call.

    Raises:
        ShapeError: the server has too little room, too few layers or too small messages.
    """
    spec, limits, cache = info.spec, info.limits, info.cache
    if layers is None:
        layers = min(_LAYERS, spec.num_layers)
    if layers > spec.num_layers:
        raise ShapeError(f"--layers must be at most the server's {spec.num_layers}, got {layers}")
    row_bytes = 2 * spec.head_dim * (1 + spec.num_index_heads)
    most_rows = limits.max_message_bytes // row_bytes
    decode_rows = 1 + draft_tokens
    if most_rows < max(decode_rows, _LEAST_PREFILL):
        raise ShapeError(f"the server takes messages of {limits.max_message_bytes} bytes, a row has {row_bytes}")
    bounds = Bounds(
        layers=layers or spec.num_layers,
        draft_tokens=draft_tokens,
        chunk=min(chunk, most_rows),
        fill=min(_FILL_TOKENS, most_rows),
        max_spans=min(limits.max_spans, most_rows // decode_rows),
        block_size=spec.block_size,
        floor=2 * spec.topk * spec.block_size,
    )
    free = cache.pages_total - cache.pages_used
    room = int(free * _FREE_SHARE)

    def fits(shapes: list[Shape]) -> bool:
        longest = max(shape.longest for shape in shapes)
        return _pages(shapes, spec.block_size) <= room and longest <= spec.max_sequence_tokens

    found = _largest(lambda share: _shapes(scenario, clients, share, seed, bounds), fits, scale)
    if found is None:
        bounds = dataclasses.replace(bounds, floor=min(bounds.floor, _FEWEST_BLOCKS * spec.block_size))
        found = _largest(lambda share: _shapes(scenario, clients, share, seed, bounds), fits, scale)
    if found is None:
        need = _pages(_shapes(scenario, clients, 0.0, seed, bounds), spec.block_size)
        raise ShapeError(
            f"{clients} clients of {scenario} need at least {need} pages of {spec.block_size} tokens, "
            f"the server has {room} to spare ({free} free of {cache.pages_total}): fewer --clients, or a larger cache"
        )
    return Plan(bounds, tuple(found[1]), found[0], free * spec.block_size)


def _pages(shapes: list[Shape], block_size: int) -> int:
    return sum(-(-tokens // block_size) for shape in shapes for tokens in shape.held)


def _largest(
    build: Callable[[float], list[Shape]], fits: Callable[[list[Shape]], bool], most: float
) -> tuple[float, list[Shape]] | None:
    """The largest scale up to `most` whose shapes fit, and the shapes; None where not even the smallest do."""
    if fits(shapes := build(most)):
        return most, shapes
    low, high = 0.0, most
    if not fits(build(low)):
        return None
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(build(middle)) else (low, middle)
    return low, build(low)
