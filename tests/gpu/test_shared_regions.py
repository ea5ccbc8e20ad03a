"""Regions of the Python client on a GPU: tensors of both kinds of memory, in every place, give the same ids."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from blockdex import Client
from support.clients import new_sequence
from support.serving import serve

TOKENS, HISTORY, HEADS, DIM, TOPK = 1500, 6000, 4, 128, 16
BYTES = 32 << 20


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with (
        serve("--device=cuda", "--num-layers=2", "--cache-bytes=256MiB") as serving,
        Client(serving.grpc_address, transport="ring") as client,
    ):
        yield client


@pytest.fixture
def sequence(client: Client) -> Iterator[int]:
    sequence = new_sequence()
    client.open_sequence(sequence)
    client.append_keys(0, sequences=sequence, keys=torch.randn(HISTORY, DIM).bfloat16())
    yield sequence
    client.close_sequence(sequence)


@pytest.mark.parametrize("device", [None, "cuda"])
@pytest.mark.parametrize("tokens", [1, 8, TOKENS])
def test_what_lies_in_a_region_is_answered_as_what_is_copied(
    client: Client, sequence: int, device: str | None, tokens: int
) -> None:
    keys, queries = torch.randn(tokens, DIM).bfloat16(), torch.randn(tokens, HEADS, DIM).bfloat16()
    named = {"sequences": sequence, "lengths": tokens, "starts": HISTORY, "rollback": True, "return_scores": True}
    expected = client.append_and_select(0, keys=keys, queries=queries, **named)  # type: ignore[call-overload]
    region = client.share(BYTES, device=device)
    there = [region.empty(each.shape, each.dtype) for each in (keys, queries)]
    out = (region.empty((tokens, HEADS, TOPK), torch.int32), region.empty((tokens, HEADS, TOPK), torch.float32))
    for _ in range(3):
        # Not waited for: the call does, for the stream that has them written.
        for each, values in zip(there, (keys, queries), strict=True):
            each.copy_(values, non_blocking=True)
        for each in out:
            each.fill_(77)
        got = client.append_and_select(0, keys=there[0], queries=there[1], out=out, **named)  # type: ignore[call-overload]
        assert got is out
        for mine, theirs in zip(got, expected, strict=True):
            assert torch.equal(mine.cpu(), theirs)
    client.release(region)
    got = client.append_and_select(0, keys=there[0], queries=there[1], **named)  # type: ignore[call-overload]
    assert torch.equal(got[0].cpu(), expected[0]), "copied, once it is shared no more"


def test_memory_of_a_gpu_that_is_not_shared_is_copied(client: Client, sequence: int) -> None:
    client.share(BYTES, device="cuda")
    queries = torch.randn(8, HEADS, DIM).bfloat16()
    expected = client.select_blocks(0, sequences=sequence, lengths=8, queries=queries)
    got = client.select_blocks(0, sequences=sequence, lengths=8, queries=queries.cuda())
    assert got.is_cuda
    assert torch.equal(got.cpu(), expected)
