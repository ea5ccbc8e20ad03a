"""The demo: the same requests served twice, with the model's own indexer and with blockdex."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.models.minimax_m3_vl import MiniMaxM3VLForCausalLM

import blockdex
from blockdex_kernels import IndexSpec, SpecError
from examples.transformers_engine.compare import OwnIndexCache, Tally, use_checked_blockdex
from examples.transformers_engine.engine import Engine
from examples.transformers_engine.indexer import BlockdexEngine
from examples.transformers_engine.model import sparse_attentions
from examples.transformers_engine.requests import Request, generate, licence_requests

NEW_TOKENS = 32
SMALL_NEW_TOKENS = 16


@dataclass(frozen=True)
class Outcome:
    """What the demo found.

    Attributes:
        requests: what was served.
        expected: tokens by sequence, generated with the model's own indexer.
        generated: tokens by sequence, generated on blockdex.
        tally: selections compared and calls made.
        info: the server, before the sequences were closed.
        pages: pages that the requests took, a shared one counted once.
    """

    requests: list[Request]
    expected: dict[int, list[int]]
    generated: dict[int, list[int]]
    tally: Tally
    info: blockdex.Info
    pages: int

    def excused(self, request: Request) -> list[bool]:
        """Which of the request's new tokens came after a flip, which may lead the model elsewhere."""
        last = len(request.prompt) - 1
        return [
            self.tally.flips_until[request.sequence, last + number] > 0
            for number in range(len(self.generated[request.sequence]))
        ]

    @property
    def agrees(self) -> bool:
        """Whether every token is the same that no flip came before. A wrong selection has ended the demo already.

        An fp8 cache may lead to other tokens at once: the model's own indexer keeps its keys in bf16.
        """
        return self.info.spec.key_dtype != "bf16" or all(
            ours == own or excused
            for request in self.requests
            for ours, own, excused in zip(
                self.generated[request.sequence], self.expected[request.sequence], self.excused(request), strict=True
            )
        )


def run_demo(model: MiniMaxM3VLForCausalLM, client: blockdex.Client, console: Console, *, small: bool) -> Outcome:
    """Serves the requests with the untouched model, then on blockdex.

    Raises:
        SpecError: the server serves another indexer than the model's.
        SelectionMismatchError: blockdex selects what rounding does not explain.
        BlockdexError: a call failed.
    """
    before = client.info()
    _check_spec(model, before.spec)
    requests = licence_requests(first_sequence=secrets.randbits(63), small=small)
    new_tokens = SMALL_NEW_TOKENS if small else NEW_TOKENS
    steps = sum(request.num_prefill_tokens + new_tokens for request in requests)
    with _progress(console) as progress:
        task = progress.add_task("the model's own indexer", total=steps)
        expected = generate(
            Engine(model, OwnIndexCache(model)), requests, new_tokens, lambda tokens: progress.advance(task, tokens)
        )
        task = progress.add_task("blockdex", total=steps)
        tally = Tally()
        use_checked_blockdex(model, client, before, tally)
        engine = BlockdexEngine(model, OwnIndexCache(model), client)
        generated = generate(engine, requests, new_tokens, lambda tokens: progress.advance(task, tokens))
    info = client.info()
    for request in requests:
        engine.close(request.sequence)
    return Outcome(requests, expected, generated, tally, info, info.cache.pages_used - before.cache.pages_used)


def _check_spec(model: MiniMaxM3VLForCausalLM, served: IndexSpec) -> None:
    """Refuses a server of another indexer; it may have more layers, and either type of keys."""
    wanted = IndexSpec.from_config(
        model.config.to_dict(),
        num_layers=served.num_layers,
        key_dtype=served.key_dtype,
        max_sequence_tokens=served.max_sequence_tokens,
    )
    if wanted != served or served.num_layers < len(sparse_attentions(model)):
        raise SpecError(f"the server serves {served}, the model's indexer is {wanted}")


def _progress(console: Console) -> Progress:
    columns = TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console)
