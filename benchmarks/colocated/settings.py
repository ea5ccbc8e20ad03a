"""What every row of the run is told."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass

TENANT = "colocated"
FIRST_ID, FLEET_FIRST_ID, PREFILL_ID = 1, 1_000, 1_000_000
"""Of the sequences that decode, of the fleet's (those of its next client are a thousand further), and of a prefill."""


@dataclass(frozen=True)
class Settings:
    """Where the server is, and how much is asked.

    Attributes:
        grpc, http, socket: its addresses.
        core: process id of its engine core.
        folder: where what is asked lies.
        device: of the server, `cpu` or a CUDA device.
        engine_device: of the engine where that is a GPU.
        layers: of the indexer.
        sequences: that decode together.
        tokens: of each at the beginning; its next one is decoded again and again.
        steps: of all layers that are measured.
        clients: of the fleet, with as many sequences each.
        fleet_layers: that each of them asks for.
        prompt: tokens of a sequence that prefills.
        queries: of its last tokens.
        idle_seconds: for which an idle channel is watched.
    """

    grpc: str
    http: str
    socket: str
    core: int
    folder: str
    device: str
    engine_device: str
    layers: int
    sequences: int
    tokens: int
    steps: int
    clients: int
    fleet_layers: int
    prompt: int
    queries: int
    idle_seconds: float

    def word(self) -> str:
        """All of it as a word of a command line."""
        return json.dumps(asdict(self))

    @classmethod
    def of_command_line(cls) -> Settings:
        """What `word` said."""
        return cls(**json.loads(sys.argv[1]))
