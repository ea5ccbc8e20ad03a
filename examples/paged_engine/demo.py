"""The demo: the same requests served with the model's own indexer, and on a pool over each transport."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal

from transformers.models.minimax_m3_vl import MiniMaxM3VLForCausalLM

import blockdex
from examples.paged_engine.blocks import BlockManager
from examples.paged_engine.cache import PagedCache
from examples.paged_engine.compare import CheckedIndexer
from examples.paged_engine.engine import Engine
from examples.paged_engine.indexer import OwnIndexer
from examples.paged_engine.pool import IndexPool
from examples.paged_engine.request import Request
from examples.transformers_engine.indexer import replace_indexers
from examples.transformers_engine.model import build_model

Transport = Literal["unary", "stream", "ring"]

TEXT = Path(__file__).parents[2] / "LICENSE"
BLOCK_SIZE = 32
TOPK = 4
"""Small blocks and few of them: short requests already have blocks that are left out."""
NUM_BLOCKS = 22
MAX_ROWS = 4
MAX_TOKENS = 64
MAX_DRAFTS = 3
RANKS = 2

EXERCISED = (
    "steps of chunks that differ in length",
    "chunks before the end of a prompt",
    "tokens found in the prefix cache",
    "preemptions",
    "tokens computed again",
    "drafts accepted",
    "drafts rejected",
)
"""What a run that proves anything has counted at least once, besides selections that leave blocks out."""

_pool_ids = count(1)


@dataclass(frozen=True)
class Run:
    """What was generated for each request, and what happened meanwhile, by name."""

    tokens: list[list[int]]
    counts: Counter[str]


def requests() -> list[Request]:
    """Eight over real text, more than run at once: some begin alike, and the last repeats the second."""
    text = TEXT.read_bytes()
    system = text[:150]
    prompts_and_new_tokens = [
        (system + text[1000:1140], 20),
        (system + text[3000:3030], 30),
        (text[2000:2040], 16),
        (text[5000:5260], 20),
        (system[:70] + text[7000:7230], 16),
        (system + text[4000:4020], 24),
        (text[8000:8070], 12),
        (system + text[3000:3030], 24),
    ]
    return [Request(list(prompt), new_tokens) for prompt, new_tokens in prompts_and_new_tokens]


def build(device: str) -> MiniMaxM3VLForCausalLM:
    """The demo's model."""
    return build_model(device, block_size=BLOCK_SIZE, topk=TOPK)


def run_own(device: str) -> Run:
    """Serves the requests with the model's own indexer."""
    model = build(device)
    replace_indexers(model, lambda own, _layer: OwnIndexer(own, NUM_BLOCKS))
    return _run(model, Counter())


def run_on_pool(device: str, address: str, transport: Transport) -> Run:
    """Serves the requests on a pool, asked by two ranks.

    Raises:
        SelectionMismatchError: the pool selects what rounding does not explain.
        BlockdexError: a call failed.
    """
    model = build(device)
    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        ranks = [stack.enter_context(blockdex.Client(address, transport=transport)) for _ in range(RANKS)]
        spec = ranks[0].info().spec
        longest = max(len(request.prompt) + request.max_new_tokens for request in requests())
        pool = IndexPool(
            ranks,
            next(_pool_ids),
            num_blocks=NUM_BLOCKS,
            max_rows=MAX_ROWS,
            max_blocks=-(-longest // BLOCK_SIZE),
        )
        stack.callback(pool.close)
        replace_indexers(
            model,
            lambda own, layer: CheckedIndexer(own, pool, layer, num_blocks=NUM_BLOCKS, spec=spec, counts=counts),
        )
        return _run(model, counts, pool)


def _run(model: MiniMaxM3VLForCausalLM, counts: Counter[str], pool: IndexPool | None = None) -> Run:
    engine = Engine(
        model,
        PagedCache(model, NUM_BLOCKS, BLOCK_SIZE),
        BlockManager(NUM_BLOCKS, BLOCK_SIZE),
        max_rows=MAX_ROWS,
        max_tokens=MAX_TOKENS,
        max_drafts=MAX_DRAFTS,
        pool=pool,
    )
    tokens = engine.generate(requests())
    return Run(tokens, engine.counts + counts)


def agrees(own: Run, others: Sequence[Run]) -> bool:
    """Whether each of the others generated the same tokens, and has met all that there is to meet."""
    return all(
        other.tokens == own.tokens
        and all(other.counts[name] for name in (*EXERCISED, "selections that leave blocks out"))
        for other in others
    )
