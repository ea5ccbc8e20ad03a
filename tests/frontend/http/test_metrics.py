"""What /metrics counts, after known calls to a real server."""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

import blockdex
from blockdex.contract.messages import CacheOverview, Info
from blockdex.contract.stats import Stats
from blockdex.frontend.http.gpu_metrics import GAUGES
from blockdex.frontend.http.metrics import RPCS, Metrics, RequestMetrics, ServerCollector
from blockdex.frontend.http.readiness import Readiness
from blockdex.ring.engine_reports import gone
from blockdex.v1 import indexer_pb2 as pb
from blockdex.v1 import indexer_pb2_grpc as pb_grpc
from support.serving import SMALL, Serving, serve
from support.wire import close_request, open_request

DOCUMENT = Path(__file__).parents[3] / "docs" / "metrics.md"
TENANT = (("blockdex-tenant", "metrics"),)

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(server: Serving) -> Samples:
    text = httpx.get(f"http://{server.http_address}/metrics").text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def calls(server: Serving) -> Iterator[pb_grpc.IndexerServiceStub]:
    with grpc.insecure_channel(server.grpc_address) as channel:
        yield pb_grpc.IndexerServiceStub(channel)


@pytest.fixture
def moved(server: Serving) -> Callable[..., float]:
    """How far a sample has moved since the test began."""
    before = scrape(server)

    def since(name: str, **labels: str) -> float:
        key = (name, tuple(sorted(labels.items())))
        return scrape(server)[key] - before.get(key, 0.0)

    return since


def tensor(*shape: int) -> pb.Tensor:
    return pb.Tensor(dtype=pb.DTYPE_FP32, data=np.ones(shape, "<f4").tobytes())


def span(sequence: int, start: int, length: int) -> pb.Spans:
    return pb.Spans(sequence_ids=[sequence], starts=[start], lengths=[length])


def open_sequence(calls: pb_grpc.IndexerServiceStub, sequence: int, tokens: int) -> None:
    calls.OpenSequences(open_request(sequence), metadata=TENANT)
    keys = pb.AppendKeysRequest(layer=0, spans=span(sequence, 0, tokens), keys=tensor(tokens, 128))
    calls.AppendKeys(keys, metadata=TENANT)


def select(sequence: int, start: int, length: int, *, wait: bool = False) -> pb.SelectBlocksRequest:
    return pb.SelectBlocksRequest(
        layer=0, spans=span(sequence, start, length), queries=tensor(length, 4, 128), wait_for_keys=wait
    )


def eventually(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)


def test_requests_by_rpc_and_code(calls: pb_grpc.IndexerServiceStub, moved: Callable[..., float]) -> None:
    calls.GetInfo(pb.GetInfoRequest())
    for _ in range(2):
        with pytest.raises(grpc.RpcError):
            calls.GetSequence(pb.GetSequenceRequest(sequence_id=404), metadata=TENANT)
    eventually(lambda: moved("blockdex_requests_total", rpc="GetInfo", code="OK") == 1, "counted")
    assert moved("blockdex_requests_total", rpc="GetSequence", code="NOT_FOUND") == 2
    assert moved("blockdex_requests_total", rpc="GetSequence", code="OK") == 0
    assert moved("blockdex_errors_total", rpc="GetSequence", code="NOT_FOUND", reason="UNKNOWN_SEQUENCE") == 2
    assert moved("blockdex_request_duration_seconds_count", rpc="GetSequence") == 2
    assert 0 < moved("blockdex_request_duration_seconds_sum", rpc="GetSequence") < 10
    assert moved("blockdex_request_duration_seconds_bucket", rpc="GetSequence", le="60.0") == 2


def test_requests_on_a_stream(calls: pb_grpc.IndexerServiceStub, moved: Callable[..., float]) -> None:
    open_sequence(calls, 10, 1)
    requests = [
        pb.StreamRequest(request_id=1, select_blocks=select(10, 0, 1)),
        pb.StreamRequest(request_id=2, select_blocks=select(404, 0, 1)),
        pb.StreamRequest(request_id=3),
    ]
    answers = list(calls.Stream(iter(requests), metadata=TENANT))
    assert len(answers) == 3
    assert moved("blockdex_streams_opened_total") == 1
    eventually(lambda: moved("blockdex_streams") == 0, "the stream is closed")
    assert moved("blockdex_received_bytes_total") >= sum(map(pb.StreamRequest.ByteSize, requests))
    assert moved("blockdex_sent_bytes_total") >= sum(map(pb.StreamResponse.ByteSize, answers))
    assert moved("blockdex_errors_total", rpc="Stream", code="INVALID_ARGUMENT", reason="EMPTY_REQUEST") == 1
    assert moved("blockdex_requests_total", rpc="Stream/SelectBlocks", code="OK") == 1
    assert moved("blockdex_requests_total", rpc="Stream/SelectBlocks", code="NOT_FOUND") == 1
    assert moved("blockdex_requests_total", rpc="Stream", code="INVALID_ARGUMENT") == 1
    assert moved("blockdex_requests_total", rpc="SelectBlocks", code="OK") == 0
    calls.CloseSequences(close_request(10), metadata=TENANT)


def test_calls_over_a_link_and_what_it_shares(server: Serving, moved: Callable[..., float]) -> None:
    keys, queries = np.ones((2, 128), np.float32), np.ones((2, 4, 128), np.float32)
    with blockdex.Client(server.grpc_address, tenant="links", transport="ring") as client:
        client.open_sequence(1)
        region = client.share(1 << 20)
        assert (moved("blockdex_links"), moved("blockdex_links_opened_total")) == (1, 1)
        assert (moved("blockdex_regions"), moved("blockdex_region_bytes")) == (1, 1 << 20)
        for _ in range(3):
            client.append_and_select(0, sequences=1, keys=keys, queries=queries)
        client.append_keys(1, sequences=1, keys=keys)
        client.select_blocks(1, sequences=1, lengths=2, queries=queries)
        with pytest.raises(blockdex.NotFoundError):
            client.select_blocks(1, sequences=404, starts=0, lengths=2, queries=queries)
        client.close_sequence(1)
        client.release(region)
        assert (moved("blockdex_regions"), moved("blockdex_region_bytes")) == (0, 0)
        client.share(1 << 20)
    for rpc, count in {"AppendAndSelect": 3, "AppendKeys": 1, "SelectBlocks": 1, "OpenSequences": 1}.items():
        assert moved("blockdex_requests_total", rpc=f"Ring/{rpc}", code="OK") == count, rpc
        assert moved("blockdex_requests_total", rpc=rpc, code="OK") == 0
    assert moved("blockdex_request_duration_seconds_count", rpc="Ring/AppendAndSelect") == 3
    assert 0 < moved("blockdex_request_duration_seconds_sum", rpc="Ring/AppendAndSelect") < 10
    assert moved("blockdex_requests_total", rpc="Ring/SelectBlocks", code="NOT_FOUND") == 1
    assert moved("blockdex_errors_total", rpc="Ring/SelectBlocks", code="NOT_FOUND", reason="UNKNOWN_SEQUENCE") == 1
    assert moved("blockdex_request_duration_seconds_count", rpc="Ring/SelectBlocks") == 2
    eventually(lambda: moved("blockdex_links") == 0, "the link is closed")
    assert (moved("blockdex_regions"), moved("blockdex_region_bytes")) == (0, 0)


def test_tokens_pages_and_sequences(calls: pb_grpc.IndexerServiceStub, moved: Callable[..., float]) -> None:
    open_sequence(calls, 20, 300)  # 3 pages
    calls.ForkSequence(
        pb.ForkSequenceRequest(parent_id=20, child_id=21, length=300), metadata=TENANT
    )  # 2 shared, 1 copied
    calls.SelectBlocks(select(20, 296, 4), metadata=TENANT)
    calls.SelectBlocks(select(20, 0, 40), metadata=TENANT)
    assert moved("blockdex_tokens_total", phase="append") == 300
    assert moved("blockdex_tokens_total", phase="decode") == 4
    assert moved("blockdex_tokens_total", phase="prefill") == 40
    assert moved("blockdex_batch_tokens_sum", phase="decode") == 4
    assert moved("blockdex_batch_tokens_bucket", phase="append", le="256.0") == 0
    assert moved("blockdex_batch_tokens_bucket", phase="append", le="512.0") == 1
    assert moved("blockdex_batch_requests_sum") == 5
    assert moved("blockdex_launch_requests_sum", phase="decode") == 1
    requests = {"append": 1, "decode": 1, "prefill": 1, "sequence": 2}
    for phase, stage in itertools.product(requests, ("queue", "plan", "reply")):
        # Counted once the answer is handed over, which may be after it is read.
        counted = functools.partial(moved, "blockdex_stage_duration_seconds_count", phase=phase, stage=stage)
        eventually(lambda of=phase, now=counted: now() == requests[of], f"{phase} {stage}")  # type: ignore[misc]
    assert moved("blockdex_stage_duration_seconds_count", phase="decode", stage="device") == 1
    assert moved("blockdex_stage_duration_seconds_count", phase="sequence", stage="device") == 0
    # On a CPU launches never overlap, and each is counted with its way there and back.
    device = sum(moved("blockdex_device_seconds_total", phase=phase) for phase in ("append", "decode", "prefill"))
    busy = moved("blockdex_device_busy_seconds_total")
    assert 0 < device < busy < moved("blockdex_engine_busy_seconds_total")
    assert moved("blockdex_sequences") == 2
    assert moved("blockdex_pages", state="shared") == 2
    assert moved("blockdex_pages", state="private") == 2
    assert moved("blockdex_pages", state="free") == -4
    for sequence in (20, 21):
        calls.CloseSequences(close_request(sequence), metadata=TENANT)
    eventually(lambda: moved("blockdex_pages", state="free") == 0, "pages given back")
    assert moved("blockdex_sequences") == 0
    calls.CreatePool(pb.CreatePoolRequest(pool_id=1, num_pages=2, num_rows=1, max_blocks=2), metadata=TENANT)
    assert moved("blockdex_pools") == 1
    calls.ClosePool(pb.ClosePoolRequest(pool_id=1), metadata=TENANT)
    assert moved("blockdex_pools") == 0


def test_a_selection_that_waits_and_is_given_up(calls: pb_grpc.IndexerServiceStub, moved: Callable[..., float]) -> None:
    open_sequence(calls, 30, 1)
    waiting = calls.SelectBlocks.future(select(30, 1, 1, wait=True), metadata=TENANT, timeout=60)
    eventually(lambda: moved("blockdex_waiting_requests") == 1, "it waits")
    waiting.cancel()
    eventually(lambda: moved("blockdex_dropped_requests_total", why="cancelled") == 1, "it is given up")
    assert moved("blockdex_waiting_requests") == 0
    calls.CloseSequences(close_request(30), metadata=TENANT)


def test_the_pages_add_up_to_what_get_info_says(server: Serving, calls: pb_grpc.IndexerServiceStub) -> None:
    samples = scrape(server)
    pages = {labels[0][1]: value for (name, labels), value in samples.items() if name == "blockdex_pages"}
    cache = calls.GetInfo(pb.GetInfoRequest()).cache
    assert sum(pages.values()) == cache.pages_total
    assert pages["private"] + pages["shared"] == cache.pages_used
    assert samples["blockdex_page_bytes", ()] == cache.page_bytes


def test_what_runs(server: Serving, calls: pb_grpc.IndexerServiceStub) -> None:
    info = calls.GetInfo(pb.GetInfoRequest())
    (labels,) = [dict(labels) for name, labels in scrape(server) if name == "blockdex_build_info"]
    kernels = {
        f"{pb.Phase.Name(choice.phase).removeprefix('PHASE_').lower()}_kernel": choice.kernel for choice in info.kernels
    }
    assert labels == {"version": info.version, "device": "cpu", "key_dtype": "bf16", **kernels}
    assert scrape(server)["blockdex_ready", ()] == 1


def test_buckets_are_cumulative_and_end_with_the_count(server: Serving) -> None:
    text = httpx.get(f"http://{server.http_address}/metrics").text
    histograms = [family for family in text_string_to_metric_families(text) if family.type == "histogram"]
    assert len(histograms) == 5
    for family in histograms:
        series: dict[tuple[tuple[str, str], ...], list[float]] = {}
        counts: dict[tuple[tuple[str, str], ...], float] = {}
        for sample in family.samples:
            labels = tuple(item for item in sample.labels.items() if item[0] != "le")
            if sample.name.endswith("_bucket"):
                series.setdefault(labels, []).append(sample.value)
            elif sample.name.endswith("_count"):
                counts[labels] = sample.value
        assert counts
        assert all(values == sorted(values) for values in series.values())
        assert {labels: values[-1] for labels, values in series.items()} == counts


def test_no_caller_can_make_series() -> None:
    requests = RequestMetrics()
    for number in range(100):
        requests.observe(f"Rpc{number}", f"CODE{number}", f"REASON{number}", 0.1)
    requests.observe("GetInfo", "teapot", "OVERLOADED", 0.1)
    made = {("other", "UNKNOWN", ""), ("GetInfo", "UNKNOWN", "OVERLOADED")}
    assert set(requests.seconds) == {*RPCS, "other"}
    assert set(requests.counts) == {(rpc, "OK", "") for rpc in RPCS} | made
    assert requests.counts["other", "UNKNOWN", ""] == 100


def documented(section: str) -> list[tuple[str, ...]]:
    """Name, type, labels and words of every metric in a section of the document."""
    rows = [line.split("|")[1:5] for line in section.splitlines() if line.startswith("| `blockdex_")]
    cells = [[cell.strip().replace("`", "") for cell in row] for row in rows]
    return [(name, kind, *sorted(filter(None, labels.split(", "))), what) for name, kind, labels, what in cells]


def exported(text: str) -> list[tuple[str, ...]]:
    """The same of every metric in an exposition."""
    metrics: list[tuple[str, ...]] = []
    for family in text_string_to_metric_families(text):
        if family.name.startswith("blockdex_"):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            labels = {label for sample in family.samples for label in sample.labels} - {"le"}
            metrics.append((name, family.type, *sorted(labels), family.documentation))
    return metrics


def test_the_document_has_every_metric_and_no_other(server: Serving, calls: pb_grpc.IndexerServiceStub) -> None:
    with pytest.raises(grpc.RpcError):  # else no error has its labels
        calls.GetSequence(pb.GetSequenceRequest(sequence_id=404), metadata=TENANT)
    of_server, of_gpu = DOCUMENT.read_text(encoding="utf-8").split("## GPU")
    assert sorted(documented(of_server)) == sorted(exported(httpx.get(f"http://{server.http_address}/metrics").text))
    # The GPU's as a server without one would export them.
    assert sorted(documented(of_gpu)) == sorted((gauge.name, "gauge", gauge.documentation) for gauge in GAUGES)


@pytest.mark.parametrize(
    ("flags", "names"),
    [(["single"], {"server"}), (["split", "--frontends", "2"], {"supervisor", "core", "frontend-0", "frontend-1"})],
)
def test_every_process_tells_of_itself(flags: list[str], names: set[str]) -> None:
    with serve(*SMALL, "--processes", *flags) as server:
        samples = scrape(server)
        for metric in ("resident_memory_bytes", "cpu_seconds_total", "open_fds", "start_time_seconds"):
            told = {
                dict(labels)["process"]: value
                for (name, labels), value in samples.items()
                if name == f"process_{metric}"
            }
            assert told.keys() == names
            assert min(told.values()) > 0
            # Not one process four times.
            assert metric != "resident_memory_bytes" or len(set(told.values())) == len(names)


def test_the_limits_are_those_of_get_info(server: Serving, calls: pb_grpc.IndexerServiceStub) -> None:
    samples, limits = scrape(server), calls.GetInfo(pb.GetInfoRequest()).limits
    for name in ("message_bytes", "spans", "queued_requests", "stream_requests"):
        assert samples[f"blockdex_max_{name}", ()] == getattr(limits, f"max_{name}")
    assert samples["blockdex_max_wait_seconds", ()] == limits.max_wait_ms / 1000


def test_the_totals_of_get_stats_are_those_of_the_metrics(server: Serving) -> None:
    with blockdex.Client(server.grpc_address, tenant="totals") as client:
        client.open_sequence(1)
        client.append_keys(0, sequences=[1], lengths=[2], keys=np.ones((2, 128), np.float32))
        client.close_sequence(1)

        def told() -> Samples:
            totals = client.stats()
            assert 0 < totals.uptime_seconds < 3600
            same: Samples = {
                ("blockdex_batch_requests_sum", ()): totals.requests,
                ("blockdex_batch_requests_count", ()): totals.batches,
                ("blockdex_engine_busy_seconds_total", ()): totals.busy_seconds,
                ("blockdex_device_busy_seconds_total", ()): totals.device_busy_seconds,
            }
            for why, count in totals.dropped.items():
                same["blockdex_dropped_requests_total", (("why", why),)] = count
            for phase, came_to in totals.phases.items():
                labels = (("phase", phase),)
                if phase != "sequence":
                    same["blockdex_tokens_total", labels] = came_to.tokens
                    same["blockdex_device_seconds_total", labels] = came_to.device_seconds
                for stage, seconds in came_to.stage_seconds.items():
                    same["blockdex_stage_duration_seconds_sum", (*labels, ("stage", stage))] = seconds
                same["blockdex_stage_duration_seconds_count", (*labels, ("stage", "queue"))] = came_to.requests
            return same

        # The last answer may be read before it is counted.
        eventually(lambda: told().items() <= scrape(server).items(), "the same")
        assert told()["blockdex_tokens_total", (("phase", "append"),)] >= 2
        assert len(told()) == 4 + 2 + 2 * 3 + 5 * 4


class NoEngine:
    """Reports of an engine that never was there."""

    async def info(self) -> Info:
        raise gone()

    async def stats(self) -> Stats:
        raise gone()

    async def overview(self, max_cells: int) -> CacheOverview:
        raise gone()


async def test_without_an_engine_there_is_what_the_server_knows_itself() -> None:
    readiness = Readiness("the engine core starts anew")
    collector = ServerCollector(NoEngine(), RequestMetrics(), readiness, {"core": 3})
    metrics = Metrics(collector, lambda: {"supervisor": os.getpid()}, None)
    text = (await metrics.exposition(""))[0].decode()
    named = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("blockdex")
    }
    assert (named["blockdex_ready"], named["blockdex_restarts_total"]) == (0, 3)
    assert set(named) == {
        "blockdex_ready",
        "blockdex_restarts_total",
        "blockdex_requests_total",
        *(f"blockdex_request_duration_seconds_{part}" for part in ("bucket", "count", "sum")),
        "blockdex_streams",
        *(f"blockdex_{name}_total" for name in ("streams_opened", "received_bytes", "sent_bytes")),
    }
