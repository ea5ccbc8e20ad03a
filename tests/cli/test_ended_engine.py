"""A server of one process whose engine ends by a fault: nobody waits for it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import blockdex
from support.serving import SMALL, Serving, environment

PROGRAM = """
import sys
from blockdex.cli.main import main
from blockdex.scheduler import loop as engine
from blockdex_kernels.cpu import CpuBackend
def fail(*arguments, **options):
    engine.IndexCache = fail
    raise MemoryError("made for this test")
CpuBackend.append = fail
sys.exit(main())
"""
"""The server. A batch fails, and then the cache that is to begin anew."""


def test_the_process_ends_with_its_engine() -> None:
    addresses = ("--grpc-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0")
    flags = (*addresses, "--log-format", "json", *SMALL, "--processes", "single")
    command = [sys.executable, "-c", PROGRAM, "serve", *flags]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        serving = Serving(process)
        serving.start()
        try:
            with blockdex.Client(serving.grpc_address, timeout=20) as client:
                client.open_sequence(1)
                with pytest.raises(blockdex.UnavailableError):
                    client.append_keys(layer=0, sequences=1, keys=np.ones((1, 128), np.float32), starts=0)
            assert serving.wait() == 1
        finally:
            process.kill()
    assert "MemoryError: made for this test" in str(serving.event("the engine's thread ended"))
