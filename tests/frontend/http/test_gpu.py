"""GPU metrics: the real NVML package without a GPU, and a stand-in for its module that has one.

The stand-in takes only names that the real package has, and answers in NVML's units.
"""

from __future__ import annotations

import json
import logging
import sys
from types import SimpleNamespace
from typing import Any

import httpx
import pynvml
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from blockdex.frontend.http.app import create_app
from blockdex.frontend.http.gpu_metrics import GAUGES, GpuCollector, open_gpu
from blockdex.frontend.http.history import History
from blockdex.frontend.http.live_page import LiveView
from blockdex.frontend.http.metrics import Metrics, RequestMetrics, ServerCollector
from blockdex.frontend.http.readiness import Readiness
from blockdex.logs import JsonFormatter
from support.ring_engine import hosted

UUID = "GPU-5c1a3f0e-0000-4000-8000-000000000000"


class StandIn:
    """The functions of `pynvml` that are called, on one GPU."""

    NVMLError = pynvml.NVMLError
    NVML_TEMPERATURE_GPU = pynvml.NVML_TEMPERATURE_GPU

    def __init__(self) -> None:
        self.has_power = True
        self.processes = {77: "/usr/bin/python3"}

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml"):
            assert callable(getattr(pynvml, name)), f"the real package has no {name}"
        return object.__getattribute__(self, name)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802 - NVML's name, like those below
        if uuid != UUID:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return uuid

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:  # noqa: N802
        assert handle == UUID
        return SimpleNamespace(gpu=37, memory=12)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:  # noqa: N802
        assert handle == UUID
        return SimpleNamespace(total=150_000_000_000, used=90_000_000_000, free=60_000_000_000)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802
        if not self.has_power:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return 412_500

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:  # noqa: N802
        assert sensor == pynvml.NVML_TEMPERATURE_GPU
        return 61

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:  # noqa: N802
        assert handle == UUID
        return [SimpleNamespace(pid=pid, usedGpuMemory=1) for pid in self.processes]

    def nvmlSystemGetProcessName(self, pid: int) -> str:  # noqa: N802
        if not self.processes[pid]:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return self.processes[pid]


async def exported(collector: GpuCollector) -> dict[str, float]:
    await collector.refresh()
    registry = CollectorRegistry()
    registry.register(collector)
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {sample.name: sample.value for family in families for sample in family.samples}


async def test_readings_in_the_units_that_their_names_say() -> None:
    assert await exported(GpuCollector(StandIn(), UUID)) == {
        "blockdex_gpu_utilization_ratio": 0.37,
        "blockdex_gpu_memory_used_bytes": 9e10,
        "blockdex_gpu_memory_total_bytes": 1.5e11,
        "blockdex_gpu_power_watts": 412.5,
        "blockdex_gpu_temperature_celsius": 61.0,
        "blockdex_gpu_processes_in_turns": 0.0,
    }


async def test_processes_that_take_the_gpu_in_turns_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    nvml = StandIn()
    collector = GpuCollector(nvml, UUID)
    nvml.processes |= {78: "", 79: "engine"}
    for _ in range(2):
        assert (await exported(collector))["blockdex_gpu_processes_in_turns"] == 2.0
    (line,) = (json.loads(JsonFormatter().format(record)) for record in caplog.records)
    assert (line["event"], line["level"], line["processes"]) == ("gpu is taken in turns", "warning", 2)
    nvml.processes[80] = "/usr/bin/nvidia-cuda-mps-server"
    assert (await exported(collector))["blockdex_gpu_processes_in_turns"] == 0.0


async def test_info_says_who_takes_the_gpu_in_turns() -> None:
    nvml = StandIn()
    nvml.processes |= {78: ""}
    collector = GpuCollector(nvml, UUID)
    assert collector.in_turns is None
    async with hosted() as run:
        server = ServerCollector(run.channel, RequestMetrics(), Readiness(), {})
        metrics = Metrics(server, dict, None)
        live = LiveView(run.channel, History(run.channel, RequestMetrics()), Readiness())
        transport = httpx.ASGITransport(create_app(run.channel, metrics, live, Readiness(), collector))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            assert (await client.get("/v1/info")).json()["gpuProcessesInTurns"] == 1
    assert collector.in_turns == 1


async def test_what_the_gpu_does_not_have_is_left_out() -> None:
    nvml = StandIn()
    nvml.has_power = False
    assert set(await exported(GpuCollector(nvml, UUID))) == {gauge.name for gauge in GAUGES} - {
        "blockdex_gpu_power_watts"
    }


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(pynvml.NVMLError):
        GpuCollector(StandIn(), "GPU-other")


def test_without_the_driver_there_are_none_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        reason = str(error)
    else:
        pytest.fail("this machine has NVML: check the metrics against nvidia-smi instead")
    assert open_gpu(UUID) is None
    line = json.loads(JsonFormatter().format(caplog.records[-1]))
    assert (line["event"], line["level"], line["reason"]) == ("no gpu metrics", "warning", reason)


def test_without_the_package_there_are_none_and_the_log_says_what_to_install(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with caplog.at_level(logging.WARNING):
        assert open_gpu(UUID) is None
    assert "blockdex[gpu]" in JsonFormatter().format(caplog.records[-1])
