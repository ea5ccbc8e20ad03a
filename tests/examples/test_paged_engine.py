"""The engine with block tables of its own: it computes what the model computes, on a pool over each transport too."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.models.minimax_m3_vl import MiniMaxM3VLForCausalLM

import blockdex
from blockdex_kernels.reference import SelectionMismatchError
from examples.paged_engine import demo
from examples.paged_engine.__main__ import main
from examples.paged_engine.blocks import BlockManager
from examples.paged_engine.demo import Run, Transport
from examples.paged_engine.request import Request
from examples.paged_engine.scheduler import Scheduler
from support.serving import Serving, serve


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tests may share their cores with other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def own() -> Run:
    """What the model's own indexer makes of the demo's requests."""
    return demo.run_own("cpu")


@pytest.fixture(scope="module")
def model_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A server for the demo's model, with a draft model's layer besides."""
    config = tmp_path_factory.mktemp("model") / "config.json"
    demo.build("cpu").config.to_json_file(config)
    with serve(
        "--model-config", str(config), "--num-layers", "4", "--cache-bytes", "4MiB", "--device", "cpu"
    ) as serving:
        yield serving


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


@pytest.mark.parametrize("transport", ["unary", "stream"])
def test_the_tokens_are_the_same_on_a_pool(transport: Transport, model_server: Serving, own: Run) -> None:
    run = demo.run_on_pool("cpu", model_server.grpc_address, transport)
    assert demo.agrees(own, [run])
    assert run.counts["blocks exchanged by rounding"] == 0
    # 3 layers of 4 heads.
    assert run.counts["selections compared"] % 12 == 0
    assert run.counts["selections that leave blocks out"] > run.counts["selections compared"] / 2
    with blockdex.Client(model_server.grpc_address) as client:
        assert client.info().cache.pages_used == 0


def test_the_demo_prints_what_it_met(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--transport", "ring"]) == 0
    rows = re.findall(r"│ (.+?) +│ (.+?) +│ (.+?) +│", capsys.readouterr().out)
    told = {name: ring for name, _, ring in rows}
    assert told["requests with equal tokens"] == "8 of 8"
    assert all(int(told[name].replace(",", "")) > 0 for name in demo.EXERCISED)


def test_one_wrong_block_ends_the_demo(monkeypatch: pytest.MonkeyPatch, model_server: Serving) -> None:
    answer, calls = blockdex.Pool.append_and_select, []

    def lie(self: blockdex.Pool, layer: int, **request: Any) -> torch.Tensor:
        block_ids: torch.Tensor = answer(self, layer, **request)
        calls.append(layer)
        if len(calls) == 20:
            row = block_ids[0, 0]
            assert row[-1] > demo.TOPK
            row[0] = next(block for block in range(demo.TOPK + 1) if block not in row)
        return block_ids

    monkeypatch.setattr(blockdex.Pool, "append_and_select", lie)
    with pytest.raises(SelectionMismatchError, match=r"layer \d, row \d, positions from \d+: query \d+, head 0: "):
        demo.run_on_pool("cpu", model_server.grpc_address, "stream")


def test_other_tokens_are_a_failure_and_so_is_what_never_happened() -> None:
    met = Counter(dict.fromkeys((*demo.EXERCISED, "selections that leave blocks out"), 1))
    run = Run([[1, 2]], met)
    assert demo.agrees(run, [run, Run([[1, 2]], met + met)])
    assert not demo.agrees(run, [run, Run([[1, 3]], met)])
    for name in met:
        assert not demo.agrees(run, [Run([[1, 2]], met - Counter([name]))])


def test_a_request_that_never_fits_is_refused() -> None:
    scheduler = Scheduler(BlockManager(3, 32), max_rows=1, max_tokens=64, counts=Counter())
    scheduler.add(Request([0] * 90, max_new_tokens=6))
    with pytest.raises(ValueError, match="needs 4 blocks, there are 3"):
        scheduler.add(Request([0] * 90, max_new_tokens=7))


def test_known_blocks_are_found_until_they_are_handed_out_again() -> None:
    blocks = BlockManager(4, 2)
    first, second = Request([1, 2, 3, 4, 5], 1), Request([7, 8, 9], 1)
    blocks.take(first, 3)
    first.num_computed = 5
    blocks.remember(first)
    assert blocks.find_prefix([1, 2, 3, 4, 9]) == first.blocks[:2]
    assert blocks.find_prefix([1, 2, 3, 4]) == first.blocks[:1], "a token is left to start from"
    assert blocks.find_prefix([3, 4, 5]) == [], "the name of a block is of all tokens before it too"
    held = list(first.blocks)
    blocks.release(first)
    assert blocks.find_prefix([1, 2, 3, 4, 5]) == held[:2]
    # The one that was never used, then the ends of the chain.
    blocks.take(second, 3)
    assert blocks.find_prefix([1, 2, 3, 4, 5]) == held[:1]
    assert blocks.num_free == 1
