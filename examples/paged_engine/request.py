"""A request: its tokens, and how far the cache has them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(eq=False)
class Request:
    """A prompt and what is generated behind it.

    Attributes:
        prompt: its tokens.
        max_new_tokens: how many to generate.
        tokens: the prompt, and behind it what was generated.
        drafts: guesses at what comes next, for the next step to verify.
        num_computed: leading tokens whose keys and values the cache has.
        blocks: the block table: which block has tokens 0 to 127, 128 to 255 and so on.
        row: the request's row among those that run, None while it waits.
    """

    prompt: list[int]
    max_new_tokens: int
    tokens: list[int] = field(init=False)
    drafts: list[int] = field(default_factory=list)
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    row: int | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def generated(self) -> list[int]:
        """What was generated so far."""
        return self.tokens[len(self.prompt) :]

    @property
    def num_missing(self) -> int:
        """How many tokens are still to be generated."""
        return self.max_new_tokens - len(self.generated)


@dataclass(frozen=True)
class Chunk:
    """What a request puts into a step: tokens `start` to `end`, and drafts behind them.

    Attributes:
        request: whose tokens they are.
        end: of the tokens; before the request's last one where a prompt goes in by parts.
        drafts: behind the request's last token, else none.
    """

    request: Request
    end: int
    drafts: list[int]

    @property
    def start(self) -> int:
        """Position of the first token."""
        return self.request.num_computed

    @property
    def tokens(self) -> list[int]:
        """All that goes in."""
        return self.request.tokens[self.start : self.end] + self.drafts
