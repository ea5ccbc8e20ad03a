"""Kernels compiled at first use, and the cache that says which are: one file a kernel, where the real one looks too."""

from __future__ import annotations

import os
import subprocess
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

compiled_in_a_call: list[str] = []
"""Kernels that a run had to compile first."""
used: set[str] = set()
"""Kernels that ran."""


def _file(name: str) -> Path:
    return Path(os.environ["MINFER_FMHA_CACHE_DIR"]) / f"{name}.so"


def variant_name(dtype: torch.dtype, tile: int, single: bool, pack: int) -> str:
    """What tells one scoring kernel from another."""
    return f"{str(dtype).removeprefix('torch.')}_{tile}_{'single' if single else 'double'}_{pack}"


def get_fmha_variant(dtype: torch.dtype, tile: int, single: bool, plan: dict[str, Any]) -> None:
    """Loads the kernel of a run, compiled or not."""
    name = variant_name(dtype, tile, single, plan["pack"])
    used.add(name)
    compiled_in_a_call.extend(prebuild_fmha_variants([name]))


class FMHAVariantManager:
    def is_cached(self, variant_name: str) -> bool:
        return _file(variant_name).is_file()


_variant_manager = FMHAVariantManager()


def _module_recipe(key: str) -> tuple[Any, str, list[Path]]:
    assert key == "plan"
    return types.SimpleNamespace(lookup=lambda: _file(key) if _file(key).is_file() else None), "", []


def prebuild_fmha_variants(variant_names: Sequence[str], max_workers: int | None = None) -> list[str]:
    """Compiles: the seconds that a compiler takes are the test's to say."""
    missing = [name for name in variant_names if not _file(name).is_file()]
    for name in missing:
        _file(name).with_name("compiling").touch()
        subprocess.run(["sleep", os.environ.get("STAND_IN_COMPILE_S", "0")], check=True)
        if "STAND_IN_FAILS" in os.environ:
            raise RuntimeError("compilation failed:\nnvcc: no such thing")
        _file(name).touch()
    return missing


def prebuild_modules(keys: Sequence[str] = ("plan",), max_workers: int | None = None) -> list[str]:
    return prebuild_fmha_variants(keys)
