"""A program that compiles every kernel for a chip that need not be there; prints JSON, one object a compilation.

It is a process of its own: the backend believes to be on a chip of the capability given (90 for 9.0) with as many
multiprocessors as its argument says, its tensors are on the CPU, and a launch compiles and stops there. So kernels are
compiled exactly as the backend launches them. Run with `TRITON_DUMP_PTXAS_LOG=1` and an empty `TRITON_CACHE_DIR`.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from blockdex_kernels import IndexSpec
from blockdex_kernels.interface import Selection, Spans
from blockdex_kernels.triton import TritonBackend, chip
from blockdex_kernels.triton.prefill import RUN_NUMBERS
from blockdex_kernels.triton.rank import Signals
from blockdex_kernels.triton.stage import stage

CAPABILITY, MULTIPROCESSORS = int(sys.argv[1]), int(sys.argv[2])
NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
CPU = torch.device("cpu")

_USED = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads.*Used (\d+) registers", re.DOTALL)
_SERIALIZED = re.compile(r"^.*\bC75\d\d\b.*$", re.MULTILINE)
_JUMP = re.compile(r"\bBRA\b.*`\((\.L_\w+)\)")
_MULTIPLIES = re.compile(r"\b(UTC)?[HQ]G?MMA\b")
_SPILL = re.compile(r"\b(LDL|STL)\b")
_NARROW_LOAD = re.compile(r"\bld\.global\S*\.b(?:8|16)\b")
_PRODUCTS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")

compilations: list[dict[str, Any]] = []
case = ""
at_once: dict[str, int] = {}


def spilled_in_loop(cubin: bytes) -> int | None:
    """Reads and writes of spilled registers in the innermost loops that multiply on tensor cores.

    None where the disassembler is older than the chip, as that of Triton 3.6 is than sm_103.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(NVDISASM), "-c", file.name]
        disassembled = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if "Cannot decode architecture" in disassembled.stderr:
        return None
    disassembled.check_returncode()
    lines = disassembled.stdout.splitlines()
    labels = {line.strip().rstrip(":"): at for at, line in enumerate(lines) if line.startswith(".L_")}
    jumps = ((labels[jump[1]], at) for at, line in enumerate(lines) if (jump := _JUMP.search(line)))
    loops = [range(first, last) for first, last in jumps if first < last]
    multiplying = [loop for loop in loops if any(_MULTIPLIES.search(lines[at]) for at in loop)]
    assert multiplying, "no loop multiplies on tensor cores"
    innermost = [
        loop
        for loop in multiplying
        if not any(other != loop and other[0] in loop and other[-1] in loop for other in multiplying)
    ]
    return sum(_SPILL.search(lines[at]) is not None for loop in innermost for at in loop)


class AbsentDriver:
    """What Triton asks of a driver before it launches."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)


_run = JITFunction.run


def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    """A launch up to the launch; what has been compiled before leaves no log."""
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        kernel = _run(self, *arguments, grid=grid, warmup=True, **options)
    used = _USED.search(log.getvalue())
    if used:
        stores, loads, registers = map(int, used.groups())
        products = [name for name in _PRODUCTS if name in kernel.asm["ptx"]]
        compilations.append(
            {
                "case": case,
                "kernel": self.__name__.strip("_"),
                "at_once": at_once.get(self.__name__, 1),
                "products": products,
                "registers": registers,
                "spilled": stores + loads,
                "spilled_in_loop": spilled_in_loop(kernel.asm["cubin"]) if products and stores + loads else 0,
                "warps": kernel.metadata.num_warps,
                "shared": kernel.metadata.shared,
                "narrow_loads": len(_NARROW_LOAD.findall(kernel.asm["ptx"])),
                "serialized": _SERIALIZED.findall(log.getvalue()),
            }
        )
    return kernel


def spans(num_runs: int, length: int, start: int) -> Spans:
    """Runs of one length each."""
    columns = torch.tensor([[0], [start], [length]], dtype=torch.int32).repeat(1, num_runs)
    table = torch.zeros(num_runs, (start + length) // 128 + 32, dtype=torch.int32)
    return Spans(columns[0], columns[1], columns[2], table, columns.numpy())


def queries(num_runs: int, length: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(num_runs * length, 4, 128, dtype=dtype)


def launch_everything(key_dtype: Any) -> None:
    """Every kernel in the shapes of an engine that serves the model."""
    global case, at_once  # noqa: PLW0603 - what the next compilations belong to
    backend = TritonBackend(IndexSpec(num_layers=2, key_dtype=key_dtype), 2, CPU, reason="")
    name = backend.kernels["decode"][0] + (" bf16" if key_dtype == "bf16" else "")
    native = name.endswith("-fp8")
    at_once = {
        "_decode_scores_kernel": (backend.chip.decode_fp8 if native else backend.chip.decode).programs,
        "_prefill_scores_kernel": (backend.chip.prefill_fp8 if native else backend.chip.prefill).programs,
    }
    case = f"{name}: append"
    backend.append(torch.zeros(128, 128, dtype=torch.bfloat16), spans(128, 1, 50_000))
    case = f"{name}: prefill"
    backend.prefill(queries(2, 1000), spans(2, 1000, 80_000), order="ascending", return_scores=False)
    case = f"{name}: slice of prefill"
    packed, table = queries(1, 2048), spans(1, 2048, 80_000).page_table
    numbers, block_ids = torch.zeros(RUN_NUMBERS, dtype=torch.int32), torch.zeros(8192, 16, dtype=torch.int32)
    backend.prefill_into(block_ids, packed.flatten(0, 1), numbers, table, 1024)
    case = f"{name}: stage"
    tokens, heads = 16, 4
    host = torch.zeros(64 + 2 * 128 * tokens * (1 + heads) + 8 * tokens * (1 + 2 * heads) + 256, dtype=torch.uint8)
    odd = key_dtype != "bf16"
    sizes = {"num_columns": 10, "rows_at": 64, "num_keys": tokens, "num_queries": tokens * heads}
    sizes |= {"num_brought": tokens * heads + 32, "dim": 128}
    brought = stage(host, host.clone(), **sizes, odd_keys=odd, odd_queries=native, pdl=backend.chip.pdl)
    case = f"{name}: decode into targets"
    selection = Selection(torch.zeros(tokens, heads, 16, dtype=torch.int32), torch.zeros(tokens, heads, 16))
    flags = torch.ones(tokens, dtype=torch.int32)
    signals = Signals(brought[-32:], torch.zeros(1, dtype=torch.int32))
    runs = replace(spans(tokens, 1, 100_000), max_length=1, flags=flags)
    backend.decode_into(selection, queries(tokens, 1), runs, order="ascending", targets=brought[:-32], signals=signals)
    for num_runs, length in ((128, 1), (8, 8), (1, 16)):
        case = f"{name}: decode of {num_runs} runs of {length}"
        packed, runs = queries(num_runs, length), spans(num_runs, length, 100_000)
        backend.decode(packed, runs, order="ascending", return_scores=False)
    case = f"{name}: decode by score"
    backend.decode(queries(8, 1), spans(8, 1, 1_000), order="score", return_scores=True)
    case = f"{name}: prefill of float32 at 1M tokens"
    backend.prefill(queries(1, 40, torch.float32), spans(1, 40, 1_000_000), order="ascending", return_scores=False)
    case = f"{name}: prefill where no block is forced"
    backend = TritonBackend(IndexSpec(num_layers=2, key_dtype=key_dtype, local_blocks=0), 2, CPU, reason="")
    backend.prefill_into(block_ids, torch.zeros(8192, 128, dtype=torch.bfloat16), numbers, table, 1024)


def main() -> None:
    driver.set_active(AbsentDriver())
    JITFunction.run = compile_only
    chip.Chip.of = classmethod(lambda cls, device: chip.chip_of(CAPABILITY, MULTIPROCESSORS))  # type: ignore[assignment]
    launch_everything("bf16")
    launch_everything("fp8_e4m3")
    print(json.dumps(compilations))


if __name__ == "__main__":
    main()
