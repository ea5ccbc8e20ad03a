"""A supervisor, or with arguments its child, which hangs so that no Python of it ever runs again."""

from __future__ import annotations

import asyncio
import ctypes
import sys
from collections.abc import AsyncIterator

from blockdex.ring.control_channel import ControlChannel, Words
from blockdex.server.child_process import Child, run_child
from blockdex.server.config import ServeSettings

SECONDS = 60


async def _hang(talk: ControlChannel, settings: ServeSettings, words: Words, heard: AsyncIterator[Words]) -> None:
    talk.tell({"ready": words["number"]})
    await asyncio.sleep(0.05)
    # Unlike time.sleep it keeps the interpreter's lock.
    ctypes.PyDLL(None).sleep(SECONDS)


async def _supervise() -> None:
    child, said = await Child.start("hanging_child", ServeSettings(), number=7)
    print(child.pid, said["ready"], flush=True)
    await asyncio.sleep(SECONDS)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run_child(_hang)
    else:
        asyncio.run(_supervise())
