"""An engine core, or with `serve` a server of one process, that is compiled in steps and whose device is lost.

That happens with the first keys; another thread is in a call then that does not end.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from blockdex.cli.main import main
from blockdex.ring.control_channel import ControlChannel, Words
from blockdex.server import engine_process as core
from blockdex.server.child_process import run_child
from blockdex.server.config import ServeSettings

STEPS, STEP_SECONDS = 3, 0.3
HANG_SECONDS = 300.0


def _warm_up(backend: Any) -> Iterator[tuple[int, int]]:
    for done in range(1, 1 + STEPS):
        if "STRANGE_CORE_FAILS" in os.environ:
            raise ArithmeticError("made for this test")
        time.sleep(STEP_SECONDS)
        yield done, STEPS


def _lost(*arguments: Any) -> None:
    raise RuntimeError("made for this test")


def _lose(*arguments: Any) -> None:
    # As the executor's thread that launches prefills is in a call of the driver then.
    ThreadPoolExecutor(1).submit(time.sleep, HANG_SECONDS)
    _lost()


def _spoil() -> None:
    from blockdex_kernels.cpu import CpuBackend

    vars_of: Any = CpuBackend
    vars_of.warm_up, vars_of.append, vars_of.synchronize = _warm_up, _lose, _lost


async def _run(talk: ControlChannel, settings: ServeSettings, words: Words, heard: AsyncIterator[Words]) -> None:
    if hangs := os.environ.get("STRANGE_CORE_HANGS"):
        if hangs == "ready":
            talk.tell({"gpu": None})
        if hangs != "connected":
            talk.hang_up()
        await asyncio.sleep(HANG_SECONDS)
    _spoil()
    await core.run(talk, settings, words, heard)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _spoil()
        sys.exit(main(sys.argv[1:]))
    run_child(_run)
