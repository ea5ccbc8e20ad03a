"""The client of a cluster, for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from blockdex.client.answers import Info, SequenceState
from blockdex.client.requests import Integers
from blockdex.cluster.client import ClusterClient
from blockdex.cluster.directory import Directory
from blockdex.contract.errors import BlockdexError

Answer = TypeVar("Answer")

_MOST_THREADS = 64


class AsyncClusterClient:
    """`ClusterClient` with `await`, each method included.

    Its calls run in threads, at most 64 at a time. Cancelling a task gives up its answer, not its request.
    """

    def __init__(self, directory: Directory, **options: Any) -> None:
        self._client = ClusterClient(directory, **options)
        self._threads = ThreadPoolExecutor(_MOST_THREADS, "blockdex-cluster-calls")

    async def __aenter__(self) -> AsyncClusterClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Fails what is in flight, and every later call, with `CancelledError`. Sequences stay open."""
        await asyncio.to_thread(self._client.close)
        await asyncio.to_thread(self._threads.shutdown)

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the members, in the order of the directory."""
        return self._client.members

    @property
    def problem(self) -> str:
        """Why the directory's last answer was not taken; empty where it was."""
        return self._client.problem

    def owner(self, root_id: int) -> str:
        """The member that a new root goes to."""
        return self._client.owner(root_id)

    async def info(self, *, timeout: float | None = None) -> dict[str, Info | BlockdexError]:
        """What each member is, by name; the error of one that does not say."""
        return await self._run(self._client.info, timeout=timeout)

    async def open_sequence(self, sequence_id: int, **others: Any) -> None:
        """Opens an empty sequence on the member that owns its root."""
        await self._run(self._client.open_sequence, sequence_id, **others)

    async def open_sequences(self, sequences: Integers, **others: Any) -> None:
        """Opens empty sequences: all or none of those on one member."""
        await self._run(self._client.open_sequences, sequences, **others)

    async def get_sequence(self, sequence_id: int, **others: Any) -> SequenceState:
        """Length and revision of every layer."""
        return await self._run(self._client.get_sequence, sequence_id, **others)

    async def fork_sequence(self, parent_id: int, child_id: int, length: int, **others: Any) -> tuple[int, ...]:
        """Opens a child beside its parent; the answer is its length by layer."""
        return await self._run(self._client.fork_sequence, parent_id, child_id, length, **others)

    async def truncate_sequence(self, sequence_id: int, length: int, **others: Any) -> tuple[int, ...]:
        """Cuts every layer to at most `length` tokens; the answer is the length by layer."""
        return await self._run(self._client.truncate_sequence, sequence_id, length, **others)

    async def close_sequence(self, sequence_id: int, **others: Any) -> None:
        """Gives up a sequence; closing what is closed already is fine."""
        await self._run(self._client.close_sequence, sequence_id, **others)

    async def close_sequences(self, sequences: Integers, **others: Any) -> None:
        """Gives up sequences, no two alike; closing what is closed already is fine."""
        await self._run(self._client.close_sequences, sequences, **others)

    async def append_keys(self, layer: int, **others: Any) -> None:
        """Writes index keys of one layer."""
        await self._run(self._client.append_keys, layer, **others)

    async def select_blocks(self, layer: int, **others: Any) -> Any:
        """Selects the key blocks that each query reads."""
        return await self._run(self._client.select_blocks, layer, **others)

    async def append_and_select(self, layer: int, **others: Any) -> Any:
        """`append_keys`, then `select_blocks`, for the same tokens."""
        return await self._run(self._client.append_and_select, layer, **others)

    async def _run(self, call: Callable[..., Answer], *args: Any, **others: Any) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(call, *args, **others))
