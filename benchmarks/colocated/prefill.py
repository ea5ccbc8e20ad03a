"""Block ids for the last queries of a long sequence: through the ring's arenas, and through memory that is shared.

Beside them the kernels alone, in this process, on tensors that are there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from statistics import median

import numpy as np
import torch

from benchmarks.colocated.settings import PREFILL_ID, TENANT, Settings
from benchmarks.core_process import RingPeer
from benchmarks.ring_messages import Keys, Places, Queries, Spans, TensorData, TokenAnswer, TokenRequest
from blockdex import Client
from blockdex.contract.messages import OpenSequences
from blockdex.executor.prefill_slices import event
from blockdex.ring.layout import aligned
from blockdex.ring.sharing import DeviceMemory, HostMemory, share_memory
from blockdex_kernels import IndexSpec
from blockdex_kernels.dispatch import choose_backend
from blockdex_kernels.interface import Spans as KernelSpans

LAYER, REPEATS, SECONDS, APPENDED, BYTES = 0, 30, 3.0, 8_192, 64 << 20


def spans_of(start: int, length: int) -> Spans:
    """Tokens of the sequence."""
    column = np.ones(1, np.int64)
    return Spans(np.full(1, PREFILL_ID, np.uint64), start * column, length * column, np.zeros(1, np.uint64))


def numbers(random: torch.Generator, *shape: int) -> TensorData:
    """bf16."""
    return TensorData("bf16", torch.randn(*shape, generator=random).bfloat16().view(torch.uint8).numpy().tobytes())


def fill(peer: RingPeer, tokens: int, spec: IndexSpec, random: torch.Generator) -> None:
    """Opens the sequence and appends its tokens."""
    peer.ask(OpenSequences("", 0, (PREFILL_ID,), (0,)))
    for start in range(0, tokens, APPENDED):
        length = min(APPENDED, tokens - start)
        keys = Keys(numbers(random, length, spec.head_dim))
        peer.ask(TokenRequest("", 0, LAYER, spans_of(start, length), keys, None))


def shared_memory(peer: RingPeer, device: str) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Memory that is shared: its kind, its bytes as they are here, and the number of its region."""
    host = HostMemory(BYTES)
    yield "memfd", torch.frombuffer(host.buffer, dtype=torch.uint8), share_memory(peer.connected, host).region
    if device.startswith("cuda"):
        there = DeviceMemory(0, BYTES)
        yield "cuda_fd", torch.as_tensor(there), share_memory(peer.connected, there).region


def microseconds(call: Callable[[], float]) -> float:
    """The median, after a few that are left out."""
    end, taken = time.monotonic() + SECONDS, list[float]()
    while len(taken) < 5 or (len(taken) < REPEATS and time.monotonic() < end):
        taken.append(1e6 * call())
    return median(taken[len(taken) // 5 :])


def kernels_alone(spec: IndexSpec, settings: Settings) -> float:
    """Microseconds of the kernels, by the device's clock where there is one."""
    device, tokens = settings.device, settings.prompt
    blocks = -(-tokens // spec.block_size)
    backend = choose_backend(device, spec, blocks)
    backend.use_device()
    backend.pages.normal_()
    queries = torch.randn(settings.queries, spec.num_index_heads, spec.head_dim).bfloat16().to(device)
    columns = np.array([[LAYER], [tokens - settings.queries], [settings.queries]], np.int32)
    layers, starts, lengths = torch.from_numpy(columns).to(device)
    table = torch.arange(blocks, dtype=torch.int32, device=device)[None]
    spans = KernelSpans(layers, starts, lengths, table, columns)

    def run() -> None:
        backend.prefill(queries, spans, order="ascending", return_scores=False)

    def on_host() -> float:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    def on_device() -> float:
        begun, ended = event(timed=True), event(timed=True)
        begun.record()
        run()
        ended.record()
        torch.cuda.synchronize()
        return float(begun.elapsed_time(ended)) / 1000

    return microseconds(on_device if device.startswith("cuda") else on_host)


def main() -> None:
    """Prints microseconds of a call in each way."""
    settings, random = Settings.of_command_line(), torch.Generator().manual_seed(20261130)
    with Client(settings.grpc, transport="unary", timeout=20) as client:
        spec = client.info().spec
    peer = RingPeer(settings.socket, TENANT)
    fill(peer, settings.prompt, spec, random)
    queries = numbers(random, settings.queries, spec.num_index_heads, spec.head_dim)
    half = Queries(queries, 0, spec.num_index_heads, "ascending", False, False)
    spans = spans_of(settings.prompt - settings.queries, settings.queries)
    request = TokenRequest("", 0, LAYER, spans, None, half)
    answer = peer.ask(request)
    assert isinstance(answer, TokenAnswer) and answer.block_ids is not None
    took = {"ring": microseconds(peer.again)}
    expected = torch.from_numpy(answer.block_ids.copy()).view(torch.uint8).view(-1)
    asked = torch.frombuffer(bytearray(queries.data), dtype=torch.uint8)
    ids_at = aligned(len(asked))
    for name, memory, region in shared_memory(peer, settings.device):
        memory[: len(asked)].copy_(asked)
        if memory.is_cuda:
            torch.cuda.synchronize()
        places: Places = {"queries": (region, 0), "block_ids": (region, ids_at)}
        peer.ask(request, places)
        if not torch.equal(memory[ids_at : ids_at + len(expected)].cpu(), expected):
            raise AssertionError(f"{name}: other block ids than through the ring")
        took[name] = microseconds(peer.again)
    peer.close()
    print(json.dumps(took | {"kernels alone": kernels_alone(spec, settings)}))


if __name__ == "__main__":
    main()
