"""A real server on the device, of one process and of several: it starts, and answers as the reference does."""

from __future__ import annotations

import pytest
import torch

from blockdex import Client
from blockdex_kernels import IndexSpec
from blockdex_kernels.reference import count_flips
from support.serving import serve
from support.vectorised_reference import select

TOKENS, DECODES, LAYER = 5_000, 20, 2


@pytest.mark.parametrize("processes", ["single", "split"])
def test_a_server_compiles_its_kernels_then_answers(processes: str) -> None:
    flags = ("--device=cuda", "--num-layers=3", "--cache-bytes=1GiB", f"--processes={processes}")
    draw = torch.Generator().manual_seed(20261130)
    spec = IndexSpec(num_layers=3)
    keys = torch.randn(TOKENS + DECODES, spec.head_dim, generator=draw).bfloat16()
    queries = torch.randn(TOKENS + DECODES, spec.num_index_heads, spec.head_dim, generator=draw).bfloat16()
    with serve(*flags) as server, Client(server.grpc_address) as client:
        epoch = client.info().epoch
        client.open_sequence(7)
        asked = [(0, TOKENS), *((TOKENS + step, 1) for step in range(DECODES))]
        answers = [
            client.append_and_select(
                LAYER,
                sequences=[7],
                lengths=[length],
                keys=keys[start : start + length],
                queries=queries[start : start + length],
                timeout=60,
            )
            for start, length in asked
        ]
        assert client.info().epoch == epoch, "nothing began anew"
    reference = select(keys.cuda(), queries.cuda(), 0, spec)
    flips = count_flips(torch.cat([torch.as_tensor(answer) for answer in answers]), reference.block_ids, reference)
    print(f"{processes}: {flips} flips of {reference.block_ids.numel()} ids")
