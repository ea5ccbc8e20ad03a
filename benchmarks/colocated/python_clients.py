"""A step of all layers by the Python client over unary calls, a stream and the ring, one way after the other.

Each round makes a step over each way, so that whatever else the machine does strikes all alike.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.client import kernel_seconds, timed
from benchmarks.colocated.decode import Decode
from benchmarks.colocated.settings import FIRST_ID, TENANT, Settings
from blockdex import Client

WAYS: tuple[Literal["unary", "stream", "ring"], ...] = ("unary", "stream", "ring")
_WARM_UP = 0.2


class Engine:
    """Decodes the same token of its sequences again and again, and checks each answer."""

    def __init__(self, client: Client, decode: Decode, settings: Settings) -> None:
        self._client, self._decode = client, decode
        count = settings.sequences
        self._spans: dict[str, Any] = {
            "sequences": list(range(FIRST_ID, FIRST_ID + count)),
            "starts": [settings.tokens] * count,
            "lengths": [1] * count,
        }

    def call(self, layer: int) -> None:
        """One layer of a step."""
        keys, queries = self._decode.keys[layer], self._decode.queries[layer]
        self._block_ids = self._client.append_and_select(
            layer, **self._spans, keys=keys, queries=queries, rollback=True
        )

    def step(self) -> list[float]:
        """All layers; the microseconds of each call."""
        taken = []
        for layer, expected in enumerate(self._decode.block_ids):
            taken.append(1e3 * timed(partial(self.call, layer)))
            if not np.array_equal(self._block_ids, expected):
                raise AssertionError(f"layer {layer}: block ids differ from a plain selection's")
        return taken


def summary(calls_us: list[list[float]]) -> dict[str, float]:
    """Of the microseconds of each call of each step: what a row of the run tells of them."""
    calls = np.array(calls_us)
    steps = calls.sum(axis=1) / 1e3
    return {
        "call_p50_us": float(np.percentile(calls, 50)),
        "call_p99_us": float(np.percentile(calls, 99)),
        "step_p50_ms": float(np.percentile(steps, 50)),
        "step_p99_ms": float(np.percentile(steps, 99)),
    }


def main() -> None:
    """Prints the numbers of each way, and microseconds that the kernels of a call take by the server's own metrics."""
    settings = Settings.of_command_line()
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(settings.grpc, transport=way, tenant=TENANT, timeout=20)) for way in WAYS]
        spec = clients[0].info().spec
        decode = Decode.read(Path(settings.folder) / f"{FIRST_ID}.bin", spec, settings.sequences)
        engines = [Engine(client, decode, settings) for client in clients]
        for _ in range(max(int(_WARM_UP * settings.steps), 2)):
            for engine in engines:
                engine.step()
        kernels = kernel_seconds(settings.http)
        steps: list[list[list[float]]] = [[] for _ in engines]
        for _ in range(settings.steps):
            for engine, taken in zip(engines, steps, strict=True):
                taken.append(engine.step())
        kernels = (kernel_seconds(settings.http) - kernels) / (len(WAYS) * settings.steps * settings.layers)
    numbers = {way: summary(taken) for way, taken in zip(WAYS, steps, strict=True)}
    print(json.dumps(numbers | {"kernels_us": 1e6 * kernels}))


if __name__ == "__main__":
    main()
