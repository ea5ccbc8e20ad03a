"""Both clients behind one face, so that a test is written once and runs on each of them and each transport."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
from collections.abc import Iterator
from typing import Any, Literal, cast

import blockdex
from blockdex.contract.messages import CacheUsage, Limits
from blockdex_kernels import IndexSpec

Transport = Literal["stream", "unary"]

FLAVOURS: list[tuple[type[Any], Transport]] = [
    (blockdex.Client, "stream"),
    (blockdex.Client, "unary"),
    (blockdex.AsyncClient, "stream"),
    (blockdex.AsyncClient, "unary"),
]
FLAVOUR_NAMES = [f"{flavour.__name__}-{transport}" for flavour, transport in FLAVOURS]

_sequence_ids = itertools.count(1_000_000)


def new_sequence() -> int:
    """An id that no other test of this process uses."""
    return next(_sequence_ids)


def some_info(num_layers: int = 57) -> blockdex.Info:
    """What a client may know of a server, without one."""
    return blockdex.Info(
        spec=IndexSpec(num_layers=num_layers),
        limits=Limits(
            max_message_bytes=2**20, max_spans=4, max_queued_requests=1, max_stream_requests=1, max_wait_ms=1
        ),
        cache=CacheUsage(
            pages_total=0,
            pages_used=0,
            pages_shared=0,
            capacity_tokens=0,
            page_bytes=0,
            sequences=0,
            evictions=0,
        ),
        epoch=17,
        device="cpu",
        device_name="",
        kernels={},
        version="",
        features=frozenset(),
        transports=(),
    )


class _Awaited:
    """An asyncio client whose calls are run to their end on a loop of its own."""

    def __init__(self, client: blockdex.AsyncClient, executor: asyncio.Runner) -> None:
        self._client = client
        self._executor = executor

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        return functools.partial(self._run, method) if asyncio.iscoroutinefunction(method) else method

    def _run(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        return self._executor.run(method(*args, **kwargs))


@contextlib.contextmanager
def connect(flavour: tuple[type[Any], Transport], address: str, **settings: Any) -> Iterator[blockdex.Client]:
    """A client of a flavour, with the methods of the blocking one."""
    kind, transport = flavour
    if kind is blockdex.Client:
        with blockdex.Client(address, transport=transport, **settings) as client:
            yield client
        return
    with asyncio.Runner() as executor:
        awaited = _Awaited(blockdex.AsyncClient(address, transport=transport, **settings), executor)
        try:
            yield cast(blockdex.Client, awaited)
        finally:
            awaited.close()
