"""`hosted` in a process of its own, which can be stopped and killed: `python -m support.ring_process`.

It prints the address that it listens on, and ends with its stdin.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

from support.programs import REPOSITORY
from support.ring_engine import hosted


@contextlib.contextmanager
def ring_process() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Runs one; the process, and its address as a client names it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])}
    command = [sys.executable, "-m", "support.ring_process"]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


async def main() -> None:
    """Serves until nobody holds its stdin any more."""
    async with hosted() as run:
        print(run.address.replace("\0", "@"), flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
