"""Device channels between two processes on a GPU: an engine's graph asks, a core of its own answers.

`tests/gpu/device_channel.sh` runs these with and without MPS.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.core_process import CoreProcess, RingPeer, core_process
from benchmarks.ring_messages import Queries, Spans, TensorData, TokenAnswer, TokenRequest
from blockdex.contract.errors import BlockdexError, FailedPreconditionError, InvalidArgumentError, UnavailableError
from blockdex.contract.messages import ClosePool, CloseSequences, CreatePool, OpenSequences, Order, SetPageTables
from blockdex.device_channel.channel import DeviceChannel
from blockdex_kernels import IndexSpec, cuda_driver
from support.stopping import stop

FIELDS = {"num_layers": 3}
SPEC = IndexSpec(**FIELDS)  # type: ignore[arg-type]
TENANT, LAYER, ROWS, HISTORY = "tenant", 1, 8, 3000
SEQUENCES = tuple(range(1, ROWS + 1))
WHOLE = [(sequence, HISTORY, 1) for sequence in SEQUENCES]


@pytest.fixture(scope="module")
def core() -> Iterator[CoreProcess]:
    with core_process(json.dumps(FIELDS), pages=512) as core:
        yield core


@pytest.fixture
def peer(core: CoreProcess) -> Iterator[RingPeer]:
    """A client of the ring, for which all sequences are open and empty."""
    peer = RingPeer(core.address)
    peer.ask(CloseSequences(TENANT, 0, SEQUENCES))
    peer.ask(OpenSequences(TENANT, 0, SEQUENCES, (0,) * ROWS))
    yield peer
    peer.close()


@pytest.fixture
def channel(core: CoreProcess, peer: RingPeer) -> Iterator[DeviceChannel]:
    channel = opened(core)
    yield channel
    channel.close()


def opened(core: CoreProcess, **options: Any) -> DeviceChannel:
    options = {"max_tokens": 16 * ROWS, "own_bytes": 1 << 20, **options}
    return DeviceChannel(core.address, TENANT, SPEC, core.epoch, **options)


def numbers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cuda")


def rows(each: list[tuple[int, int, int]]) -> dict[str, Any]:
    """Columns of rows (sequence, start, length)."""
    names = ("sequences", "starts", "lengths")
    return {name: numbers(*column) for name, column in zip(names, zip(*each, strict=True), strict=True)}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def fill(channel: DeviceChannel, length: int = HISTORY) -> None:
    """The same history for every sequence of the test; 16 tokens a call."""
    for start in range(0, length, 16):
        count = min(16, length - start)
        asked = rows([(sequence, start, count) for sequence in SEQUENCES])
        channel.append_keys(LAYER, **asked, keys=random(ROWS, count, SPEC.head_dim))
    torch.cuda.synchronize()
    channel.check()


class Selected(NamedTuple):
    """What a ring answers."""

    block_ids: torch.Tensor
    scores: torch.Tensor


def select_over_the_ring(
    peer: RingPeer,
    each: list[tuple[int, int, int]],
    queries: torch.Tensor,
    order: Order = "ascending",
    scores: bool = False,
    raw: bool = False,
    pool: int = 0,
) -> Selected:
    """To packed bfloat16 queries `[T, H, D]`."""
    ids, starts, lengths = torch.tensor(each).T.contiguous().numpy()
    spans = Spans(ids.astype("u8"), starts, lengths, 0 * ids.astype("u8"))
    data = queries.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    asked = Queries(TensorData("bf16", data), 0, SPEC.num_index_heads, order, scores, False, raw)
    answer = peer.ask(TokenRequest(TENANT, 0, LAYER, spans, None, asked, pool))
    assert isinstance(answer, TokenAnswer) and answer.block_ids is not None
    return Selected(torch.tensor(answer.block_ids), torch.tensor(answer.scores if scores else []))


def over_the_ring(peer: RingPeer, each: list[tuple[int, int, int]], queries: torch.Tensor) -> torch.Tensor:
    """The block ids alone."""
    return select_over_the_ring(peer, each, queries).block_ids


class Decode:
    """A graph of a call a layer, and the tensors that it reads and writes."""

    def __init__(self, channel: DeviceChannel, calls: int = 10) -> None:
        self.columns = rows(WHOLE)
        self.keys, self.queries = random(ROWS, 1, SPEC.head_dim), random(ROWS, 1, 4, SPEC.head_dim)
        self.revisions, self.replays = numbers(*[100] * ROWS), numbers(0)
        self.ids = [torch.zeros(ROWS, 1, 4, SPEC.topk, dtype=torch.int32, device="cuda") for _ in range(calls)]
        self.channel = channel
        self._run()
        torch.cuda.synchronize()
        channel.check()
        self.graph = torch.cuda.CUDAGraph()
        # By a stream of its own: the one that torch keeps for captures belongs to the GPU that captured first.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self._run()

    def _run(self) -> None:
        for ids in self.ids:
            self.replays += 1
            self.channel.append_and_select(
                LAYER,
                **self.columns,
                keys=self.keys,
                queries=self.queries,
                revisions=self.revisions,
                replays=self.replays,
                out=ids,
            )

    def replay(self) -> float:
        """Seconds until it has ended; ids are filled with what no answer has before."""
        for ids in self.ids:
            ids.fill_(7777)
        torch.cuda.synchronize()
        began = time.perf_counter()
        self.graph.replay()
        torch.cuda.synchronize()
        return time.perf_counter() - began

    def is_dead(self) -> bool:
        return all(bool((ids == -1).all()) for ids in self.ids)

    def check_answers(self, peer: RingPeer) -> None:
        """The ids of all calls are those that a ring answers, bit by bit."""
        self.channel.check()
        live = [row for row in zip(*(self.columns[name].tolist() for name in self.columns), strict=True) if row[2]]
        places = [SEQUENCES.index(sequence) for sequence, _, _ in live]
        expected = over_the_ring(peer, live, self.queries[places, 0])
        for ids in self.ids:
            assert torch.equal(ids[places, 0].cpu(), expected)
            others = [place for place in range(ROWS) if place not in places]
            assert (ids[others] == -1).all()


def test_a_graph_is_answered_what_a_ring_is(peer: RingPeer, channel: DeviceChannel) -> None:
    fill(channel)
    decode = Decode(channel)
    took = [decode.replay() for _ in range(3)]
    decode.check_answers(peer)
    print(f"{1e6 * min(took) / len(decode.ids):.1f} us a call", flush=True)
    # What it reads is read at the replay.
    decode.columns["starts"].sub_(200)
    decode.columns["lengths"][2] = 0
    decode.queries.copy_(random(*decode.queries.shape))
    decode.replay()
    decode.check_answers(peer)


def test_own_tensors_and_ranks_of_one_head_each(core: CoreProcess, peer: RingPeer, channel: DeviceChannel) -> None:
    fill(channel)
    queries = channel.empty((ROWS, 1, 4, SPEC.head_dim), torch.bfloat16)
    queries.copy_(random(*queries.shape))
    expected = over_the_ring(peer, [(sequence, HISTORY - 1, 1) for sequence in SEQUENCES], queries[:, 0])
    asked = rows([(sequence, HISTORY - 1, 1) for sequence in SEQUENCES])
    assert torch.equal(channel.select_blocks(LAYER, **asked, queries=queries)[:, 0].cpu(), expected)
    ranks = [opened(core, first_head=head, num_heads=1) for head in range(4)]
    streams = [torch.cuda.Stream() for _ in ranks]  # type: ignore[no-untyped-call]
    own = [queries[:, :, head : head + 1].contiguous() for head in range(4)]
    torch.cuda.synchronize()
    ids = []
    for rank, stream, part in zip(ranks, streams, own, strict=True):
        with torch.cuda.stream(stream):
            ids.append(rank.select_blocks(LAYER, **asked, queries=part))
    torch.cuda.synchronize()
    assert torch.equal(torch.cat(ids, dim=2)[:, 0].cpu(), expected)
    for rank in ranks:
        rank.check()
        rank.close()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float8_e4m3fn], ids=str)
def test_dtypes(core: CoreProcess, peer: RingPeer, channel: DeviceChannel, dtype: torch.dtype) -> None:
    """Small integers, which all of them hold: the answers are those to bfloat16."""
    fill(channel)
    keys, queries = (torch.randint(-4, 5, shape, device="cuda") for shape in ((ROWS, 1, 128), (ROWS, 1, 4, 128)))
    asked = rows(WHOLE)
    ids = channel.append_and_select(LAYER, **asked, keys=keys.to(dtype), queries=queries.to(dtype))
    torch.cuda.synchronize()
    channel.check()
    assert torch.equal(ids[:, 0].cpu(), over_the_ring(peer, WHOLE, queries[:, 0].bfloat16()))


@pytest.mark.parametrize(("order", "raw"), [("ascending", False), ("ascending", True), ("score", False)])
def test_orders_and_scores(peer: RingPeer, channel: DeviceChannel, order: Order, raw: bool) -> None:
    """Replayed, and with padding, beside which nothing of an earlier replay stays."""
    fill(channel)
    asked, queries = rows([(sequence, HISTORY - 1, 1) for sequence in SEQUENCES]), random(ROWS, 1, 4, SPEC.head_dim)
    ids, scores = (
        torch.zeros(ROWS, 1, 4, SPEC.topk, dtype=dtype, device="cuda") for dtype in (torch.int32, torch.float)
    )
    call: dict[str, Any] = {"queries": queries, "order": order, "scores": scores, "raw_scores": raw, "out": ids}
    channel.select_blocks(LAYER, **asked, **call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        channel.select_blocks(LAYER, **asked, **call)
    asked["lengths"][2] = 0
    queries.copy_(random(*queries.shape))
    graph.replay()
    torch.cuda.synchronize()
    channel.check()
    live = [row for row in range(ROWS) if row != 2]
    each = [(SEQUENCES[row], HISTORY - 1, 1) for row in live]
    answer = select_over_the_ring(peer, each, queries[live, 0], order=order, scores=True, raw=raw)
    assert torch.equal(ids[live, 0].cpu(), answer.block_ids) and (ids[2] == -1).all()
    assert torch.equal(scores[live, 0].cpu(), answer.scores) and (scores[2] == -torch.inf).all()


def test_replays_read_the_cells_of_a_pool_as_they_are(peer: RingPeer, channel: DeviceChannel) -> None:
    pool, blocks = 3, -(-HISTORY // SPEC.block_size)
    peer.ask(CreatePool(TENANT, 0, pool, ROWS * blocks, ROWS, blocks))

    def set_cells(shift: int) -> None:
        pages = [(row + shift) % ROWS * blocks + block for row in range(ROWS) for block in range(blocks)]
        peer.ask(SetPageTables(TENANT, 0, pool, range(ROWS), [0] * ROWS, [blocks] * ROWS, pages))

    set_cells(0)
    for start in range(0, HISTORY, 16):
        asked = rows([(row, start, min(16, HISTORY - start)) for row in range(ROWS)])
        channel.append_keys(LAYER, **asked, keys=random(ROWS, min(16, HISTORY - start), SPEC.head_dim), pool=pool)
    each, queries = [(row, HISTORY - 1, 1) for row in range(ROWS)], random(ROWS, 1, 4, SPEC.head_dim)
    columns, ids = rows(each), torch.zeros(ROWS, 1, 4, SPEC.topk, dtype=torch.int32, device="cuda")
    channel.select_blocks(LAYER, **columns, queries=queries, out=ids, pool=pool)
    torch.cuda.synchronize()
    channel.check()
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        channel.select_blocks(LAYER, **columns, queries=queries, out=ids, pool=pool)
    answers = []
    for shift in (0, 1, 2):
        set_cells(shift)
        ids.fill_(7777)
        graph.replay()
        torch.cuda.synchronize()
        channel.check()
        answers.append(ids[:, 0].cpu())
        assert torch.equal(answers[-1], select_over_the_ring(peer, each, queries[:, 0], pool=pool).block_ids)
    assert not torch.equal(answers[0], answers[1])
    peer.ask(ClosePool(TENANT, 0, pool))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_an_engine_on_a_gpu_of_its_own(core: CoreProcess, peer: RingPeer) -> None:
    with torch.cuda.device(1):
        if not cuda_driver.can_reach(0, 1):
            with pytest.raises(InvalidArgumentError, match="there is no peer access"):
                opened(core, device="cuda:1")
            return
        channel = opened(core, device="cuda:1")
        fill(channel)
        decode = Decode(channel)
        took = [decode.replay() for _ in range(20)]
        decode.check_answers(peer)
        print(f"on a GPU of its own: {1e6 * min(took) / len(decode.ids):.1f} us a call", flush=True)
        channel.close()


def test_a_refusal_ends_a_replay(core: CoreProcess, peer: RingPeer, channel: DeviceChannel) -> None:
    fill(channel)
    decode = Decode(channel)
    decode.columns["starts"][3] = HISTORY + 5
    took = decode.replay()
    print(f"a refused replay: {1e3 * took:.2f} ms", flush=True)
    assert took < 0.05 and decode.is_dead()
    with pytest.raises(BlockdexError, match=f"sequence 4, layer 1: append starts at {HISTORY + 5}"):
        channel.check()
    decode.columns["starts"][3] = HISTORY
    assert decode.replay() < 0.05 and decode.is_dead()
    channel.reopen(core.address, core.epoch)
    decode.replay()
    decode.check_answers(peer)


@pytest.mark.parametrize("allocator", ["private pool", "expandable segments"])
def test_its_memory_is_its_own_whatever_torch_allocates_with(core: CoreProcess, peer: RingPeer, allocator: str) -> None:
    """A process of its own, since torch reads its settings once."""
    environment = dict(os.environ)
    if allocator == "expandable segments":
        environment["PYTORCH_CUDA_ALLOC_CONF"] = environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    arguments = [sys.executable, "-u", __file__, core.address, str(core.epoch), "fill", "3"]
    done = subprocess.run(arguments, env=environment, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["ready", "done", "0"]


def test_a_core_that_is_stopped_ends_a_replay_at_the_bound(core: CoreProcess, peer: RingPeer) -> None:
    channel = opened(core, bound_seconds=0.5)
    fill(channel)
    decode = Decode(channel)
    stop(core.process.pid)
    try:
        took = decode.replay()
    finally:
        core.process.send_signal(signal.SIGCONT)
    print(f"a replay with a bound of 500 ms and a stopped core: {1e3 * took:.1f} ms", flush=True)
    assert 0.5 <= took <= 0.51 + 0.05 and decode.is_dead()
    assert decode.replay() < 0.05 and decode.is_dead()
    channel.reopen(core.address, core.epoch)
    decode.replay()
    decode.check_answers(peer)
    channel.close()
    assert decode.replay() < 0.05 and decode.is_dead()
    with pytest.raises(FailedPreconditionError, match="channel: it is closed"):
        channel.check()


def test_hand_overs_that_are_refused(core: CoreProcess, peer: RingPeer, channel: DeviceChannel) -> None:
    memory, connection = channel._memory, channel._connection
    assert connection is not None
    words = {"open_channel": "cuda_fd", "bytes": memory.size, "device": memory.uuid, "epoch": core.epoch}
    words["bound_seconds"] = 2.0
    files = [memory.segment.fd, memory.fd]
    for bad in ({"bytes": 2 * memory.size}, {"bytes": memory.size + 64}, {"device": "00" * 16}, {"device": "xyz"}):
        with pytest.raises(InvalidArgumentError, match="cuda_fd"):
            connection.ask(words | bad, files)
    with pytest.raises(InvalidArgumentError, match="cuda_fd"):
        connection.ask(words, files[:1] * 2)  # no memory of a GPU
    fill(channel, 16)


def client(core: CoreProcess, then: str, replays: int = 0) -> subprocess.Popen[str]:
    """A client in a process of its own, that is ready."""
    arguments = [sys.executable, "-u", __file__, core.address, str(core.epoch), then, str(replays)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=str)
def test_a_client_that_is_killed_or_stopped_harms_nobody(
    core: CoreProcess, peer: RingPeer, channel: DeviceChannel, how: signal.Signals
) -> None:
    with client(core, "go on") as other:
        time.sleep(0.3)
        other.send_signal(how)
        time.sleep(0.1)
        fill(channel)
        decode = Decode(channel)
        decode.replay()
        decode.check_answers(peer)
        other.kill()


def test_forty_channels(core: CoreProcess, peer: RingPeer) -> None:
    channels = [opened(core, max_tokens=ROWS) for _ in range(40)]
    fill(opened(core))
    queries = random(ROWS, 1, 4, SPEC.head_dim)
    asked = [(sequence, HISTORY - 1, 1) for sequence in SEQUENCES]
    expected = over_the_ring(peer, asked, queries[:, 0])
    for channel in channels:
        assert torch.equal(channel.select_blocks(LAYER, **rows(asked), queries=queries)[:, 0].cpu(), expected)
    for channel in channels:
        channel.close()


def test_a_core_that_is_killed_ends_a_replay_and_another_one_takes_its_place(tmp_path: Path) -> None:
    """Graphs that were captured with the first one go on with the second one."""
    address = str(tmp_path / "core.sock")
    with core_process(json.dumps(FIELDS), pages=512, address=address) as first:
        peer = RingPeer(first.address)
        peer.ask(OpenSequences(TENANT, 0, SEQUENCES, (0,) * ROWS))
        channel = opened(first)
        fill(channel)
        decode = Decode(channel)
        decode.replay()
        decode.check_answers(peer)
        stop(first.process.pid)
        for ids in decode.ids:
            ids.fill_(7777)
        torch.cuda.synchronize()
        decode.graph.replay()
        time.sleep(0.05)
        began = time.perf_counter()
        first.process.kill()
        torch.cuda.synchronize()
        took = time.perf_counter() - began
        print(f"a replay ends {1e3 * took:.1f} ms after its core was killed", flush=True)
        assert took < 0.5 and decode.is_dead()
        with pytest.raises(UnavailableError):
            channel.check()
        peer.close()
    with core_process(json.dumps(FIELDS), pages=512, address=address) as second:
        peer = RingPeer(second.address)
        peer.ask(OpenSequences(TENANT, 0, SEQUENCES, (0,) * ROWS))
        with pytest.raises(FailedPreconditionError, match="epoch: channel names"):
            channel.reopen(second.address, first.epoch)
        channel.reopen(second.address, second.epoch)
        fill(channel)
        decode.replay()
        decode.check_answers(peer)
        channel.close()
        peer.close()


def main(address: str, epoch: int, then: str, replays: int) -> None:
    """A client with a channel of its own: decodes, on and on or so often."""
    core = CoreProcess(address, epoch, None)  # type: ignore[arg-type]
    channel = opened(core)
    if then == "fill":
        fill(channel)
        decode = Decode(channel)
    else:
        own = tuple(100 * os.getpid() + sequence for sequence in SEQUENCES)
        peer = RingPeer(address)
        peer.ask(OpenSequences(TENANT, 0, own, (0,) * ROWS))
        columns, queries = rows([(sequence, 0, 1) for sequence in own]), random(ROWS, 1, 4, SPEC.head_dim)
        keys = random(ROWS, 1, SPEC.head_dim)
        channel.append_and_select(LAYER, **columns, keys=keys, queries=queries, rollback=True)
    torch.cuda.synchronize()
    channel.check()
    print("ready", flush=True)
    while then == "go on":
        channel.append_and_select(LAYER, **columns, keys=keys, queries=queries, rollback=True)
    for _ in range(replays):
        decode.replay()
    channel.check()
    print("done", sum(int((ids < 0).all()) for ids in decode.ids), flush=True)
    channel.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
