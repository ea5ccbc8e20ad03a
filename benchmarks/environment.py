"""Where and with what a figure was measured: what every result file begins with."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def environment(*packages: str, device: torch.device | None = None, apart: bool = False) -> dict[str, Any]:
    """Command, commit, date, machine and the versions of packages; of a CUDA device, what and under which driver.

    With `apart` a process that ends looks at the device, and this one does not.
    """
    facts: dict[str, Any] = {
        "command": " ".join(["python", "-m", _module(), *sys.argv[1:]]),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.platform(terse=True)},
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in packages},
        },
    }
    if device is not None and device.type == "cuda":
        with ProcessPoolExecutor(1, get_context("spawn")) if apart else ThreadPoolExecutor(1) as looking:
            facts["machine"]["gpu"], facts["versions"]["cuda"] = looking.submit(_gpu, device).result()
    return facts


def _gpu(device: torch.device) -> tuple[dict[str, object], str | None]:
    """The GPU, and the CUDA that torch was built with."""
    import torch  # noqa: PLC0415 - benchmarks of the client have no use for it

    properties = torch.cuda.get_device_properties(device)
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    gpu = {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": driver or "unknown",
    }
    return gpu, torch.version.cuda


def slug(device_name: str) -> str:
    """A device in the name of a file: `h200` for an NVIDIA H200."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower().removeprefix("nvidia ")).strip("-")


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name.removesuffix(".__main__") if spec is not None else sys.argv[0]


def _commit() -> str:
    """The commit, `-dirty` where the tree differs from it; of a tree without a repository, what `GIT_COMMIT` says."""
    if commit := os.environ.get("GIT_COMMIT"):
        return commit
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
