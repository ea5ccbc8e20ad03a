"""The CPU kernels keep their bound on memory, however long the sequences."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from blockdex_kernels.cpu import TEMPORARY_BYTES

TESTS = Path(__file__).parents[1]


def test_memory_is_bounded_and_an_empty_cache_takes_none() -> None:
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    program = subprocess.run(
        [sys.executable, "-m", "support.kernel_memory"],
        cwd=TESTS,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert program.returncode == 0, program.stderr

    growth: dict[str, int] = json.loads(program.stdout)
    print({case: f"{size / 2**20:.1f} MiB" for case, size in growth.items()})
    assert len(growth) == 17
    assert growth.pop("an empty cache of 2 GiB") < TEMPORARY_BYTES // 8
    assert {case: size for case, size in growth.items() if size > TEMPORARY_BYTES} == {}
