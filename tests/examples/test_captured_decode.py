"""The transformers example with a fixed batch: over a device channel it makes the tokens that it makes over the ring.

Here a CPU takes the GPU's place, and nothing is captured; `tests/gpu/test_transformers_engine.py` does that.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blockdex import Client
from blockdex.device_channel import channel as module
from examples.transformers_engine.captured import StaticDecode, use_channel
from examples.transformers_engine.indexer import BlockdexIndexer, replace_indexers
from examples.transformers_engine.model import build_model
from examples.transformers_engine.requests import Request
from support.channel_twins import launch_numpy
from support.serving import serve

TEXT = (Path(__file__).parents[2] / "LICENSE").read_bytes()
NEW_TOKENS, LENGTH = 8, 2304


def test_tokens_over_a_channel_are_those_over_the_ring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "launch", launch_numpy)
    model = build_model("cpu")
    prompts = (TEXT[:2_200], TEXT[2_200:2_300])
    requests = [Request(number, prompt) for number, prompt in enumerate(prompts, start=1)]
    model.config.to_json_file(tmp_path / "config.json")
    flags = ("--model-config", str(tmp_path / "config.json"), "--cache-bytes", "32MiB")
    with serve(*flags) as server, Client(server.grpc_address, transport="ring", tenant="engine") as client:
        client.open_sequences([1, 2])
        replace_indexers(model, lambda own, layer: BlockdexIndexer(own, client, layer))
        decode = StaticDecode(model, requests, LENGTH)
        decode.prefill()
        for request in requests:
            client.fork_sequence(request.sequence, 10 + request.sequence, len(request.prompt))
        tokens, positions = decode.tokens.clone(), decode.cache.positions.clone()
        over_the_ring = decode.generate(NEW_TOKENS, captured=False)
        channel = client.device_channel(device="cpu", max_tokens=2)
        use_channel(model, client, channel, torch.tensor([11, 12]))
        decode.tokens, decode.cache.positions = tokens, positions
        assert decode.generate(NEW_TOKENS, captured=False) == over_the_ring
        channel.check()
        assert client.get_sequence(11).lengths == (2_200 + NEW_TOKENS - 1,) * 3
        channel.close()
