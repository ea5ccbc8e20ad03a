"""Kernels of others, from packages that the user names: loaded where they lie, never copied.

vLLM's Triton kernels of the MiniMax-M3 indexer are one file of an unpacked wheel. Importing it as a part of vLLM would
load the engine and its compiled extensions, so it is loaded by itself. Of what it imports, `round_up` is vLLM's own
file; `triton` and `tl` are the Triton installed here; `current_platform` answers its three questions from torch, as
vLLM's does on CUDA.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks.kernel_inputs import Batch, fill
from benchmarks.kernel_shapes import BLOCK_SIZE, HEAD_DIM, HEADS
from benchmarks.kernel_versions import Version
from blockdex_kernels import IndexSpec
from blockdex_kernels.interface import Spans

_KERNELS = Path("vllm", "models", "minimax_m3", "common", "ops", "index_topk.py")
_MATH = Path("vllm", "utils", "math_utils.py")
_VERSION = Path("vllm", "_version.py")


class CurrentPlatform:
    """What the kernels ask of `vllm.platforms.current_platform`."""

    def is_cuda(self) -> bool:
        """Whether there is a CUDA device."""
        return torch.cuda.is_available()

    def is_device_capability(self, capability: tuple[int, int]) -> bool:
        """Whether it has exactly this compute capability."""
        return torch.cuda.is_available() and torch.cuda.get_device_capability() == capability

    def is_arch_support_pdl(self) -> bool:
        """Whether it has programmatic dependent launch."""
        return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def load_vllm(directory: Path) -> tuple[Any, str]:
    """The module with vLLM's kernels, and vLLM's version.

    Args:
        directory: an unpacked vLLM wheel, the folder in which `vllm/` lies.

    Raises:
        FileNotFoundError: it is not one, or one without these kernels.
    """
    version = _load("vllm_version", directory / _VERSION).version
    stand_ins = {
        "vllm": ModuleType("vllm"),
        "vllm.platforms": _module("vllm.platforms", current_platform=CurrentPlatform()),
        "vllm.triton_utils": _module("vllm.triton_utils", triton=triton, tl=tl),
        "vllm.utils": ModuleType("vllm.utils"),
        "vllm.utils.math_utils": _load("vllm_math_utils", directory / _MATH),
    }
    with _importable(stand_ins):
        return _load("vllm_index_topk", directory / _KERNELS), version


def _load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _module(name: str, **attributes: object) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(attributes)
    return module


@contextmanager
def _importable(modules: dict[str, ModuleType]) -> Iterator[None]:
    """Has modules found by their names, and what else may have these names again afterwards."""
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


class Vllm(Version):
    """vLLM's Triton kernels over a bf16 cache of one layer, `[pages, 128, D]` in one piece, which suits them: ours
    lies in pages of several layers.

    Args:
        directory: an unpacked vLLM wheel.
        device: the device.
        pages: of the cache.

    Raises:
        FileNotFoundError: `directory` is not an unpacked vLLM wheel.
    """

    has_stages = True

    def __init__(self, directory: Path, device: torch.device, pages: int) -> None:
        self.spec = IndexSpec()
        self.kernels, self.version = load_vllm(directory)
        self.pages = torch.empty(pages, BLOCK_SIZE, HEAD_DIM, dtype=torch.bfloat16, device=device)
        fill(pages, device, self._write)

    def _write(self, keys: torch.Tensor, spans: Spans) -> None:
        first, last = int(spans.page_table[0, 0]), int(spans.page_table[0, -1])
        self.pages[first : last + 1] = keys.view(-1, BLOCK_SIZE, HEAD_DIM)

    def decode(self, batch: Batch) -> torch.Tensor:
        """See `Version.decode`; the answer is a view of the kernels' `[H, T, topk]`."""
        block_ids: torch.Tensor = self.kernels.minimax_m3_index_decode(
            batch.queries,
            self.pages,
            batch.spans.page_table,
            batch.ends,
            batch.longest,
            self.spec.topk,
            self.spec.init_blocks,
            self.spec.local_blocks,
            num_kv_heads=HEADS,
            decode_query_len=batch.spans.max_length,
            max_decode_query_len=batch.spans.max_length,
        )
        return block_ids.transpose(0, 1)

    def prefill(self, batch: Batch) -> torch.Tensor:
        """See `Version.prefill`; the answer is a view of the kernels' `[H, T, topk]`."""
        return self.rank(self.score(batch), batch)

    def score(self, batch: Batch) -> Any:
        """See `Version.score`: fp32 `[H, T, blocks]`, the blocks rounded up to 16."""
        return self.kernels.minimax_m3_index_score(
            batch.queries,
            self.pages,
            batch.spans.page_table,
            batch.offsets,
            batch.ends,
            batch.spans.starts,
            batch.spans.max_length,
            batch.longest,
            num_kv_heads=HEADS,
        )

    def rank(self, scores: Any, batch: Batch) -> torch.Tensor:
        """See `Version.rank`; the answer is a view of the kernels' `[H, T, topk]`."""
        block_ids: torch.Tensor = self.kernels.minimax_m3_index_topk(
            scores,
            batch.offsets,
            batch.spans.starts,
            batch.spans.max_length,
            self.spec.topk,
            self.spec.init_blocks,
            self.spec.local_blocks,
        )
        return block_ids.transpose(0, 1)
