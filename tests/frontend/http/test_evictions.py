"""Evictions are told: in the log, in the metrics, on the page."""

from __future__ import annotations

import json

import httpx
import numpy as np

import blockdex
from support.processes import eventually
from support.serving import serve

PAGES, PAGE_BYTES, LAYERS = 8, 3 * 128 * 128 * 2, 3


def test_a_burst_is_one_line_in_the_log() -> None:
    flags = ("--num-layers", str(LAYERS), "--cache-bytes", str(PAGES * PAGE_BYTES), "--device", "cpu")
    with serve(*flags, "--lease-seconds", "0.2") as serving, blockdex.Client(serving.grpc_address) as client:
        for sequence in range(PAGES):
            client.open_sequence(sequence)
            client.append_keys(layer=0, sequences=[sequence], lengths=[128], keys=np.ones((128, 128), np.float32))

        def text(path: str) -> str:
            return httpx.get(f"http://{serving.http_address}{path}").text

        eventually(lambda: f"blockdex_idle_sequences {PAGES}.0" in text("/metrics"), "their leases end")
        assert f"blockdex_idle_pages {PAGES}.0" in text("/metrics")
        client.open_sequence(100)
        client.append_keys(layer=0, sequences=[100], lengths=[640], keys=np.ones((640, 128), np.float32))
        eventually(lambda: '"evicted"' in "".join(serving.output), "it is told")
        told = serving.event("evicted")  # one line
        assert (told["level"], told["sequences"], told["open_sequences"]) == ("warning", 5, 4)
        assert (told["free_pages"], told["total_pages"]) == (0, PAGES)
        cache = json.loads(text("/v1/live"))["cache"]
        assert (cache["evictions"], cache["evictions_window"]) == (5, 5)
        assert "blockdex_evictions_total 5.0" in text("/metrics")
