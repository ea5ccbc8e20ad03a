"""What cancelled calls leave in the process: `python -m support.cancelled_calls ADDRESS TRANSPORT`, in bytes each."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

import blockdex

CALLS, AT_ONCE = 4000, 100
QUERIES = np.ones((1, 4, 128), np.float32)
SEQUENCE = os.getpid()


async def main(address: str, transport: Any) -> None:
    async with blockdex.AsyncClient(address, transport=transport) as client:
        await client.open_sequence(SEQUENCE)
        await _cancel(client, CALLS)
        before = _held()
        await _cancel(client, CALLS)
        print(round((_held() - before) / CALLS))
        await client.close_sequence(SEQUENCE)


async def _cancel(client: blockdex.AsyncClient, calls: int) -> None:
    """Calls that wait for keys which do not come, given up once they have been sent."""
    for _ in range(calls // AT_ONCE):
        waiting = [
            asyncio.ensure_future(
                client.select_blocks(0, sequences=SEQUENCE, queries=QUERIES, starts=0, revisions=1, wait_for_keys=True)
            )
            for _ in range(AT_ONCE)
        ]
        await asyncio.sleep(0.1)
        for each in waiting:
            each.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


def _held() -> int:
    """Bytes of memory of the process's own."""
    gc.collect()
    rollup = Path("/proc/self/smaps_rollup").read_text("ascii")
    (anonymous,) = [int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss_Anon:")]
    return 1024 * anonymous


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
