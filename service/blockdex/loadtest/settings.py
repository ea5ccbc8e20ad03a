"""What a load test is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from blockdex.client.endpoint import Endpoint
from blockdex.loadtest.schedule import Spacing

SCENARIOS = {
    "decode-fleet": "engines that decode: one token (and drafts) of every sequence of a batch, layer by layer",
    "prefill-storm": "engines that prefill: prompts on top of prefixes of a long context, in chunks",
    "mixed": "a quarter of the clients prefill while the others decode",
    "forks": "prefix sharing: fork anywhere, append to both, truncate, close",
    "churn": "short lives: open, append a prompt, select, decode a little, close",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """What shapes the load; two runs are alike where these are.

    Attributes:
        scenario: one of `SCENARIOS`.
        clients: each has a connection, sequences of its own, and one call in flight.
        processes: that share the clients.
        rate: arrivals a second; None for a closed loop, in which a client calls again once it is answered.
        spacing: of the arrivals.
        warm_up: seconds before measuring begins.
        duration: seconds that are measured.
        seed: of everything that is drawn.
        transport: of the clients.
        layers: how many the calls of a step go to; 0 for all, None for a few.
        scale: most that published token counts are multiplied by.
        draft_tokens: that a decode appends beside the one that is certain.
        chunk: most tokens of a prefill's call.
        timeout: seconds that a call may take.
        check_share: share of the answers that are checked.
        ceiling: seconds for which the load test's own ceiling is measured; 0 leaves it out.
    """

    scenario: str
    clients: int
    processes: int
    rate: float | None
    spacing: Spacing
    warm_up: float
    duration: float
    seed: int
    transport: Literal["unary", "stream"]
    layers: int | None
    scale: float
    draft_tokens: int
    chunk: int
    timeout: float
    check_share: float
    ceiling: float


@dataclass(frozen=True, slots=True)
class Target:
    """Where the load goes.

    Attributes:
        endpoint: the server's gRPC, and how it and the load test know each other.
        http_address: of its HTTP, for its metrics, `https://` before it with TLS; empty where they are not asked for.
        tenant: whose sequences they are.
    """

    endpoint: Endpoint
    http_address: str
    tenant: str

    def told(self) -> dict[str, str]:
        """What a result says of it: nothing of a token."""
        return {"address": self.endpoint.address, "http_address": self.http_address, "tenant": self.tenant}
