"""What a device channel shares beside the ring's segment, byte by byte; `docs/ring.md` shows the same tables."""

from __future__ import annotations

from typing import NamedTuple

from blockdex.ring.layout import ALIGNMENT, Field, aligned

MAX_SEGMENT_BYTES = 1 << 20
"""Of a segment that a client made."""
MAX_CHANNELS = 16
"""Of a link."""
REQUEST_SLOTS = 2
REFUSAL_BYTES = 32 << 10
"""Of the answers' arena: a channel's answers are refusals."""
CONTROL_BYTES = 4096
"""Of the channel's memory, before what requests carry."""

CONTROL = (
    Field("answered", 0, "Q"),
    Field("written", 128, "Q"),
    Field("error", 136, "I"),
    Field("arrived", 140, "I"),
    Field("region", 144, "I"),
)
CONTROL_AT = {field.name: field.offset for field in CONTROL}

TIMED_OUT, REFUSED, UNANSWERED, ENGINE_GONE, CLOSED, INVALID_LENGTHS = range(1, 7)
"""Why a channel is dead."""


class Places(NamedTuple):
    """Where in a channel's memory its parts begin; offsets in bytes.

    Attributes:
        token_places: int32 `[max_tokens]`: of each token of the call, its row in what follows, or -1.
        keys: `[max_tokens, D]`, packed, of up to 4 bytes each.
        queries: `[max_tokens, H, D]`, packed, likewise.
        block_ids: int32 `[max_tokens, H, topk]`, packed.
        scores: float32, likewise.
        own: where the caller's own tensors may lie.
    """

    token_places: int
    keys: int
    queries: int
    block_ids: int
    scores: int
    own: int


def places_of(max_tokens: int, heads: int, head_dim: int, topk: int) -> Places:
    """Of calls of so many tokens at most."""
    offsets = [CONTROL_BYTES]
    sizes = (4, 4 * head_dim, 4 * heads * head_dim, 4 * heads * topk, 4 * heads * topk)
    for size in sizes:
        offsets.append(offsets[-1] + aligned(size * max_tokens))
    assert all(offset % ALIGNMENT == 0 for offset in offsets)
    return Places(*offsets)
