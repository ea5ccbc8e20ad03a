"""Draft tokens without a draft model: what came the last time after the same tokens, in any request."""

from __future__ import annotations

from collections.abc import Sequence

CONTEXT = 2


class Drafter:
    """Remembers where every pair of tokens was seen last."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, ...], tuple[list[int], int]] = {}

    def guess(self, tokens: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens that may come after `tokens`."""
        seen, end = self._seen.get(tuple(tokens[-CONTEXT:]), ([], 0))
        return seen[end : end + count]

    def learn(self, tokens: list[int], start: int) -> None:
        """Remembers what came before each token from `start` on; the list is kept and may grow."""
        for end in range(max(start, CONTEXT), len(tokens)):
            self._seen[tuple(tokens[end - CONTEXT : end])] = (tokens, end)
