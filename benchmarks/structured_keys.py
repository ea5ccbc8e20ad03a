"""Index keys of one sequence, and queries of its last block, with and without the structure that a model gives them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.environment import ROOT

HEADS, HEAD_DIM, QUERIES = 4, 128, 128

_RANK, _PASSAGE_TOKENS, _PASSAGES_OF_A_TOPIC = 32, 300, 4
_PHRASE_TOKENS = 16
_OUTLIERS, _ROTARY_DIM, _THETA = 4, 64, 5e6
_RECENT_TOKENS = 1024


@dataclass(frozen=True)
class Structure:
    """How keys and queries are made.

    Attributes:
        about: how, in words.
        make: of a number of tokens (a multiple of 128) and of a sequence's number, bf16 keys `[tokens, D]` and bf16
            queries `[128, H, D]` of the last 128 tokens.
        longest: what is not made of more tokens, because it takes minutes.
    """

    about: str
    make: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]
    longest: int | None = None


def isotropic(tokens: int, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `STRUCTURES`."""
    generator = torch.Generator().manual_seed(sequence)
    keys = torch.randn(tokens, HEAD_DIM, generator=generator)
    queries = torch.randn(QUERIES, HEADS, HEAD_DIM, generator=generator)
    return keys.bfloat16(), queries.bfloat16()


def language_like(tokens: int, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `STRUCTURES`."""
    generator = torch.Generator().manual_seed(sequence)
    content = _content(tokens, generator)
    positions = torch.arange(tokens)
    keys = _rotated(_with_outliers(content, generator), positions)
    before = tokens - QUERIES
    needles = torch.randint(before, (QUERIES, HEADS), generator=generator)
    recent = torch.randint(before - _RECENT_TOKENS, before, (QUERIES, HEADS), generator=generator)
    aims = _normed(content[needles] + content[recent])
    queries = _normed(aims + 0.25 * torch.randn(aims.shape, generator=generator))
    return keys.bfloat16(), _rotated(queries, positions[before:, None]).bfloat16()


def _content(tokens: int, generator: torch.Generator) -> torch.Tensor:
    """What keys say before position and outliers come in: `[tokens, D]`, rows normed."""
    passages = (torch.rand(tokens, generator=generator) < 1 / _PASSAGE_TOKENS).cumsum(dim=0)
    num_topics = tokens // (_PASSAGE_TOKENS * _PASSAGES_OF_A_TOPIC)
    topics = torch.randn(num_topics, _RANK, generator=generator)
    topic = torch.randint(num_topics, (int(passages[-1]) + 1,), generator=generator)[passages]
    steps = torch.randn(tokens + _PHRASE_TOKENS, _RANK, generator=generator, dtype=torch.float64).cumsum(dim=0)
    phrase = (steps[_PHRASE_TOKENS:] - steps[:-_PHRASE_TOKENS]).float() / math.sqrt(_PHRASE_TOKENS)
    mixing = torch.randn(_RANK, HEAD_DIM, generator=generator) / math.sqrt(_RANK)
    word = torch.randn(tokens, HEAD_DIM, generator=generator)
    return _normed((topics[topic] + 0.7 * phrase) @ mixing + word)


def _with_outliers(content: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Some channels 10 to 30 times as large as the others, of one sign, changing by a tenth along the text."""
    keys = content.clone()
    channels = _ROTARY_DIM + torch.randperm(HEAD_DIM - _ROTARY_DIM, generator=generator)[:_OUTLIERS]
    magnitudes = 10 + 20 * torch.rand(_OUTLIERS, generator=generator)
    keys[:, channels] = magnitudes * (1 + 0.1 * content[:, channels])
    return keys


def _normed(rows: torch.Tensor) -> torch.Tensor:
    """Rows with a root mean square of 1."""
    return rows / rows.square().mean(dim=-1, keepdim=True).sqrt()


def _rotated(rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of the first dimensions."""
    half = _ROTARY_DIM // 2
    angles = positions[..., None] * _THETA ** (-torch.arange(half) / half)
    first, second, rest = rows[..., :half], rows[..., half:_ROTARY_DIM], rows[..., _ROTARY_DIM:]
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine, rest], dim=-1)


@torch.inference_mode()
def random_model(tokens: int, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `STRUCTURES`."""
    # Loading them takes seconds.
    from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import apply_rotary_pos_emb  # noqa: PLC0415

    from examples.transformers_engine.model import build_model, sparse_attentions  # noqa: PLC0415

    text = b"".join(path.read_bytes() for path in sorted((ROOT / "docs").glob("*.md")))
    piece = text[sequence * tokens : (sequence + 1) * tokens]
    if len(piece) < tokens:
        raise ValueError(f"sequence: {sequence} of {tokens} tokens ends behind the text, which has {len(text)} bytes")
    model = build_model("cpu")
    positions = torch.arange(tokens)[None]
    hidden = model.model.embed_tokens(torch.tensor(list(piece))[None])
    rotary = model.model.rotary_emb(hidden, positions)
    first, second = model.model.layers[:2]
    hidden = second.input_layernorm(first(hidden, position_embeddings=rotary, attention_mask=None))
    indexer = sparse_attentions(model)[0].indexer
    assert indexer is not None
    shape = (1, tokens, -1, HEAD_DIM)
    queries = indexer.q_norm(indexer.q_proj(hidden).view(shape))
    keys = indexer.k_norm(indexer.k_proj(hidden).view(shape))
    rotate: Callable[..., tuple[torch.Tensor, torch.Tensor]] = apply_rotary_pos_emb
    queries, keys = rotate(queries, keys, *rotary, unsqueeze_dim=2)
    return keys[0, :, 0], queries[0, -QUERIES:]


STRUCTURES = {
    "isotropic": Structure("keys and queries normally distributed, all independent: nothing stands out", isotropic),
    "language-like": Structure(
        f"keys: passages of {_PASSAGE_TOKENS} tokens on average, each on a topic (a point in {_RANK} dimensions) that "
        f"{_PASSAGES_OF_A_TOPIC} passages share on average, plus a moving average over {_PHRASE_TOKENS} tokens in the "
        f"same dimensions, mixed into {HEAD_DIM}, plus noise of each token, rows normed; {_OUTLIERS} of the channels "
        f"that are not rotated 10 to 30 times as large, of one sign, changing by a tenth; rotary position embedding on "
        f"{_ROTARY_DIM} of {HEAD_DIM} dimensions. Queries: the sum of an earlier key from anywhere and one of the "
        f"{_RECENT_TOKENS:,} tokens before, without their outliers, plus noise, rotated",
        language_like,
    ),
    "random model": Structure(
        "the first sparse layer's index keys and queries of the MiniMax-M3 code in transformers (norms, projections, "
        "rotary embedding on 32 of 128 dimensions, behind a layer of full attention), small and with random weights, "
        "over the bytes of this project's documentation",
        random_model,
        longest=32_768,
    ),
}
