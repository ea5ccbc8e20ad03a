"""Every kernel compiled for every chip it is made for, in the shapes it is launched in, with no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parent / "aot.py"


@dataclass(frozen=True, slots=True)
class Silicon:
    """What a chip has, from the CUDA programming guide.

    Attributes:
        multiprocessors: of the largest product.
        product: its tensor-core instruction.
        shared: bytes of shared memory of a multiprocessor; a program has 1 KiB less, and so does each beside it.
    """

    multiprocessors: int
    product: str
    shared: int


CHIPS = {
    80: Silicon(108, "mma.sync", 164 << 10),
    90: Silicon(132, "wgmma.mma_async", 228 << 10),
    100: Silicon(148, "tcgen05.mma", 228 << 10),
    103: Silicon(160, "tcgen05.mma", 228 << 10),
    120: Silicon(188, "mma.sync", 100 << 10),
}
COMMON = 90
"""Compiled for in every run of the tests: it takes half a minute."""

REGISTERS = 1 << 16
"""Of a multiprocessor."""


def compile_for(capability: int, folder: Path) -> list[dict[str, Any]]:
    """What the program says."""
    environment = os.environ | {"TRITON_DUMP_PTXAS_LOG": "1", "TRITON_CACHE_DIR": str(folder)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(PROGRAM), str(capability), str(CHIPS[capability].multiprocessors)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    compilations: list[dict[str, Any]] = json.loads(done.stdout)
    return compilations


@pytest.mark.parametrize(
    "capability",
    [pytest.param(chip, marks=[] if chip == COMMON else pytest.mark.slow, id=str(chip)) for chip in CHIPS],
)
def test_kernels_compile_to_what_the_chip_is_good_at(capability: int, tmp_path: Path) -> None:
    silicon, compilations = CHIPS[capability], compile_for(capability, tmp_path)
    for made in compilations:
        print(made)
        if "scores" in made["kernel"]:
            assert made["products"] == [silicon.product], made
            assert not made["spilled_in_loop"], made
        else:
            assert made["products"] == [], made
            assert made["spilled"] == 0, made
        # Many rows of a run take more: fewer programs then run at once.
        at_once = 1 if "runs of 16" in made["case"] else made["at_once"]
        assert made["registers"] * made["warps"] * 32 * at_once <= REGISTERS, made
        assert (made["shared"] + 1024) * at_once <= silicon.shared, made
        assert made["serialized"] == [], made
        if "sm90" in made["kernel"]:
            # Queries come 16 bytes at a time: else each call takes microseconds longer.
            assert made["narrow_loads"] == 0, made
    kernels = {made["kernel"] for made in compilations}
    # Hopper has its own, beside the one for indexers that this does not serve.
    assert kernels - {"prefill_scores_sm90_kernel"} == {
        "append_kernel",
        "cast_queries_kernel",
        "decode_scores_kernel",
        "plan_run_kernel",
        "prefill_scores_kernel",
        "rank_kernel",
        "stage_kernel",
    }
    assert ("prefill_scores_sm90_kernel" in kernels) == (capability == 90)
