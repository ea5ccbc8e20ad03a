"""A server as a process: what it says at the start, and how it ends."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import grpc
import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

import blockdex
from blockdex.v1 import indexer_pb2 as pb
from blockdex.v1 import indexer_pb2_grpc as pb_grpc
from support import strange_core
from support.serving import SMALL, Serving, serve
from support.wire import open_request

TOKENS, QUERIES, PREFILLS = 8192, 4096, 6


def stub(channel: grpc.Channel) -> pb_grpc.IndexerServiceStub:
    return pb_grpc.IndexerServiceStub(channel)


def tensor(*shape: int) -> pb.Tensor:
    values = np.random.default_rng(7).standard_normal(shape).astype("<f2")
    return pb.Tensor(dtype=pb.DTYPE_FP16, data=values.tobytes())


def span(start: int, length: int) -> pb.Spans:
    return pb.Spans(sequence_ids=[1], starts=[start], lengths=[length])


def waiting_selection() -> pb.SelectBlocksRequest:
    """A selection whose keys never come."""
    return pb.SelectBlocksRequest(layer=1, spans=span(0, 1), queries=tensor(1, 4, 128), wait_for_keys=True)


def eventually(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)


def sample(serving: Serving, name: str, **labels: str) -> float:
    text = httpx.get(f"http://{serving.http_address}/metrics").text
    for family in text_string_to_metric_families(text):
        for found in family.samples:
            if found.name == name and found.labels == labels:
                return found.value
    raise AssertionError(f"no sample {name} {labels}")


@pytest.fixture
def channel_to() -> Iterator[Callable[[Serving], grpc.Channel]]:
    channels: list[grpc.Channel] = []

    def connect(serving: Serving) -> grpc.Channel:
        channels.append(grpc.insecure_channel(serving.grpc_address))
        return channels[-1]

    yield connect
    for channel in channels:
        channel.close()


def test_start_says_where_it_listens_and_what_it_is(server: Serving) -> None:
    said = server.event("serving")
    with grpc.insecure_channel(server.grpc_address) as channel:
        info = stub(channel).GetInfo(pb.GetInfoRequest())
    assert said["device"] == info.device == "cpu"
    assert said["epoch"] == str(info.epoch)
    assert said["capacity_tokens"] == info.cache.capacity_tokens == 16 * 2**20 // (3 * 128 * 128 * 2) * 128
    assert said["capacity_bytes"] == info.cache.pages_total * info.cache.page_bytes
    assert (said["num_layers"], said["topk"], said["key_dtype"]) == (3, 16, "bf16")
    for kernel in info.kernels:
        phase = pb.Phase.Name(kernel.phase).removeprefix("PHASE_").lower()
        assert said[f"{phase}_kernel"] == f"{kernel.kernel} ({kernel.reason})"
    assert '"event": "serving"' in server.output[0]


def test_threads_that_wait_do_not_spin_unless_told_to() -> None:
    """OpenMP says by itself, when torch loads it, how its threads wait."""
    for told, expected in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        with serve(OMP_DISPLAY_ENV="TRUE", **told) as serving:
            said = "\n".join(serving.output)
        assert f"OMP_WAIT_POLICY = '{expected}'" in said, said


def test_sigterm_answers_what_is_in_flight_and_takes_nothing_new(
    channel_to: Callable[[Serving], grpc.Channel],
) -> None:
    with serve("--shutdown-grace-seconds", "60") as serving:
        calls = stub(channel_to(serving))
        calls.OpenSequences(open_request(1))
        calls.AppendKeys(pb.AppendKeysRequest(layer=0, spans=span(0, TOKENS), keys=tensor(TOKENS, 128)))
        request = pb.SelectBlocksRequest(
            layer=0, spans=span(TOKENS - QUERIES, QUERIES), queries=tensor(QUERIES, 4, 128)
        )
        prefills: list[Future[pb.SelectBlocksResponse]] = [
            calls.SelectBlocks.future(request, timeout=60) for _ in range(PREFILLS)
        ]
        waiting = calls.SelectBlocks.future(waiting_selection(), timeout=30)
        eventually(lambda: sample(serving, "blockdex_waiting_requests") == 1, "the selection waits")
        eventually(lambda: sample(serving, "blockdex_batch_requests_sum") == 2 + PREFILLS, "all have begun")

        serving.process.send_signal(signal.SIGTERM)
        eventually(lambda: httpx.get(f"http://{serving.http_address}/readyz").status_code == 503, "not ready")
        assert httpx.get(f"http://{serving.http_address}/readyz").text == "shutting down\n"
        assert httpx.get(f"http://{serving.http_address}/healthz").status_code == 200
        assert sample(serving, "blockdex_ready") == 0
        with pytest.raises(grpc.RpcError) as refused:
            calls.OpenSequences(open_request(2))
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE

        for prefill in prefills:
            assert len(prefill.result(timeout=60).block_ids.data) == QUERIES * 4 * 16 * 4
        with pytest.raises(grpc.RpcError) as late:
            waiting.result(timeout=60)
        assert late.value.code() == grpc.StatusCode.UNAVAILABLE  # its keys cannot come any more
        assert serving.wait() == 0
        assert [serving.event(name)["level"] for name in ("serving", "stopping", "stopped")] == ["info"] * 3


def test_the_grace_is_bounded(channel_to: Callable[[Serving], grpc.Channel]) -> None:
    with serve(*SMALL, BLOCKDEX_SHUTDOWN_GRACE_SECONDS="0.5") as serving:
        calls = stub(channel_to(serving))
        calls.OpenSequences(open_request(1))
        waiting = calls.SelectBlocks.future(waiting_selection(), timeout=60)
        eventually(lambda: sample(serving, "blockdex_waiting_requests") == 1, "the selection waits")
        began = time.monotonic()
        assert serving.stop() == 0
        assert time.monotonic() - began < 8
        assert waiting.exception(timeout=10) is not None


def test_a_second_signal_ends_it_at_once(channel_to: Callable[[Serving], grpc.Channel]) -> None:
    with serve() as serving:
        calls = stub(channel_to(serving))
        calls.OpenSequences(open_request(1))
        waiting = calls.SelectBlocks.future(waiting_selection(), timeout=60)
        eventually(lambda: sample(serving, "blockdex_waiting_requests") == 1, "the selection waits")
        serving.process.send_signal(signal.SIGINT)
        eventually(lambda: any("stopping" in line for line in serving.output), "it stops")
        began = time.monotonic()
        serving.process.send_signal(signal.SIGTERM)
        assert serving.wait() == 1
        assert time.monotonic() - began < 5
        assert waiting.exception(timeout=10) is not None


def test_a_lost_device_ends_it_whatever_else_hangs() -> None:
    with serve(program=[strange_core.__file__]) as serving, blockdex.Client(serving.grpc_address) as client:
        client.open_sequence(1)
        with pytest.raises(blockdex.BlockdexError):
            client.append_keys(0, sequences=1, keys=np.zeros((1, 128), np.float32))
        assert serving.wait() == 1
    assert serving.event("stopped")
