"""Which answers are kept to be checked, and what of them: never keys, which can be made again."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockdex.loadtest.steps import Operation, TokenStep
from blockdex.loadtest.tensors import Run

_FEW = 4
_MOST = 256
_ROWS = 4


@dataclass(frozen=True, slots=True)
class Sample:
    """Some rows of the answer for one sequence of one call.

    Attributes:
        operation: what the call was for.
        sequence: the sequence's id.
        layer: the layer.
        keys: where the keys come from that the layer held when the answer was given.
        queries: where the rows' queries come from; the position of each is its query's.
        block_ids: int32 `[rows, H, topk]`, as answered.
    """

    operation: Operation
    sequence: int
    layer: int
    keys: tuple[Run, ...]
    queries: tuple[Run, ...]
    block_ids: NDArray[np.int32]


class Sampler:
    """Keeps a share of the answers: at least a few of each operation, at most 256, all equally likely to stay.

    Args:
        share: of the answers; 0 keeps none.
        seed: of the choice.
    """

    def __init__(self, share: float, seed: str) -> None:
        self.samples: list[Sample] = []
        self.answers = 0
        self._share = share
        self._numbers = random.Random(seed)
        self._by_operation: Counter[Operation] = Counter()
        self._chosen = 0

    def consider(self, step: TokenStep, block_ids: NDArray[Any]) -> None:
        """Takes note of an answer, int32 `[rows, H, topk]`; perhaps keeps some of it."""
        self.answers += 1
        self._by_operation[step.operation] += 1
        few = self._share > 0 and self._by_operation[step.operation] <= _FEW
        if not few and self._numbers.random() >= self._share:
            return
        self._chosen += 1
        if len(self.samples) < _MOST:
            self.samples.append(self._sample(step, block_ids))
        elif (place := self._numbers.randrange(self._chosen)) < _MOST:
            self.samples[place] = self._sample(step, block_ids)

    def _sample(self, step: TokenStep, block_ids: NDArray[Any]) -> Sample:
        place = self._numbers.randrange(len(step.spans))
        span = step.spans[place]
        first_row = sum(before.run.length for before in step.spans[:place])
        run = span.run
        chosen = {0, run.length - 1, *(self._numbers.randrange(run.length) for _ in range(_ROWS - 2))}
        rows = sorted(chosen)
        return Sample(
            operation=step.operation,
            sequence=span.sequence.id,
            layer=step.layer,
            keys=tuple(span.sequence.runs),
            queries=tuple(Run(run.start + row, 1, run.stream) for row in rows),
            block_ids=np.array(block_ids[[first_row + row for row in rows]]),
        )
