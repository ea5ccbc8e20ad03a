"""Three requests over real text, and how the engine serves them: prompts in chunks, then tokens together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.transformers_engine.engine import Engine

TEXT = Path(__file__).parents[2] / "LICENSE"
CHUNK_TOKENS = 1024
DRAFT_STEP = 10
DRAFTS = b"the"


@dataclass(frozen=True)
class Request:
    """A prompt of byte tokens.

    Attributes:
        sequence: the id of the sequence that it becomes.
        prompt: all of it, a part shared with another request included.
        parent: the sequence whose first `shared` tokens it starts with.
        shared: tokens that are not computed again but forked.
        drafted: whether a draft model guesses for it once, in vain: its guesses are appended, then rolled back.
    """

    sequence: int
    prompt: bytes
    parent: int | None = None
    shared: int = 0
    drafted: bool = False

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens of the prompt that go through the model."""
        return len(self.prompt) - self.shared


def licence_requests(first_sequence: int, *, small: bool) -> list[Request]:
    """A long request whose drafts are rolled back, one that forks from it in the middle of a block, and a third.

    Args:
        first_sequence: id of the first; the others follow.
        small: shorter prompts, still of more blocks than are selected.
    """
    text = TEXT.read_bytes()
    long, shared, own, third = (2_200, 2_100, 120, 200) if small else (6_200, 2_500, 700, 2_600)
    return [
        Request(first_sequence, text[:long], drafted=True),
        Request(first_sequence + 1, text[:shared] + text[-own:], parent=first_sequence, shared=shared),
        Request(first_sequence + 2, text[long : long + third]),
    ]


def generate(
    engine: Engine, requests: Sequence[Request], new_tokens: int, advance: Callable[[int], None]
) -> dict[int, list[int]]:
    """Serves the requests and leaves their sequences open.

    Args:
        engine: runs the model.
        requests: in the order in which they come.
        new_tokens: tokens to generate for each.
        advance: told after every step how many prompt tokens were taken in and tokens generated.

    Returns:
        The generated tokens by sequence.
    """
    generated: dict[int, list[int]] = {}
    for request in requests:
        generated[request.sequence] = [_prefill(engine, request, advance)]
    advance(len(requests))
    for step in range(1, new_tokens):
        drafting = [request for request in requests if request.drafted and step == DRAFT_STEP]
        for batch, drafts in ((drafting, DRAFTS), ([each for each in requests if each not in drafting], b"")):
            if batch:
                _decode(engine, batch, generated, drafts)
        advance(len(requests))
    return generated


def _prefill(engine: Engine, request: Request, advance: Callable[[int], None]) -> int:
    """Takes a prompt in, chunk by chunk; returns the first token after it."""
    if request.parent is None:
        engine.open(request.sequence)
    else:
        engine.fork(request.parent, request.sequence, request.shared)
    for start in range(request.shared, len(request.prompt), CHUNK_TOKENS):
        chunk = request.prompt[start : start + CHUNK_TOKENS]
        [following] = engine.forward([request.sequence], [start], [list(chunk)])
        advance(len(chunk))
    return following[-1]


def _decode(engine: Engine, batch: Sequence[Request], generated: dict[int, list[int]], drafts: bytes) -> None:
    """Generates one token for every request, whose last one goes in, and behind it the drafts.

    None of the drafts is accepted, so the next step starts right after the generated token: that rolls them back.
    """
    outputs = [generated[request.sequence] for request in batch]
    following = engine.forward(
        [request.sequence for request in batch],
        [len(request.prompt) + len(output) - 1 for request, output in zip(batch, outputs, strict=True)],
        [[output[-1], *drafts] for output in outputs],
    )
    for output, row in zip(outputs, following, strict=True):
        output.append(row[0])
