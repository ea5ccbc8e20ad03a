"""What the kernels of a channel become for a GPU: seen without one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path


def test_kernels_order_memory_and_move_whole_vectors(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, str(Path(__file__).with_name("aot.py"))]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=110)
    compiled = json.loads(done.stdout.splitlines()[-1])
    assert [(each["kernel"], each["warps"]) for each in compiled] == [
        ("ring", 4),
        ("wait", 1),
        ("ring", 4),
        ("wait", 4),
    ]
    for each in compiled:
        ptx = each["ptx"]
        assert "griddepcontrol.wait" in ptx and ".local" not in ptx
        assert "ld.acquire.sys.global.u64" in ptx
        if each["kernel"] == "wait":
            assert "%globaltimer" in ptx
            continue
        # Behind everything else: nothing is stored after the number that shows the request.
        release = ptx.index("st.release.sys.global.u64")
        assert any("bar.sync" in line for line in ptx[:release].splitlines()[-20:])
        assert re.search(r"ld\.global\.v4\.b32", ptx) and re.search(r"st\.global\.v4\.b32", ptx)
