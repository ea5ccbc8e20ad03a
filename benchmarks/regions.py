"""Calls whose tensors lie in shared memory, beside those that carry them through the ring, and the kernels alone.

python -m benchmarks.regions [cuda|cpu]     on a CPU of few tokens, and without memory of a GPU
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.core_process import RingPeer, core_process
from benchmarks.ring_messages import Keys, Places, Queries, Spans, TensorData, TokenRequest
from blockdex.contract.messages import OpenSequences
from blockdex.executor.prefill_slices import event
from blockdex.ring.sharing import DeviceMemory, HostMemory, share_memory
from blockdex_kernels import IndexSpec
from blockdex_kernels.dispatch import choose_backend
from blockdex_kernels.interface import Spans as KernelSpans

TENANT, LAYER, REPEATS, BYTES = "benchmark", 0, 30, 64 << 20
IDS_AT = 32 << 20


class Shape(NamedTuple):
    """What is asked: queries at the end of so many tokens of one sequence, or a token of each of several."""

    queries: int
    tokens: int
    sequences: int


SHAPES = {
    "cuda": {"prefill": Shape(16_384, 84_480, 1), "decode": Shape(1, 8_192, 8)},
    "cpu": {"prefill": Shape(64, 512, 1), "decode": Shape(1, 512, 2)},
}


def sequences_of(shape: Shape, kind: str) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Their ids."""
    return np.arange(shape.sequences, dtype=np.uint64) + (100 if kind == "decode" else 1)


def spans_of(shape: Shape, kind: str, start: int, length: int) -> Spans:
    """The same tokens of every sequence."""
    ids = sequences_of(shape, kind)
    count = len(ids)
    return Spans(ids, np.full(count, start), np.full(count, length), np.zeros(count, np.uint64))


def numbers(random: torch.Generator, *shape: int) -> TensorData:
    """bf16."""
    data = torch.randn(*shape, generator=random).bfloat16().view(torch.uint8).numpy()
    return TensorData("bf16", data.tobytes())


def fill(peer: RingPeer, shape: Shape, kind: str, spec: IndexSpec, random: torch.Generator) -> None:
    """Opens the sequences and appends their tokens."""
    ids = sequences_of(shape, kind)
    peer.ask(OpenSequences(TENANT, 0, tuple(ids.tolist()), (0,) * len(ids)))
    for start in range(0, shape.tokens, 8_192):
        length = min(8_192, shape.tokens - start)
        keys = Keys(numbers(random, len(ids) * length, spec.head_dim))
        peer.ask(TokenRequest(TENANT, 0, LAYER, spans_of(shape, kind, start, length), keys, None))


def request_of(shape: Shape, kind: str, spec: IndexSpec, random: torch.Generator) -> TokenRequest:
    """A selection for the last tokens, which a decode appends once more."""
    tokens = shape.sequences * shape.queries
    queries = numbers(random, tokens, spec.num_index_heads, spec.head_dim)
    keys = Keys(numbers(random, tokens, spec.head_dim), rollback=True) if kind == "decode" else None
    half = Queries(queries, 0, spec.num_index_heads, "ascending", False, False)
    return TokenRequest(
        TENANT, 0, LAYER, spans_of(shape, kind, shape.tokens - shape.queries, shape.queries), keys, half
    )


def memories(peer: RingPeer, device: str) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Memory that is shared: its kind, its bytes as they are here, and the number of its region."""
    host = HostMemory(BYTES)
    yield "memfd", torch.frombuffer(host.buffer, dtype=torch.uint8), share_memory(peer.connected, host).region
    if device == "cuda":
        there = DeviceMemory(0, BYTES)
        yield "cuda_fd", torch.as_tensor(there), share_memory(peer.connected, there).region


def places_of(request: TokenRequest, region: int, memory: torch.Tensor) -> Places:
    """Where a request's tensors lie; what it brings is written there."""
    assert request.queries is not None
    at, places = 0, {"block_ids": (region, IDS_AT)}
    for name, half in (("keys", request.keys), ("queries", request.queries)):
        if half is None:
            continue
        data = torch.frombuffer(bytearray(half.tensor.data), dtype=torch.uint8)
        memory[at : at + len(data)].copy_(data)
        places[name] = (region, at)
        at += -(-len(data) // 64) * 64
    if memory.is_cuda:
        torch.cuda.synchronize()
    return places


def microseconds(call: Callable[[], float]) -> float:
    """The median, after a few that are left out."""
    taken = [1e6 * call() for _ in range(REPEATS)]
    return median(taken[REPEATS // 5 :])


def kernels_alone(device: str, shape: Shape, spec: IndexSpec) -> float:
    """Microseconds of a prefill's kernels, on tensors that are there, by the device's clock."""
    backend = choose_backend(device, spec, shape.tokens // spec.block_size)
    backend.use_device()
    backend.pages.normal_()
    queries = torch.randn(shape.queries, spec.num_index_heads, spec.head_dim).bfloat16().to(device)
    columns = np.array([[LAYER], [shape.tokens - shape.queries], [shape.queries]], np.int32)
    layers, starts, lengths = torch.from_numpy(columns).to(device)
    table = torch.arange(shape.tokens // spec.block_size, dtype=torch.int32, device=device)[None]
    spans = KernelSpans(layers, starts, lengths, table, columns)

    def call() -> float:
        begun, ended = event(timed=True), event(timed=True)
        begun.record()
        backend.prefill(queries, spans, order="ascending", return_scores=False)
        ended.record()
        torch.cuda.synchronize()
        return float(begun.elapsed_time(ended)) / 1000

    return microseconds(call)


def main() -> None:
    """Prints a line of JSON for each kind of call."""
    parser = argparse.ArgumentParser()
    parser.add_argument("device", nargs="?", default="cuda", choices=SHAPES)
    device = parser.parse_args().device
    fields = {"num_layers": 1}
    spec, random = IndexSpec(**fields), torch.Generator().manual_seed(20261130)  # type: ignore[arg-type]
    flags = ["--prefills"] if device == "cuda" else []
    with core_process(json.dumps(fields), *flags, device=device, pages=2048) as core:
        peer = RingPeer(core.address)
        for kind, shape in SHAPES[device].items():
            fill(peer, shape, kind, spec, random)
        shared = list(memories(peer, device))
        for kind, shape in SHAPES[device].items():
            request = request_of(shape, kind, spec, random)
            answer = peer.ask(request)
            figures = {"ring": microseconds(peer.again)}
            expected = torch.from_numpy(answer.block_ids).view(torch.uint8).view(-1)  # type: ignore[union-attr]
            for name, memory, region in shared:
                peer.ask(request, places_of(request, region, memory))
                found = memory[IDS_AT : IDS_AT + len(expected)].cpu()
                assert torch.equal(found, expected), f"{kind} over {name}: other ids"
                figures[name] = microseconds(peer.again)
            if kind == "prefill" and device == "cuda":
                figures["kernels alone"] = kernels_alone(device, shape, spec)
            print(json.dumps({"kind": kind, **shape._asdict(), "microseconds": figures}), flush=True)
        peer.close()


if __name__ == "__main__":
    main()
