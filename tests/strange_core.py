"""An engine core whose kernels are compiled in steps, and whose device is lost with the first keys."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from blockdex.config import ServeSettings
from blockdex.processes import core
from blockdex.processes.child import run_child
from blockdex.transport.talk import Talk, Words

STEPS, STEP_SECONDS = 3, 0.3


def _warm_up(backend: Any) -> Iterator[tuple[int, int]]:
    for done in range(1, 1 + STEPS):
        if "STRANGE_CORE_FAILS" in os.environ:
            raise ArithmeticError("made for this test")
        time.sleep(STEP_SECONDS)
        yield done, STEPS


def _lost(*arguments: Any) -> None:
    raise RuntimeError("made for this test")


async def _run(talk: Talk, settings: ServeSettings, words: Words, heard: AsyncIterator[Words]) -> None:
    from blockdex_kernels.cpu import CpuBackend

    vars_of: Any = CpuBackend
    vars_of.warm_up, vars_of.append, vars_of.synchronize = _warm_up, _lost, _lost
    await core.run(talk, settings, words, heard)


if __name__ == "__main__":
    run_child(_run)
