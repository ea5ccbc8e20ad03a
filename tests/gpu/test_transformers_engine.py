"""The transformers example on a GPU: the same tokens over each transport, and by a CUDA graph over a device channel."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from transformers.models.minimax_m3_vl import MiniMaxM3VLForCausalLM

from blockdex import Client
from examples.transformers_engine.__main__ import main
from examples.transformers_engine.captured import StaticDecode, use_channel
from examples.transformers_engine.indexer import BlockdexIndexer, replace_indexers
from examples.transformers_engine.model import build_model
from examples.transformers_engine.requests import TEXT, Request
from examples.transformers_engine.server import running_server

NEW_TOKENS, LENGTH = 32, 2304


@pytest.fixture(scope="module")
def model() -> MiniMaxM3VLForCausalLM:
    """Its experts are computed without the host looking at which."""
    model = build_model("cuda")
    model.set_experts_implementation("batched_mm")
    return model


@pytest.fixture(scope="module")
def address(model: MiniMaxM3VLForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    model.config.to_json_file(folder / "config.json")
    flags = ["--model-config", str(folder / "config.json"), "--device", "cuda", "--cache-bytes", "64MiB"]
    with running_server([*flags, "--socket", str(folder / "ring")]) as address:
        yield address


@pytest.mark.parametrize("transport", ["ring", "stream", "unary"])
def test_the_tokens_are_the_same_over_each_transport(address: str, transport: str) -> None:
    assert main(["--device", "cuda", "--small", "--address", address, "--transport", transport]) == 0


def test_a_captured_decode_makes_the_same_tokens(model: MiniMaxM3VLForCausalLM, address: str) -> None:
    text = TEXT.read_bytes()
    requests = [Request(1, text[:2_200]), Request(2, text[2_200:2_300])]
    with Client(address, transport="ring", tenant="captured") as client:
        client.open_sequences([1, 2])
        replace_indexers(model, lambda own, layer: BlockdexIndexer(own, client, layer))
        decode = StaticDecode(model, requests, LENGTH)
        decode.prefill()
        tokens, positions = decode.tokens.clone(), decode.cache.positions.clone()
        made = {}
        channel = client.device_channel(max_tokens=2)
        for name, first in (("ring", 11), ("channel", 21), ("captured", 31)):
            for number, request in enumerate(requests):
                client.fork_sequence(request.sequence, first + number, len(request.prompt))
            decode.cache.sequences = [first, first + 1]
            decode.tokens, decode.cache.positions = tokens.clone(), positions.clone()
            if name != "ring":
                use_channel(model, client, channel, torch.tensor([first, first + 1], device="cuda"))
            began = time.perf_counter()
            made[name] = decode.generate(NEW_TOKENS, captured=name == "captured")
            print(f"{name}: {1e3 * (time.perf_counter() - began) / NEW_TOKENS:.2f} ms a token", flush=True)
            channel.check()
        assert made["channel"] == made["ring"] and made["captured"] == made["ring"]
        assert client.get_sequence(31).lengths == (2_200 + NEW_TOKENS - 1,) * 3
        channel.close()
