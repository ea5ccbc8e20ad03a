"""Builds the compiled part of blockdex with its wheel; where there is none, the wheel is for any machine.

BLOCKDEX_WHEEL names another platform than this one, which then is that of CC: `manylinux_2_28_aarch64`; or `any`, for a
wheel without the compiled part, which needs no compiler and is enough for a client.
"""

from __future__ import annotations

import os
import platform
import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Native(BuildHookInterface):  # type: ignore[type-arg]
    """Compiles `blockdex._native` before its files are gathered."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - as the interface says
        """Compiles, and says what the wheel then is for."""
        native = runpy.run_path(str(Path(self.root, "service", "blockdex", "csrc", "compile.py")))
        wanted = os.environ.get("BLOCKDEX_WHEEL") or f"linux_{platform.machine()}"
        if self.target_name != "wheel" or wanted == "any" or not native["supported"]():
            return
        native["compile_native"]()
        build_data["artifacts"].append("service/blockdex/_native.abi3.so")
        build_data["pure_python"] = False
        build_data["tag"] = f"cp311-abi3-{wanted}"
