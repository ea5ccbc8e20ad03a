"""A program that compiles the kernels of a channel for a GPU that need not be there; prints their PTX, as JSON."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from blockdex.device_channel.calls import Call, Heads, launch
from blockdex.device_channel.memory import ChannelMemory
from blockdex_kernels import IndexSpec

SPEC, HEADS, ROWS = IndexSpec(), Heads(0, 4), 8


class AbsentDriver:
    """What Triton asks of a driver before it launches."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


_run = JITFunction.run
compiled: list[dict[str, Any]] = []


def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    """A launch up to the launch."""
    kernel = _run(self, *arguments, grid=grid, warmup=True, **options)
    compiled.append({"kernel": self.__name__, "warps": kernel.metadata.num_warps, "ptx": kernel.asm["ptx"]})
    return kernel


def main() -> None:
    driver.set_active(AbsentDriver())
    JITFunction.run = compile_only
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    memory = ChannelMemory(torch.device("cpu"), SPEC, HEADS.count, 512, 64, 1 << 12)
    memory.device = SimpleNamespace(type="cuda")  # type: ignore[assignment]
    numbers = torch.arange(ROWS)
    for row_tokens in (1, 16):
        keys = torch.zeros(ROWS, row_tokens, SPEC.head_dim).bfloat16()
        queries = torch.zeros(ROWS, row_tokens, HEADS.count, SPEC.head_dim).bfloat16()
        call = Call(0, numbers, numbers, numbers, keys, queries, revisions=numbers, replays=numbers[:1])
        ids = torch.zeros(ROWS, row_tokens, 4, SPEC.topk, dtype=torch.int32)
        if row_tokens > 1:
            call.scores = ids.float()
        launch(memory, SPEC, HEADS, call, ids, 2.0)
    print(json.dumps(compiled))


if __name__ == "__main__":
    main()
