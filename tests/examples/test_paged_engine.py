"""The engine with block tables of its own: that it computes what the model computes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.models.minimax_m3_vl import MiniMaxM3VLForCausalLM

from examples.paged_engine import demo
from examples.paged_engine.request import Request


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tests may share their cores with other work."""
    torch.set_num_threads(1)


def plainly_generated(model: MiniMaxM3VLForCausalLM, request: Request) -> list[int]:
    """The request alone, token by token, with transformers' own cache and the untouched model."""
    cache = DynamicCache(config=model.config)
    tokens, new = list(request.prompt), list(request.prompt)
    for _ in range(request.max_new_tokens):
        logits = model(torch.tensor([new]), past_key_values=cache, use_cache=True).logits
        new = [int(logits[0, -1].argmax())]
        tokens += new
    return tokens[len(request.prompt) :]


@torch.inference_mode()
def test_the_engine_generates_what_the_model_generates_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, where a token does not hang on what else is in the batch; everything that the demo shows happens."""
    build = demo.build
    monkeypatch.setattr(demo, "build", lambda device: nn.Module.to(build(device), dtype=torch.float32))
    served = demo.run_own("cpu")
    model = demo.build("cpu")
    assert served.tokens == [plainly_generated(model, request) for request in demo.requests()]
    assert Counter(dict.fromkeys(demo.EXERCISED, 1)) <= served.counts
