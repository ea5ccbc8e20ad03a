"""Both clients behind one face, so that a test is written once and runs on each of them and each transport."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import pytest

import blockdex
from blockdex import _native
from blockdex.client import plain_codec
from blockdex.client.kinds import APPEND_KEYS, SELECT_BLOCKS
from blockdex.client.ledger import Ledger
from blockdex.client.requests import NO_POOL, TokenRequest
from blockdex.contract.messages import CacheUsage, Limits
from blockdex.v1 import indexer_pb2 as pb
from blockdex_kernels import IndexSpec

Transport = Literal["ring", "stream", "unary"]


class Flavour(NamedTuple):
    """A client, how it reaches the server, and what writes its data calls."""

    kind: type[Any]
    transport: Transport
    codec: ModuleType = _native


FLAVOURS = {
    "Client-stream": Flavour(blockdex.Client, "stream"),
    "Client-unary": Flavour(blockdex.Client, "unary"),
    "AsyncClient-stream": Flavour(blockdex.AsyncClient, "stream"),
    "AsyncClient-unary": Flavour(blockdex.AsyncClient, "unary"),
    "Client-ring": Flavour(blockdex.Client, "ring"),
    "AsyncClient-ring": Flavour(blockdex.AsyncClient, "ring"),
    "Client-stream-python": Flavour(blockdex.Client, "stream", plain_codec),
    "Client-unary-python": Flavour(blockdex.Client, "unary", plain_codec),
}

CODECS = [pytest.param(_native, id="compiled"), pytest.param(plain_codec, id="python")]
"""What writes data calls and reads their answers, in an install with the compiled module and in one without it."""

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
            pools=0,
        ),
        epoch=17,
        device="cpu",
        device_name="",
        kernels={},
        version="",
        features=frozenset(),
        transports=(),
    )


def append_of(
    ledger: Ledger, layer: int, sequences: Any, rows: Any, start: Any = None, keys: Any = None, **others: Any
) -> TokenRequest:
    """An AppendKeys that is not sent."""
    keys = np.zeros((np.sum(rows), 128), np.float32) if keys is None else keys
    revisions, rollback = others.pop("revisions", None), others.pop("rollback", False)
    selection = (None, 0, 0, "ascending", False, False)
    return ledger.make(
        APPEND_KEYS.number, layer, sequences, rows, start, revisions, None, keys, *selection, rollback, *NO_POOL
    )


def selection_of(ledger: Ledger, layer: int, sequences: Any, rows: Any) -> TokenRequest:
    """A SelectBlocks without starts, not sent."""
    queries = np.zeros((np.sum(rows), 4, 128), np.float32)
    selection = (queries, 0, 0, "ascending", False, False)
    return ledger.make(
        SELECT_BLOCKS.number, layer, sequences, rows, None, None, None, None, *selection, False, *NO_POOL
    )


def starts_of(request: TokenRequest) -> list[int]:
    """Where the spans of a data call start."""
    # The three kinds number their fields alike.
    return list(pb.AppendAndSelectRequest.FromString(request.message()).spans.starts)


class _Awaited:
    """An asyncio client, or a pool of one, whose calls are run to their end on a loop of its own."""

    def __init__(self, awaited: blockdex.AsyncClient | blockdex.AsyncPool, executor: asyncio.Runner) -> None:
        self._awaited = awaited
        self._executor = executor

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._awaited, name)
        return functools.partial(self._run, attribute) if callable(attribute) else attribute

    def _run(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        answer = method(*args, **kwargs)
        if asyncio.iscoroutine(answer):
            answer = self._executor.run(answer)
        return _Awaited(answer, self._executor) if isinstance(answer, blockdex.AsyncPool) else answer


@contextlib.contextmanager
def connect(flavour: Flavour, address: str, **settings: Any) -> Iterator[blockdex.Client]:
    """A client of a flavour, with the methods of the blocking one."""
    client = flavour.kind(address, transport=flavour.transport, **settings)
    client._core.codec = flavour.codec
    if isinstance(client, blockdex.Client):
        with client:
            yield client
        return
    with asyncio.Runner() as executor:
        awaited = _Awaited(client, executor)
        try:
            yield cast(blockdex.Client, awaited)
        finally:
            awaited.close()
