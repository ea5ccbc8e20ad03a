"""Plans of the load test for servers that are only described."""

from __future__ import annotations

from typing import Any

from blockdex.client import Info
from blockdex.contract.messages import CacheUsage, Limits
from blockdex.loadtest.shapes import Plan, make_plan
from blockdex_kernels import IndexSpec

SPEC = IndexSpec(num_layers=2)


def info(pages: int, used: int = 0, spec: IndexSpec = SPEC, max_message_bytes: int = 1 << 27) -> Info:
    limits = Limits(max_message_bytes, max_spans=64, max_queued_requests=1, max_stream_requests=1, max_wait_ms=1)
    cache = CacheUsage(pages, used, 0, pages * spec.block_size, spec.bytes_per_page, 0, 0, 0)
    return Info(spec, limits, cache, 1, "cpu", "", {}, "0", frozenset(), ())


def plan(scenario: str, server: Info, **changes: Any) -> Plan:
    arguments = {"clients": 4, "scale": 1.0, "seed": 0, "layers": 0, "draft_tokens": 0, "chunk": 2048} | changes
    return make_plan(server, scenario, **arguments)
