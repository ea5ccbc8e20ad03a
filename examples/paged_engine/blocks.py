"""The blocks of the paged cache: which are free, who shares one, and which hold a known prefix."""

from __future__ import annotations

import array
import hashlib
from collections.abc import Iterator, Sequence

from examples.paged_engine.request import Request


class BlockManager:
    """Hands blocks out and takes them back.

    A free block keeps what it holds until it is handed out again, the longest free one first; until then it is found by
    the hash of its tokens and all tokens before them.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._free = dict.fromkeys(range(num_blocks))
        self._users = [0] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._hashes: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that no request has."""
        return len(self._free)

    def num_missing(self, request: Request, length: int) -> int:
        """How many blocks the request needs besides its own for `length` tokens."""
        return -(-length // self.block_size) - len(request.blocks)

    def take(self, request: Request, count: int) -> None:
        """Gives the request `count` free blocks behind its own."""
        for _ in range(count):
            block = next(iter(self._free))
            if (name := self._hashes.pop(block, None)) is not None:
                del self._by_hash[name]
            self._use(block)
            request.blocks.append(block)

    def find_prefix(self, tokens: Sequence[int]) -> list[int]:
        """The longest run of known blocks that `tokens` begins with, without the last token: the model starts there."""
        found: list[int] = []
        for name in self._names(tokens[:-1]):
            if name not in self._by_hash:
                break
            found.append(self._by_hash[name])
        return found

    def share(self, request: Request, prefix: Sequence[int]) -> None:
        """Begins the request's table with blocks that were found."""
        for block in prefix:
            self._use(block)
        request.blocks = list(prefix)
        request.num_computed = len(prefix) * self.block_size

    def remember(self, request: Request) -> None:
        """Names the blocks that the request has filled, so that others find them. Drafts do not count."""
        for block, name in zip(request.blocks, self._names(request.tokens[: request.num_computed]), strict=False):
            if block not in self._hashes and name not in self._by_hash:
                self._hashes[block], self._by_hash[name] = name, block

    def release(self, request: Request) -> None:
        """Takes the request's blocks back, its last one to be handed out first."""
        for block in reversed(request.blocks):
            self._users[block] -= 1
            if self._users[block] == 0:
                self._free[block] = None
        request.blocks, request.num_computed = [], 0

    def _use(self, block: int) -> None:
        self._free.pop(block, None)
        self._users[block] += 1

    def _names(self, tokens: Sequence[int]) -> Iterator[bytes]:
        name = b""
        for start in range(0, len(tokens) - self.block_size + 1, self.block_size):
            content = array.array("I", tokens[start : start + self.block_size]).tobytes()
            name = hashlib.sha256(name + content).digest()
            yield name
