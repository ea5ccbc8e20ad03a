"""Who sends requests over a ring, and what they are told: unary calls and streams alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from blockdex.contract.errors import BlockdexError
from blockdex.contract.messages import Phase, SequenceState, Stage

TOKEN_RPCS = ("AppendKeys", "SelectBlocks", "AppendAndSelect")
STREAM = len(TOKEN_RPCS)
"""Number of a request of a stream, which says itself which of the token RPCs it is; those are numbered from 0."""

SEQUENCE_RPCS = (
    "OpenSequences",
    "GetSequence",
    "ForkSequence",
    "TruncateSequence",
    "CloseSequences",
    "CreatePool",
    "SetPageTables",
    "ClosePool",
)
RPCS = tuple(prefix + rpc for rpcs in (TOKEN_RPCS, SEQUENCE_RPCS) for prefix in ("", "Stream/") for rpc in rpcs)
"""RPCs by number, as metrics and log name them."""

LINK_RPCS = tuple(f"{way}/{rpc}" for way in ("Ring", "Channel") for rpc in (*TOKEN_RPCS, *SEQUENCE_RPCS))
"""Calls of clients on the server's host, as the core numbers them."""


class CameTo(NamedTuple):
    """What a request came to in the engine.

    Attributes:
        received: `time.monotonic` seconds at which it was handed over.
        phase: what it was.
        stage_seconds: seconds in each of the engine's stages, as far as it got; the rest of its time it was here.
        layer: of a token request, as are the other two.
        spans: how many; 0 of a request about a sequence.
        tokens: how many, of all spans.
    """

    received: float
    phase: Phase = "sequence"
    stage_seconds: Mapping[Stage, float] = {}
    layer: int = 0
    spans: int = 0
    tokens: int = 0


class Caller(Protocol):
    """Who sends requests; each is answered or failed once, unless it is given up.

    Every call is made on the channel's loop. Requests that were answered well are counted and timed already.
    """

    def answered(self, number: int, response: bytes) -> None:
        """The response to a token request, as it goes over the wire."""
        ...

    def changed(self, number: int, state: SequenceState) -> None:
        """The answer to a request about a sequence."""
        ...

    def took(self, number: int, rpc: str, came_to: CameTo) -> None:
        """How the request just answered spent its time: told of slow ones, or of all where the channel is to."""
        ...

    def failed(self, number: int, rpc: str, began: float, error: BlockdexError, came_to: CameTo | None) -> None:
        """A request was refused, by the engine where it says what it came to; neither counted nor timed yet."""
        ...


class GivenUp(NamedTuple):
    """A request that nobody waits for any more."""

    number: int
    rpc: str
    came_to: CameTo
