"""A process that has used a client and forks: `python -m support.forking_parent ADDRESS TRANSPORT FORKS THREADS`.

Every child finds that it can use neither this client nor a new one, closes what it was given and ends as any program
does. TRANSPORT is `stream`, `unary` or `ring`; with `async-` before it, the client is asyncio's.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import numpy as np

import blockdex

KEYS = np.ones((1, 128), np.float32)
CHILD_SECONDS = 20
FIRST = os.getpid() * 1000


def main(address: str, transport: Any, forks: int, threads: int) -> None:
    if transport.startswith("async-"):
        asyncio.run(_async_parent(address, transport.removeprefix("async-"), forks, threads))
    else:
        _parent(address, transport, forks, threads)


def _parent(address: str, transport: Any, forks: int, threads: int) -> None:
    with blockdex.Client(address, transport=transport) as client:
        client.open_sequence(FIRST)
        with _callers(client, threads):
            for done in range(forks):
                _fork(lambda: _child(client, address))
                client.append_keys(0, sequences=FIRST, keys=KEYS, starts=done)
        assert client.get_sequence(FIRST).lengths[0] == forks
        client.close_sequence(FIRST)


def _child(client: blockdex.Client, address: str) -> None:
    with client:
        _refused(lambda: client.append_keys(0, sequences=FIRST, keys=KEYS))
        _refused(lambda: blockdex.Client(address))
        _refused(lambda: blockdex.connect(address))
    gc.collect()


@contextlib.contextmanager
def _callers(client: blockdex.Client, threads: int) -> Iterator[None]:
    """Threads that call all the time; none of their calls fails."""
    ending, failures = threading.Event(), list[BaseException]()

    def call(sequence: int) -> None:
        try:
            client.open_sequence(sequence)
            while not ending.is_set():
                client.append_keys(0, sequences=sequence, keys=KEYS, starts=0, rollback=True)
            client.close_sequence(sequence)
        except BaseException as failure:
            failures.append(failure)

    running = [threading.Thread(target=call, args=(FIRST + 1 + number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    try:
        yield
    finally:
        ending.set()
        for thread in running:
            thread.join()
    assert not failures, failures


async def _async_parent(address: str, transport: Any, forks: int, tasks: int) -> None:
    ending = False

    async def call(sequence: int) -> None:
        await client.open_sequence(sequence)
        while not ending:
            await client.append_keys(0, sequences=sequence, keys=KEYS, starts=0, rollback=True)
        await client.close_sequence(sequence)

    async with blockdex.AsyncClient(address, transport=transport) as client:
        await client.open_sequence(FIRST)
        calling = [asyncio.ensure_future(call(FIRST + 1 + number)) for number in range(tasks)]
        for done in range(forks):
            _fork(lambda: asyncio.run(_async_child(client, address)))
            await client.append_keys(0, sequences=FIRST, keys=KEYS, starts=done)
        ending = True
        await asyncio.gather(*calling)
        assert (await client.get_sequence(FIRST)).lengths[0] == forks
        await client.close_sequence(FIRST)


async def _async_child(client: blockdex.AsyncClient, address: str) -> None:
    async with client:
        await _refused_later(lambda: client.append_keys(0, sequences=FIRST, keys=KEYS))
        _refused(lambda: blockdex.AsyncClient(address))
        await _refused_later(lambda: blockdex.connect_async(address))
    gc.collect()
    # As multiprocessing does: the parent's loop, which still runs here, shares what it waits with.
    os._exit(0)


def _fork(child: Callable[[], object]) -> None:
    """Forks, and waits for the child, which ends as a program does."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(CHILD_SECONDS)
        child()
        raise SystemExit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, f"a child ended with {status}"


def _refused(call: Callable[[], object]) -> None:
    began = time.monotonic()
    try:
        call()
    except RuntimeError as error:
        assert "was forked" in str(error), error
    else:
        raise AssertionError("not refused")
    assert time.monotonic() - began < 1


async def _refused_later(call: Callable[[], Awaitable[object]]) -> None:
    try:
        await call()
    except RuntimeError as error:
        assert "was forked" in str(error), error
    else:
        raise AssertionError("not refused")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
