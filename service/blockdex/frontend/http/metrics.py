"""What `/metrics` exports; `docs/metrics.md` has the table. No series is named by a sequence, a tenant or a client."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric

from blockdex.contract.errors import Code, Reason, UnavailableError
from blockdex.contract.messages import CacheOverview, Info, Limits
from blockdex.contract.stats import SECONDS_BUCKETS, Histogram, LinkStats, Stats
from blockdex.contract.version import VERSION
from blockdex.frontend.http.gpu_metrics import GpuCollector
from blockdex.frontend.http.process_metrics import Processes, ProcessesCollector
from blockdex.frontend.http.readiness import Readiness
from blockdex.ring.caller import RPCS as RING_RPCS
from blockdex.ring.engine_reports import Reports

RPCS = ("GetInfo", "GetStats", "Stream", *RING_RPCS)
OTHER_RPC = "other"
CODES = ("OK", *(code.name for code in Code))
REASONS = frozenset(reason.value for reason in Reason)


class RequestCounts(Protocol):
    """What one frontend or several have counted."""

    @property
    def total(self) -> RequestMetrics:
        """As of the last `refresh`."""
        ...

    async def refresh(self) -> None:
        """Brings the counts up to date, as far as that can be."""
        ...


class RequestMetrics:
    """Counts and times what one frontend does: `Observer` and `RequestCounts`, used on its loop alone.

    Attributes:
        counts: requests answered, by RPC, code and reason; the reason is empty where there is none, as with OK.
        seconds: their time, by RPC.
        streams: streams that are open.
        streams_opened: streams opened so far.
        bytes_received: of requests, as protobuf.
        bytes_sent: of answers and events, as protobuf.
    """

    def __init__(self) -> None:
        self.counts = dict.fromkeys(((rpc, "OK", "") for rpc in RPCS), 0)
        self.seconds = {rpc: Histogram(SECONDS_BUCKETS) for rpc in RPCS}
        self.streams = self.streams_opened = self.bytes_received = self.bytes_sent = 0

    @property
    def total(self) -> RequestMetrics:
        """These counts themselves."""
        return self

    async def refresh(self) -> None:
        """Nothing: what was observed is counted."""

    def add(self, other: RequestMetrics) -> None:
        """Counts what another frontend did, too."""
        for key, count in other.counts.items():
            self.counts[key] = self.counts.get(key, 0) + count
        for rpc, seconds in other.seconds.items():
            self.seconds.setdefault(rpc, Histogram(SECONDS_BUCKETS)).add(seconds)
        self.streams += other.streams
        self.streams_opened += other.streams_opened
        self.bytes_received += other.bytes_received
        self.bytes_sent += other.bytes_sent

    def observe(self, rpc: str, code: str, reason: str, seconds: float) -> None:
        """Counts one answered request.

        Args:
            rpc: the method's name; one on a stream as `Stream/AppendKeys`. A name that is not in `RPCS` counts as
                `other`, so that no caller can make series.
            code: name of the canonical code it was answered with; one that is not in `CODES` counts as `UNKNOWN`.
            reason: that of the error; one that is not in `REASONS` counts as none.
            seconds: from its arrival to its answer.
        """
        if rpc not in self.seconds:
            rpc = OTHER_RPC
            self.seconds.setdefault(rpc, Histogram(SECONDS_BUCKETS))
        key = (rpc, code if code in CODES else Code.UNKNOWN.name, reason if reason in REASONS else "")
        self.counts[key] = self.counts.get(key, 0) + 1
        self.seconds[rpc].observe(seconds)

    def observe_many(self, rpc: str, counts: list[int], seconds: float) -> None:
        """Counts requests of one of `RPCS` that were answered well.

        Args:
            rpc: as in `observe`.
            counts: how many of them took as long as each bucket of `SECONDS_BUCKETS` says; the last one has no bound.
            seconds: of all together.
        """
        self.counts[rpc, "OK", ""] += sum(counts)
        self.seconds[rpc].add(Histogram(SECONDS_BUCKETS, counts, seconds))


class ServerCollector:
    """Turns what engine, frontends and readiness say into metrics; of an engine that is gone, what it said last.

    An engine that has not said anything yet has no metrics.
    """

    def __init__(
        self, reports: Reports, requests: RequestCounts, readiness: Readiness, restarts: Mapping[str, int]
    ) -> None:
        self._reports = reports
        self._restarts = restarts
        self._requests = requests
        self._readiness = readiness
        self._engine: tuple[Info, Stats, CacheOverview] | None = None

    async def refresh(self) -> None:
        """Asks for all that is counted elsewhere; to be called before `collect`."""
        reports = self._reports
        with contextlib.suppress(UnavailableError):
            self._engine = await asyncio.gather(reports.info(), reports.stats(), reports.overview(max_cells=1))
        await self._requests.refresh()

    def collect(self) -> Iterator[Metric]:
        """Every metric of the server, each family once."""
        yield GaugeMetricFamily(
            "blockdex_ready", "1 while requests are served, as /readyz says.", value=float(self._readiness.ready)
        )
        yield _counters("blockdex_restarts", "Processes that ended and were started again.", "process", self._restarts)
        yield from self._of_requests()
        if self._engine is not None:
            info, stats, overview = self._engine
            yield from _of_links(stats.links)
            yield from _of_build(info, stats)
            yield from _of_limits(info.limits)
            yield from _of_engine(stats)
            yield from _of_cache(info, overview)

    def _of_requests(self) -> Iterator[Metric]:
        made = self._requests.total
        if self._engine is not None:
            made = _with_links(made, self._engine[1].links)
        by_code: Counter[tuple[str, str]] = Counter()
        errors = CounterMetricFamily(
            "blockdex_errors", "Requests answered with an error.", labels=["rpc", "code", "reason"]
        )
        for (rpc, code, reason), count in made.counts.items():
            by_code[rpc, code] += count
            if code != "OK":
                errors.add_metric([rpc, code, reason], count)
        answered = CounterMetricFamily("blockdex_requests", "Requests answered.", labels=["rpc", "code"])
        for (rpc, code), count in by_code.items():
            answered.add_metric([rpc, code], count)
        yield answered
        yield errors
        yield _histograms(
            "blockdex_request_duration_seconds", "From a request's arrival to its answer.", "rpc", made.seconds
        )
        yield GaugeMetricFamily("blockdex_streams", "Streams that are open.", made.streams)
        yield CounterMetricFamily("blockdex_streams_opened", "Streams opened.", made.streams_opened)
        yield CounterMetricFamily("blockdex_received_bytes", "Requests, as protobuf.", made.bytes_received)
        yield CounterMetricFamily("blockdex_sent_bytes", "Answers and events, as protobuf.", made.bytes_sent)


class Metrics:
    """What `/metrics` answers: the server, what the operating system knows of its processes, and its GPU."""

    def __init__(self, server: ServerCollector, processes: Processes, gpu: GpuCollector | None) -> None:
        # Not the global registry, which other libraries write to.
        self._registry = CollectorRegistry()
        self._fresh: list[ServerCollector | GpuCollector] = [server] if gpu is None else [server, gpu]
        for collector in self._fresh:
            self._registry.register(collector)
        self._registry.register(ProcessesCollector(processes))

    async def exposition(self, accept: str) -> tuple[bytes, str]:
        """The metrics now and their content type: Prometheus text, or OpenMetrics where `accept` names it."""
        await asyncio.gather(*(collector.refresh() for collector in self._fresh))
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type


def _with_links(requests: RequestMetrics, links: LinkStats) -> RequestMetrics:
    """What frontends have counted, and the calls that do not come by them."""
    total = RequestMetrics()
    total.add(requests)
    if links.opened:
        total.seconds |= links.seconds
        total.counts |= {(rpc, "OK", ""): 0 for rpc in links.seconds}
    for rpc, code, reason, count in links.outcomes:
        total.counts[rpc, code, reason if reason in REASONS else ""] = count
    return total


def _of_links(links: LinkStats) -> Iterator[Metric]:
    yield GaugeMetricFamily("blockdex_links", "Links of clients on this host that are open.", links.open)
    yield CounterMetricFamily("blockdex_links_opened", "Such links opened.", links.opened)
    yield CounterMetricFamily("blockdex_links_refused", "Such links refused.", links.turned_away)
    yield GaugeMetricFamily("blockdex_channels", "Device channels that are open.", links.channels)
    yield GaugeMetricFamily("blockdex_regions", "Regions that clients share.", links.regions)
    yield GaugeMetricFamily("blockdex_region_bytes", "Bytes of these regions.", links.region_bytes)


def _of_build(info: Info, stats: Stats) -> Iterator[Metric]:
    labels = {"version": VERSION, "device": info.device, "key_dtype": info.spec.key_dtype}
    labels |= {f"{phase}_kernel": info.kernels[phase][0] for phase in ("append", "decode", "prefill")}
    build = GaugeMetricFamily("blockdex_build_info", "What runs; the value is always 1.", labels=list(labels))
    build.add_metric(list(labels.values()), 1)
    yield build
    yield GaugeMetricFamily(
        "blockdex_epoch",
        "Upper 53 bits of the cache's epoch: another number is another, empty cache.",
        # A sample is a double: of 64 bits it would round some away.
        value=info.epoch >> 11,
    )
    yield GaugeMetricFamily(
        "blockdex_epoch_started_timestamp_seconds", "Unix time at which the cache was born.", stats.epoch_started
    )


def _of_limits(limits: Limits) -> Iterator[Metric]:
    for name, documentation, value in (
        ("message_bytes", "Largest request: bytes of its tensors.", limits.max_message_bytes),
        ("spans", "Most sequences of one request.", limits.max_spans),
        ("queued_requests", "Most requests that wait in the engine, all clients together.", limits.max_queued_requests),
        ("stream_requests", "Most requests of one stream in flight.", limits.max_stream_requests),
        ("link_regions", "Most regions that a link shares at once.", limits.max_link_regions),
        ("link_region_bytes", "Most bytes of one link's regions.", limits.max_link_region_bytes),
        ("region_bytes", "Most bytes of all regions.", limits.max_region_bytes),
        (
            "queue_seconds",
            "Wait of a tenant's request for its turn, after which more of the tenant's are refused.",
            limits.max_queue_ms / 1000,
        ),
        ("wait_seconds", "Longest wait of a request without a deadline.", limits.max_wait_ms / 1000),
    ):
        yield GaugeMetricFamily(f"blockdex_max_{name}", documentation, value)


def _of_engine(stats: Stats) -> Iterator[Metric]:
    yield _of_stages(stats)
    yield _histogram("blockdex_batch_requests", "Requests taken into one batch.", stats.batch_requests)
    yield _histograms("blockdex_launch_requests", "Requests of one launch.", "phase", stats.launch_requests)
    yield _histograms("blockdex_batch_tokens", "Tokens of one launch.", "phase", stats.batch_tokens)
    yield _counters("blockdex_tokens", "Tokens worked on.", "phase", stats.tokens)
    yield _counters(
        "blockdex_device_seconds",
        "Time of launches on the device, from handing over to answer.",
        "phase",
        stats.device_seconds,
    )
    yield CounterMetricFamily(
        "blockdex_device_busy_seconds",
        "Time in which at least one launch was on the device.",
        stats.device_busy_seconds,
    )
    yield _counters("blockdex_dropped_requests", "Requests given up before any work.", "why", stats.dropped)
    yield CounterMetricFamily(
        "blockdex_engine_busy_seconds", "Time in which the engine was not waiting for work.", stats.busy_seconds
    )
    yield GaugeMetricFamily("blockdex_waiting_requests", "Selections that wait for keys.", stats.waiting)
    yield GaugeMetricFamily("blockdex_queued_requests", "Requests taken over and not yet begun.", stats.queued)
    yield CounterMetricFamily(
        "blockdex_integrity_checks",
        "Times that an idle core has checked its counts, page tables and lengths against each other.",
        stats.integrity_checks,
    )
    yield CounterMetricFamily(
        "blockdex_integrity_faults", "Contradictions that these checks found.", stats.integrity_faults
    )
    yield CounterMetricFamily("blockdex_faults", "Batches that failed, each of which ended an epoch.", stats.faults)


def _of_stages(stats: Stats) -> Metric:
    family = HistogramMetricFamily(
        "blockdex_stage_duration_seconds", "Time of a request in each stage of the engine.", labels=["phase", "stage"]
    )
    for phase, stages in stats.stage_seconds.items():
        for stage, histogram in stages.items():
            family.add_metric([phase, stage], _buckets(histogram), histogram.total)
    return family


def _of_cache(info: Info, overview: CacheOverview) -> Iterator[Metric]:
    cache = info.cache
    pages = GaugeMetricFamily(
        "blockdex_pages", "Pages, by how many sequences reach them: none, one, or several.", labels=["state"]
    )
    pages.add_metric(["free"], cache.pages_total - cache.pages_used)
    pages.add_metric(["private"], cache.pages_used - cache.pages_shared)
    pages.add_metric(["shared"], cache.pages_shared)
    yield pages
    yield GaugeMetricFamily("blockdex_page_bytes", "Bytes of one page.", cache.page_bytes)
    yield GaugeMetricFamily("blockdex_sequences", "Open sequences, all tenants together.", cache.sequences)
    yield GaugeMetricFamily(
        "blockdex_pools", "Pools of engines that page themselves, all tenants together.", cache.pools
    )
    yield CounterMetricFamily(
        "blockdex_evictions", "Sequences evicted, idle past their lease when pages ran out.", cache.evictions
    )
    yield GaugeMetricFamily(
        "blockdex_idle_pages",
        "Pages that only sequences past their lease hold: eviction can free them.",
        int(overview.idle.sum()),
    )
    yield GaugeMetricFamily("blockdex_idle_sequences", "Sequences past their lease.", overview.idle_sequences)


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    bounds = [*map(str, histogram.bounds), "+Inf"]
    return list(zip(bounds, accumulate(histogram.counts), strict=True))


def _histogram(name: str, documentation: str, histogram: Histogram) -> Metric:
    return HistogramMetricFamily(name, documentation, buckets=_buckets(histogram), sum_value=histogram.total)


def _histograms(name: str, documentation: str, label: str, histograms: dict[str, Histogram]) -> Metric:
    family = HistogramMetricFamily(name, documentation, labels=[label])
    for value, histogram in histograms.items():
        family.add_metric([value], _buckets(histogram), histogram.total)
    return family


def _counters(name: str, documentation: str, label: str, counts: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(name, documentation, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family
