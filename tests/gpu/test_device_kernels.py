"""Kernels of a device channel in a CUDA graph, and memory that two processes share."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch

from blockdex.device_channel.calls import Call, Heads
from blockdex.device_channel.memory import ChannelMemory
from blockdex.ring import channel_layout as layout
from blockdex_kernels import IndexSpec, cuda_driver
from support import memory_exporter
from support.channel_core import ChannelCore, channel_core
from support.channel_twins import TWINS, Launch

SPEC = IndexSpec(num_layers=5)
HEADS = Heads(0, 4)
ROWS, LAYERS = 8, 57
DEVICE = torch.device("cuda", 0)


@pytest.fixture(params=["triton", "cuda"])
def launch(request: pytest.FixtureRequest) -> Launch:
    return TWINS[request.param]


@pytest.fixture
def memory() -> ChannelMemory:
    return ChannelMemory(DEVICE, SPEC, HEADS.count, 64, 64, 1 << 20)


@pytest.fixture
def core(memory: ChannelMemory) -> Iterator[ChannelCore]:
    with channel_core(memory, SPEC) as core:
        yield core


def make_call() -> Call:
    return Call(
        layer=1,
        ids=torch.arange(ROWS, device=DEVICE),
        starts=torch.zeros(ROWS, dtype=torch.int64, device=DEVICE),
        lengths=torch.ones(ROWS, dtype=torch.int64, device=DEVICE),
        keys=torch.randn(ROWS, 1, 128, device=DEVICE).bfloat16(),
        queries=torch.randn(ROWS, 1, 4, 128, device=DEVICE).bfloat16(),
    )


def expected(call: Call) -> torch.Tensor:
    assert call.queries is not None
    ids = call.queries.view(torch.int16)[..., : SPEC.topk].int() & 0xFFFF
    return torch.where((call.lengths > 0).view(-1, 1, 1, 1), ids, -1)


def captured(
    launch: Launch, memory: ChannelMemory, call: Call, bound: float = 2.0
) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    """A graph of as many calls as a model has layers, and where their ids appear."""
    ids = [torch.zeros(ROWS, 1, 4, SPEC.topk, dtype=torch.int32, device=DEVICE) for _ in range(LAYERS)]
    launch(memory, SPEC, HEADS, call, ids[0], bound)  # compiles
    torch.cuda.synchronize()
    assert not memory.error
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for own in ids:
            launch(memory, SPEC, HEADS, call, own, bound)
    return graph, ids


def test_a_graph_reads_its_numbers_when_it_is_replayed(
    launch: Launch, memory: ChannelMemory, core: ChannelCore
) -> None:
    call = make_call()
    graph, ids = captured(launch, memory, call)
    for replay in range(3):
        call.starts.fill_(1000 * replay)
        call.lengths[replay] = 0
        assert call.queries is not None
        call.queries.copy_(torch.randn_like(call.queries))
        graph.replay()
        torch.cuda.synchronize()
        assert not memory.error
        assert all(torch.equal(each, expected(call)) for each in ids)
        assert core.rung[-1].columns[1].tolist() == [1000 * replay] * (ROWS - replay - 1)
    assert len(core.rung) == 3 * LAYERS + 1
    began = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize()
    print(f"a call with a stand-in core in Python: {1e6 * (time.perf_counter() - began) / LAYERS:.1f} us", flush=True)


def test_a_replay_ends_within_the_bound(launch: Launch, memory: ChannelMemory, core: ChannelCore) -> None:
    graph, ids = captured(launch, memory, make_call(), bound=0.5)
    core.deaf = True
    for at_least, most in ((0.5, 0.51 + 0.02), (0.0, 0.02)):
        began = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        took = time.perf_counter() - began
        print(f"a replay without answers: {1e3 * took:.2f} ms", flush=True)
        assert at_least <= took <= most
        assert memory.error == layout.TIMED_OUT
        assert all((each == -1).all() for each in ids)
        for each in ids:
            each.fill_(7)


def test_a_dead_channel_costs_little(launch: Launch, memory: ChannelMemory, core: ChannelCore) -> None:
    graph, _ = captured(launch, memory, make_call())
    memory.kill(layout.ENGINE_GONE)
    core.deaf = True
    graph.replay()
    torch.cuda.synchronize()
    began = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    ended = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    began.record()
    graph.replay()
    ended.record()
    torch.cuda.synchronize()
    print(f"ring and wait on a dead channel: {1e3 * began.elapsed_time(ended) / LAYERS:.1f} us a call", flush=True)


def test_memory_of_another_process_outlives_it() -> None:
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-u", memory_exporter.__file__, str(theirs.fileno())]
    with ours, subprocess.Popen(command, pass_fds=[theirs.fileno()]) as exporter:
        theirs.close()
        ours.settimeout(60)
        _, (fd,), _, _ = socket.recv_fds(ours, 4, 1)
        torch.zeros(1, device=DEVICE)
        size, whole = memory_exporter.SIZE, cuda_driver.granularity(0)
        handle = cuda_driver.import_file(fd)
        assert cuda_driver.device_of(handle) == 0
        address = cuda_driver.reserve(size, whole)
        cuda_driver.map_memory(address, size, handle, 0)
        seen = torch.as_tensor(_Array(address, size), device=DEVICE)
        assert (seen == 7).all()
        seen.fill_(9)
        torch.cuda.synchronize()
        ours.sendall(b".")
        assert ours.recv(1) == b"\x09"
        exporter.kill()
    assert (seen == 9).all()
    torch.cuda.synchronize()
    cuda_driver.unmap(address, size)


class _Array:
    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 2}


def test_memory_larger_than_what_was_shared_is_refused() -> None:
    torch.zeros(1, device=DEVICE)
    whole = cuda_driver.granularity(0)
    handle = cuda_driver.create(0, whole, shared=True)
    address = cuda_driver.reserve(2 * whole, whole)
    with pytest.raises(cuda_driver.CudaError, match=r"cuMemMap failed: CUDA error \d+"):
        cuda_driver.map_memory(address, 2 * whole, handle, 0)
