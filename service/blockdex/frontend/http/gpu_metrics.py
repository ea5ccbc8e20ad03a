"""What NVML says of the GPU; without the package `nvidia-ml-py`, or without its driver, nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from blockdex.logs import log_event

logger = logging.getLogger(__name__)

_MPS = "nvidia-cuda-mps-server"
_IN_TURNS = "blockdex_gpu_processes_in_turns"


@dataclass(frozen=True, slots=True)
class Gauge:
    """One reading of the GPU: its metric, and how NVML is asked for it."""

    name: str
    documentation: str
    read: Callable[[Any, Any], float]


def processes_in_turns(nvml: Any, gpu: Any) -> int:
    """How many other processes share a GPU by time slices: none where MPS runs, which has them all side by side."""
    names = []
    for process in nvml.nvmlDeviceGetComputeRunningProcesses(gpu):
        try:
            names.append(str(nvml.nvmlSystemGetProcessName(process.pid)))
        except nvml.NVMLError:
            names.append("")  # of another container
    return 0 if any(_MPS in name for name in names) else max(len(names) - 1, 0)


GAUGES = (
    Gauge(
        "blockdex_gpu_utilization_ratio",
        "Share of NVML's last sample period in which a kernel ran, of whatever process.",
        lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
    ),
    Gauge(
        "blockdex_gpu_memory_used_bytes",
        "Memory in use, by all processes.",
        lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used,
    ),
    Gauge(
        "blockdex_gpu_memory_total_bytes",
        "Memory that the GPU has.",
        lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).total,
    ),
    Gauge(
        "blockdex_gpu_power_watts",
        "Power that the GPU draws.",
        lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
    ),
    Gauge(
        "blockdex_gpu_temperature_celsius",
        "Temperature of the chip.",
        lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
    ),
    Gauge(
        _IN_TURNS,
        "Other processes that take the GPU in turns with this server, milliseconds each; 0 where MPS runs.",
        processes_in_turns,
    ),
)


class GpuCollector:
    """The gauges of one GPU. One that the GPU does not have is left out.

    Args:
        nvml: the module `pynvml`, initialised.
        uuid: of the GPU, as NVML writes it.

    Raises:
        nvml.NVMLError: there is no such GPU.
    """

    def __init__(self, nvml: Any, uuid: str) -> None:
        self._nvml = nvml
        self._gpu = nvml.nvmlDeviceGetHandleByUUID(uuid)
        self._readings: dict[str, float] = {}

    @property
    def in_turns(self) -> int | None:
        """Other processes that took the GPU in turns with this server when it was last read; None: it does not say."""
        count = self._readings.get(_IN_TURNS)
        return None if count is None else int(count)

    async def refresh(self) -> None:
        """Reads the gauges: milliseconds, in which the loop goes on."""
        before, self._readings = self._readings, await asyncio.to_thread(self._read)
        if self._readings.get(_IN_TURNS, 0) > before.get(_IN_TURNS, 0):
            log_event(logger, logging.WARNING, "gpu is taken in turns", processes=int(self._readings[_IN_TURNS]))

    def collect(self) -> Iterator[Metric]:
        """The gauges as they were read last."""
        for gauge in GAUGES:
            if gauge.name in self._readings:
                yield GaugeMetricFamily(gauge.name, gauge.documentation, self._readings[gauge.name])

    def _read(self) -> dict[str, float]:
        readings = {}
        for gauge in GAUGES:
            try:
                readings[gauge.name] = float(gauge.read(self._nvml, self._gpu))
            except self._nvml.NVMLError as error:
                logger.debug("%s: %s", gauge.name, error)
        return readings


def open_gpu(uuid: str) -> GpuCollector | None:
    """The collector of a GPU; None, and a line in the log, where NVML cannot be had."""
    try:
        import pynvml  # noqa: PLC0415 - an extra that only GPU servers install
    except ModuleNotFoundError:
        _log_without("package nvidia-ml-py is missing: pip install 'blockdex[gpu]'")
        return None
    try:
        pynvml.nvmlInit()
        return GpuCollector(pynvml, uuid)
    except pynvml.NVMLError as error:
        _log_without(str(error))
        return None


def _log_without(reason: str) -> None:
    log_event(logger, logging.WARNING, "no gpu metrics", reason=reason)
