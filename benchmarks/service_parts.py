"""What is measured of a served blockdex: each part gives its figures, and the numbers that they are made of."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import grpc

from benchmarks import served
from benchmarks.callers import ECHO, ByteStream, Caller, Load, Place, Work, checked, echo_message, messages
from benchmarks.client import Fleet, percentile, process, timed
from benchmarks.doors import OPTIONS, local_ports, owner
from benchmarks.figures import Figure
from benchmarks.served import Served
from blockdex import Client

SEQUENCES, TOKENS = 8, 8192
"""Of a decode step."""

_CALLS_IN_TURN = 50
_WAVES = 2
_WARM_UP = 0.2
_SETTLE_SECONDS = 2.0
_SCORE_BYTES = 4 << 25  # what captured slices of prefill keep, all together
_PREFILLS_IN_FLIGHT = {"decode": 2, "prefill": 4}
_FIRST_IDS = {"calls": 1, "decode": 1_001, "prefill": 2_001, "clients": 10_001}


Part = tuple[list[Figure], dict[str, Any]]


@dataclass(frozen=True)
class Scale:
    """How much is asked for.

    Attributes:
        layers: of the cache.
        cache_bytes: of the server.
        frontends: of the server, and as many echo processes.
        clients: processes that decode.
        client_tokens: of each of their sequences.
        decoders: how many of them decode beside a prefill.
        prefill_queries: of a prefill.
        prefill_tokens: of its sequence.
    """

    layers: int
    cache_bytes: str
    frontends: int
    clients: int
    client_tokens: int
    decoders: int
    prefill_queries: int
    prefill_tokens: int


SCALES = {
    "cuda": Scale(57, "40GiB", 4, 16, 8192, 8, 16_384, 131_072),
    "cpu": Scale(4, "512MiB", 2, 4, 1024, 2, 256, 4096),
}


class Bench:
    """The parts of one run. The server is started by the first part that asks for it.

    Args:
        device: `cpu`, or a CUDA device as torch writes it.
        seconds: for which each kind of call is measured.
        idle_seconds: for which the idle server is watched.
    """

    def __init__(self, device: str, seconds: float, idle_seconds: float) -> None:
        self.device = device
        self.seconds = seconds
        self.idle_seconds = idle_seconds
        self.scale = SCALES["cuda" if device.startswith("cuda") else "cpu"]
        self.kernels: dict[str, str] = {}
        self._resources = contextlib.ExitStack()
        self._callers = contextlib.ExitStack()
        self._steps: tuple[float, float] | None = None
        self._served: Served | None = None
        self._echoes: list[Place] = []
        self._decoding: list[Caller] = []
        self._prefilling: Caller | None = None
        self._device_bytes_before = 0

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *failure: object) -> None:
        self._callers.close()
        self._resources.close()

    def step(self) -> Part:
        """A decode step inside the engine core, and its kernels alone. Before the server starts: they share a GPU."""
        # torch is loaded here: the processes that call, which load this module too, have no use for it.
        import torch  # noqa: PLC0415

        from benchmarks import engine_step  # noqa: PLC0415

        scale = self.scale
        shapes = engine_step.Shapes(scale.layers, SEQUENCES, TOKENS, scale.prefill_queries, scale.prefill_tokens)
        steps = engine_step.measure(self.device, shapes, self.seconds)
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()
        self.kernels = steps.made_by
        self._steps = statistics.median(steps.kernels), statistics.median(steps.prefill)
        engine, kernels = statistics.median(steps.engine), self._steps[0]
        what = f"{SEQUENCES} sequences at {TOKENS:,}"
        basis = f"p99 {percentile(steps.engine, 99):,.1f}, {len(steps.engine):,} steps"
        alone = f"p99 {percentile(steps.kernels, 99):,.1f}, {len(steps.kernels):,} calls"
        figures = [
            self._figure(f"step in the core, {what}, p50", engine, "us", 25.0, basis),
            self._figure("its kernels alone from the host, p50", kernels, "us", None, alone),
        ]
        return figures, {
            "engine_us": _percentiles(steps.engine),
            "kernels_us": _percentiles(steps.kernels),
            "prefill_us": _percentiles(steps.prefill),
        }

    def calls(self) -> Part:
        """AppendAndSelect by one Python client over stream and unary calls, beside echoes of the same bytes."""
        kernel_ms, _ = self._alone_ms()
        server, (echo, *_) = self._server(), self._echo_places()
        with (
            Client(server.grpc, transport="stream") as stream,
            Client(server.grpc, transport="unary") as unary,
            grpc.insecure_channel(server.grpc, options=OPTIONS) as bare,
            grpc.insecure_channel(echo.address, options=OPTIONS) as channel,
        ):
            fleet = Fleet(unary, SEQUENCES, TOKENS, _FIRST_IDS["calls"])
            request, bytes_of = messages(Work(fleet.ids[0], SEQUENCES, TOKENS), 1)[0], ByteStream(bare)
            message = echo_message(request, checked(bytes_of.ask(request)))
            echo_unary: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
                "/blockdex.benchmarks.Echo/Unary"
            )
            echo_stream = ByteStream(channel, ECHO)
            samples = self._in_turn(
                {
                    "stream": partial(fleet.step, stream),
                    "echo_stream": partial(echo_stream.ask, message),
                    "bytes": partial(bytes_of.ask, request),
                    "unary": partial(fleet.step, unary),
                    "echo_unary": partial(echo_unary, message),
                }
            )
            for each in (bytes_of, echo_stream):
                each.close()
        figures = []
        for transport, how, target in (("stream", "over a stream", 1.2), ("unary", "unary", 1.15)):
            p50, floor = statistics.median(samples[transport]), statistics.median(samples[f"echo_{transport}"])
            p99 = f"p99 {percentile(samples[transport], 99):,.2f}"
            figures += [
                self._figure(f"AppendAndSelect {how}, p50", p50, "ms", None, p99),
                self._figure(
                    f"AppendAndSelect {how}, to echo and kernels",
                    p50 / (floor + kernel_ms),
                    "x",
                    target,
                    f"echo {floor:,.3f} ms, kernels {kernel_ms:,.3f} ms",
                ),
            ]
        return figures, {name: _percentiles(taken) for name, taken in samples.items()} | {"kernel_ms": kernel_ms}

    def clients(self) -> Part:
        """Decode calls a second of many clients by all frontends, beside as many echo processes."""
        callers = self._decoders()
        loads: dict[str, list[list[Load]]] = {"served": [], "echo": []}
        for _ in range(_WAVES):
            for whom, waves in loads.items():
                for caller in callers:
                    caller.start(whom, self.seconds / _WAVES)
                waves.append([caller.result() for caller in callers])
        rates = {whom: statistics.mean(sum(load.per_second for load in wave) for wave in loads[whom]) for whom in loads}
        scale = self.scale
        name = f"{scale.clients} clients over {scale.frontends} frontends"
        basis = f"{rates['served']:,.0f} of {rates['echo']:,.0f} calls/s"
        figures = [
            self._figure(f"{name}, decode calls/s", rates["served"], "/s", None, "closed loops over streams"),
            self._figure(
                f"{name}, part of the echoes", 100 * rates["served"] / rates["echo"], "%", 85.0, basis, at_least=True
            ),
        ]
        told = {whom: [[asdict(load) for load in wave] for wave in waves] for whom, waves in loads.items()}
        return figures, {"calls_per_second": rates, "waves": told}

    def decode(self) -> Part:
        """Decode calls of one client, alone and while another one, at another frontend, prefills without pause."""
        server = self._server()
        before = local_ports(server.grpc)
        with Client(server.grpc, transport="stream") as client:
            fleet = Fleet(client, SEQUENCES, TOKENS, _FIRST_IDS["decode"])
            own_client = owner(server.grpc, local_ports(server.grpc) - before, server.doors)
            prefilling = self._prefiller(other_than=own_client)
            alone = self._in_turn({"call": partial(fleet.step, client)})["call"]
            # Longer than the calls are measured, whose warm-up comes first.
            prefilling.start("served", (1 + 2 * _WARM_UP) * self.seconds + 1, _PREFILLS_IN_FLIGHT["decode"])
            time.sleep(1)
            beside = self._in_turn({"call": partial(fleet.step, client)})["call"]
            prefills = prefilling.result()
        p99, p99_beside = percentile(alone, 99), percentile(beside, 99)
        what = f"{self.scale.prefill_queries:,} queries at {self.scale.prefill_tokens:,}"
        basis = f"{p99_beside:,.2f} ms, alone {p99:,.2f}; {len(beside):,} and {len(alone):,} calls"
        figures = [
            self._figure(f"decode p99 beside prefills of {what}, to alone", p99_beside / p99, "x", 3.0, basis),
        ]
        numbers = {"alone_ms": _percentiles(alone), "beside_ms": _percentiles(beside), "prefills": asdict(prefills)}
        return figures, numbers | {"other_client": own_client is not None and len(server.doors) > 1}

    def prefill(self) -> Part:
        """Prefills without and beside decoding clients: their time in the core, and what their client sees."""
        queries = self.scale.prefill_queries
        _, alone_ms = self._alone_ms()
        decoders = self._decoders()[: self.scale.decoders]
        prefilling = self._prefiller()
        alone, core_alone = self._prefilling_for(prefilling)
        for caller in decoders:
            caller.start("served", self.seconds + 1)
        beside, core = self._prefilling_for(prefilling)
        decodes = sum(caller.result().per_second for caller in decoders)
        rates = {"kernel": queries / alone_ms * 1e3, "alone": alone.per_second * queries}
        rates["beside"] = beside.per_second * queries
        core_ms, core_alone_ms = (1e3 * seconds * queries for seconds in (core, core_alone))
        what = f"prefill beside {len(decoders)} decoding clients"
        figures = [
            self._figure(
                f"{what}: its time in the core, kernel alone as a part of it",
                100 * alone_ms / core_ms,
                "%",
                85.0,
                f"{alone_ms:,.2f} ms of {core_ms:,.2f}, without decodes {core_alone_ms:,.2f}; {decodes:,.0f} decodes/s",
                at_least=True,
            ),
            self._figure(
                f"{what}: queries/s at its client, part of those without",
                100 * rates["beside"] / rates["alone"],
                "%",
                None,
                f"{rates['beside']:,.0f} of {rates['alone']:,.0f}",
                at_least=True,
            ),
            self._figure(
                f"{what}: queries/s at its client, part of the kernel's",
                100 * rates["beside"] / rates["kernel"],
                "%",
                None,
                f"{rates['beside']:,.0f} of {rates['kernel']:,.0f}",
                at_least=True,
            ),
        ]
        times = {"kernel_ms": alone_ms, "core_ms": core_ms, "core_without_decodes_ms": core_alone_ms}
        return figures, {"queries_per_second": rates, "decodes_per_second": decodes, **times}

    def memory(self) -> Part:
        """What the server holds beyond its cache and its score buffer, after the parts before this one."""
        server = self._server()
        with Client(server.grpc, transport="unary") as client:
            cache = client.info().cache
        cache_bytes = cache.pages_total * cache.page_bytes
        pss = server.pss_bytes()
        figures = []
        numbers: dict[str, Any] = {"host_bytes": pss, "cache_bytes": cache_bytes}
        gib = 1 << 30
        if self.device.startswith("cuda"):
            own = served.device_bytes(server.core)
            held = own or served.all_device_bytes() - self._device_bytes_before
            scores = _SCORE_BYTES
            told = "as the driver tells of the engine core" if own else "more on the device than before the server"
            basis = f"{held / gib:,.2f} GiB {told}, less cache and {scores / gib:,.2f} of scores"
            beyond = (held - cache_bytes - scores) / gib
            figures.append(self._figure("device memory beyond cache and scores", beyond, "GiB", 1.0, basis))
            numbers |= {"device_bytes": held, "device_bytes_of": told, "score_bytes": scores}
        where = "" if figures else ", the touched part of the cache included"
        figures.append(
            self._figure(
                "host memory of all processes", pss / gib, "GiB", 2.0, f"sum of PSS of {2 + len(server.doors)}{where}"
            )
        )
        return figures, numbers

    def idle(self) -> Part:
        """CPU time of a server to which nobody is connected."""
        server = self._server()
        self._callers.close()
        self._decoding, self._prefilling = [], None
        time.sleep(min(_SETTLE_SECONDS, self.idle_seconds))
        share = server.idle_share(self.idle_seconds)
        basis = f"{2 + len(server.doors)} processes, {self.idle_seconds:g} s"
        return [self._figure("idle server", 100 * share, "% of a core", 1.0, basis)], {"share_of_a_core": share}

    def _figure(
        self, name: str, measured: float, unit: str, target: float | None, basis: str, at_least: bool = False
    ) -> Figure:
        return Figure(name, measured, unit, target if self.device.startswith("cuda") else None, at_least, basis)

    def _in_turn(self, calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Milliseconds of calls of several kinds, some of each in turn, so that what else goes on strikes all alike."""
        samples: dict[str, list[float]] = {name: [] for name in calls}
        began = time.perf_counter()
        warm, end = (began + part * self.seconds for part in (_WARM_UP, 1 + _WARM_UP))
        while time.perf_counter() < end:
            for name, call in calls.items():
                turn = [timed(call) for _ in range(_CALLS_IN_TURN)]
                if time.perf_counter() > warm:
                    samples[name] += turn
        return samples

    def _alone_ms(self) -> tuple[float, float]:
        """Milliseconds of a decode step's kernels alone and of a prefill alone."""
        assert self._steps is not None, "step() goes before what it is compared with"
        decode, prefill = self._steps
        return decode / 1e3, prefill / 1e3

    def _server(self) -> Served:
        if self._served is None:
            if self.device.startswith("cuda"):
                self._device_bytes_before = served.all_device_bytes()
            scale = self.scale
            starting = served.served(self.device, scale.layers, scale.cache_bytes, scale.frontends)
            self._served = self._resources.enter_context(starting)
        return self._served

    def _echo_places(self) -> list[Place]:
        """As many echo processes as there are frontends, which share a port."""
        port = "0"
        while len(self._echoes) < self.scale.frontends:
            command = (sys.executable, "-m", "benchmarks.echo", port)
            match = self._resources.enter_context(process(*command, ready=r"^(\d+) (\d+)$"))
            port = match[1]
            self._echoes.append(Place(f"127.0.0.1:{port}", int(match[2])))
        return self._echoes

    def _decoders(self) -> list[Caller]:
        """The processes that decode, as many at each frontend, and at each echo process."""
        server, echoes, scale = self._server(), self._echo_places(), self.scale
        while len(self._decoding) < scale.clients:
            number = len(self._decoding)
            door, echo = server.doors[number % len(server.doors)], echoes[number % len(echoes)]
            work = Work(_FIRST_IDS["clients"] + 100 * number, SEQUENCES, scale.client_tokens)
            self._decoding.append(self._callers.enter_context(Caller(work, Place(server.grpc, door), echo)))
            if len(self._decoding) == scale.clients:
                for caller in self._decoding:
                    caller.ready()
        return self._decoding

    def _prefiller(self, other_than: int | None = None) -> Caller:
        """The process that prefills, at another frontend than the one named."""
        if self._prefilling is None:
            server, scale = self._server(), self.scale
            door = next(pid for pid in itertools.chain(server.doors, server.doors) if pid != other_than)
            work = Work(_FIRST_IDS["prefill"], 1, scale.prefill_tokens, scale.prefill_queries)
            self._prefilling = self._callers.enter_context(Caller(work, Place(server.grpc, door)))
            self._prefilling.ready()
        return self._prefilling

    def _prefilling_for(self, prefilling: Caller) -> tuple[Load, float]:
        """What prefilling for a while comes to at its client, and seconds of a query inside the core."""
        server = self._server()
        seconds, queries = server.prefill_seconds()
        prefilling.start("served", self.seconds, _PREFILLS_IN_FLIGHT["prefill"])
        load = prefilling.result()
        seconds_after, queries_after = server.prefill_seconds()
        return load, (seconds_after - seconds) / (queries_after - queries)


def _percentiles(samples: list[float]) -> dict[str, float]:
    return {f"p{percent}": percentile(samples, percent) for percent in (10, 50, 90, 99)} | {"count": len(samples)}
