"""Who runs: which requests go into a step, and with how many tokens."""

from __future__ import annotations

from collections import Counter, deque

from examples.paged_engine.blocks import BlockManager
from examples.paged_engine.request import Chunk, Request


class Scheduler:
    """Fills each step with running requests first, oldest first, then with waiting ones; a prompt may take several.

    Where blocks run out, the youngest gives up its own: it waits again, and is computed anew.

    Attributes:
        counts: what happened so far, by name.
    """

    def __init__(self, blocks: BlockManager, max_rows: int, max_tokens: int, counts: Counter[str]) -> None:
        """At most `max_rows` requests run, and a step takes at most `max_tokens` tokens."""
        self.blocks = blocks
        self.counts = counts
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._free_rows = list(range(max_rows))
        self._max_tokens = max_tokens
        self._num_blocks = blocks.num_free

    def add(self, request: Request) -> None:
        """Lets a request wait for its turn.

        Raises:
            ValueError: it would not fit if it were alone.
        """
        needed = self.blocks.num_missing(request, len(request.prompt) + request.max_new_tokens)
        if needed > self._num_blocks:
            raise ValueError(f"the request needs {needed} blocks, there are {self._num_blocks}")
        self.waiting.append(request)

    def schedule(self) -> list[Chunk]:
        """The next step's chunks; their requests have the blocks for them."""
        chunks: list[Chunk] = []
        room = self._max_tokens
        waiting = len(self.waiting)
        for request in list(self.running):
            if room and request.row is not None and self._make_room(request, chunk := _chunk(request, room)):
                chunks.append(chunk)
                room -= len(chunk.tokens)
        # Who was just sent away would take the blocks that it was sent away for.
        while room and self.waiting and self._free_rows and len(self.waiting) <= waiting:
            if (admitted := self._admit(self.waiting[0], room)) is None:
                break
            chunks.append(admitted)
            room -= len(admitted.tokens)
        return chunks

    def finish(self, request: Request) -> None:
        """Ends a request that runs: its row and blocks are free for others."""
        assert request.row is not None
        self.running.remove(request)
        self._free_rows.append(request.row)
        request.row = None
        self.blocks.release(request)

    def _make_room(self, request: Request, chunk: Chunk) -> bool:
        """Gives the request the blocks for its chunk, those of younger ones if need be; False: it had to go itself."""
        missing = self.blocks.num_missing(request, chunk.start + len(chunk.tokens))
        while missing > self.blocks.num_free:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is request:
                return False
        self.blocks.take(request, missing)
        return True

    def _preempt(self, request: Request) -> None:
        self.counts["preemptions"] += 1
        self.counts["tokens computed again"] += request.num_computed
        self.finish(request)
        self.waiting.appendleft(request)

    def _admit(self, request: Request, room: int) -> Chunk | None:
        """Lets the first waiting request run if the blocks for its first chunk are there."""
        self.blocks.share(request, self.blocks.find_prefix(request.tokens))
        chunk = _chunk(request, room)
        missing = self.blocks.num_missing(request, chunk.start + len(chunk.tokens))
        if missing > self.blocks.num_free:
            self.blocks.release(request)
            return None
        self.counts["tokens found in the prefix cache"] += request.num_computed
        self.blocks.take(request, missing)
        self.running.append(self.waiting.popleft())
        request.row = self._free_rows.pop()
        return chunk


def _chunk(request: Request, room: int) -> Chunk:
    """The request's next tokens, as many as there is room for, and its drafts behind its last one."""
    end = min(request.num_computed + room, len(request.tokens))
    room -= end - request.num_computed
    return Chunk(request, end, request.drafts[:room] if end == len(request.tokens) else [])
