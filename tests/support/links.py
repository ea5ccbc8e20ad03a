"""A frontend's side of a ring as it is compiled, within the bounds of the engine that tests run."""

from __future__ import annotations

from typing import Any

from blockdex import _native
from blockdex.contract.messages import Limits
from blockdex.ring.caller import RPCS
from blockdex.ring.segment import Segment
from blockdex_kernels import IndexSpec
from support.running_engine import LIMITS, SPEC

BOUNDS = (0.001, 0.1, 10.0)
"""Upper bounds of the buckets in which a link counts its answers, in seconds."""


def link_of(segment: Segment, bell: int, *, spec: IndexSpec = SPEC, limits: Limits = LIMITS, **options: Any) -> Any:
    """The compiled side of a segment; answers are told as soon as they are there, and no time of theirs."""
    bounds: dict[str, Any] = {
        "num_heads": spec.num_index_heads,
        "max_spans": limits.max_spans,
        "max_message_bytes": limits.max_message_bytes,
        "max_waiting": limits.max_queued_requests,
        "tell_seconds": 100.0,
        "num_rpcs": len(RPCS),
        "time_bounds": BOUNDS,
    }
    return _native.ClientLink(segment.memory, bell, **bounds | options)
