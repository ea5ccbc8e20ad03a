"""A real server of several processes, seen from outside: what it takes, and what its metrics say."""

from __future__ import annotations

import contextlib
import json
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.client import process
from benchmarks.ring import cpu_seconds

_START_SECONDS = 300.0  # On a GPU it compiles its kernels, where no cache holds them.
_ANSWER_SECONDS = 30.0


@dataclass(frozen=True)
class Served:
    """A server that runs.

    Attributes:
        grpc: its gRPC address.
        http: its HTTP address.
        supervisor, core, doors: process ids.
    """

    grpc: str
    http: str
    supervisor: int
    core: int
    doors: tuple[int, ...]

    def pss_bytes(self) -> int:
        """Host memory of all its processes; what several share counts once."""
        return sum(_pss_bytes(pid) for pid in (self.supervisor, self.core, *self.doors))

    def idle_share(self, seconds: float) -> float:
        """Share of one core that all its processes take together."""
        before = cpu_seconds(self.supervisor)
        time.sleep(seconds)
        return (cpu_seconds(self.supervisor) - before) / seconds

    def prefill_seconds(self) -> tuple[float, float]:
        """Seconds that prefills took on the device since the start, as the server's metrics tell, and their queries."""
        samples = self._samples()
        return samples["blockdex_device_seconds_total", "prefill"], samples["blockdex_tokens_total", "prefill"]

    def answered(self, rpc: str) -> float:
        """Requests of an RPC that were answered well since the start."""
        return self._samples().get(("blockdex_requests_total", "OK", rpc), 0.0)

    def _samples(self) -> dict[tuple[str, ...], float]:
        """What the server's metrics say, by the name and the sorted labels of each sample."""
        with urllib.request.urlopen(f"http://{self.http}/metrics", timeout=_ANSWER_SECONDS) as response:
            text = response.read().decode()
        return {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


@contextlib.contextmanager
def served(device: str, layers: int, cache_bytes: str, frontends: int, *more: str) -> Iterator[Served]:
    """Runs `blockdex serve` as several processes on free ports of the loopback; with more flags."""
    flags = (
        *("--processes=split", f"--frontends={frontends}", f"--device={device}", f"--num-layers={layers}"),
        *(f"--cache-bytes={cache_bytes}", "--grpc-address=127.0.0.1:0", "--http-address=127.0.0.1:0"),
        *("--log-format=json", "--slow-request-seconds=86400", *more),
    )
    command = (sys.executable, "-m", "blockdex", "serve", *flags)
    with process(*command, ready=r'^\{.*"event": "serving".*\}$', seconds=_START_SECONDS) as match:
        said = json.loads(match[0])
        core = int(said["core_pid"])
        doors = tuple(map(int, said["frontend_pids"].split()))
        yield Served(said["grpc"], said["http"], _parent(core), core, doors)


def device_bytes(pid: int) -> int | None:
    """Memory that a process holds on the first GPU, as the driver tells; None where it does not tell it of processes
    one by one (a container with numbers of its own).
    """
    import pynvml  # noqa: PLC0415 - there is no use for it without a GPU

    pynvml.nvmlInit()
    gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
    used = {each.pid: each.usedGpuMemory for each in pynvml.nvmlDeviceGetComputeRunningProcesses(gpu)}
    return used.get(pid)


def all_device_bytes() -> int:
    """Memory that all processes hold on the first GPU."""
    import pynvml  # noqa: PLC0415 - as above

    pynvml.nvmlInit()
    return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)


def _pss_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/{pid}/smaps_rollup: no Pss")


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[1])
