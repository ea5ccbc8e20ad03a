"""The indexer of one model: the numbers that every kernel, cache and request is checked against."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

KeyDtype = Literal["bf16", "fp8_e4m3"]

KEY_DTYPE_BYTES: dict[str, int] = {"bf16": 2, "fp8_e4m3": 1}

# config.json fields of the two spellings in use: the model's own `sparse_attention_config` and the flat one.
_NESTED_FIELDS = {
    "sparse_num_index_heads": "num_index_heads",
    "sparse_index_dim": "head_dim",
    "sparse_block_size": "block_size",
    "sparse_topk_blocks": "topk",
    "sparse_init_block": "init_blocks",
    "sparse_local_block": "local_blocks",
    "sparse_score_type": "score",
}
_FLAT_FIELDS = {
    "index_n_heads": "num_index_heads",
    "index_head_dim": "head_dim",
    "index_block_size": "block_size",
    "index_topk_blocks": "topk",
    "index_init_blocks": "init_blocks",
    "index_local_blocks": "local_blocks",
    "index_score_type": "score",
}
_SPARSE_LAYER_TYPE = "minimax_m3_sparse"


class SpecError(ValueError):
    """An indexer that cannot be: the message names the field and the numbers."""


@dataclass(frozen=True, slots=True)
class IndexSpec:
    """The indexer of one model, fixed when the server starts; the defaults are MiniMax-M3's.

    Raises:
        SpecError: a field is out of bounds, or `init_blocks + local_blocks` exceeds `topk`.
    """

    num_layers: int = 57
    """L, sparse layers; a draft (MTP) layer is one more."""
    num_index_heads: int = 4
    """H, index heads, which share one index-key head."""
    head_dim: int = 128
    """D, elements of one key or query."""
    block_size: int = 128
    """Tokens of a block, which is also a cache page."""
    topk: int = 16
    """Blocks selected for a query, forced ones included."""
    init_blocks: int = 0
    """First blocks that every query selects."""
    local_blocks: int = 1
    """Last visible blocks that every query selects."""
    score: str = "max"
    """How the scores of a block's keys become its score."""
    scale: float | None = None
    """What returned scores are multiplied by; None stands for 1/sqrt(head_dim)."""
    key_dtype: KeyDtype = "bf16"
    """Element type of the cache."""
    max_sequence_tokens: int = 1_048_576
    """Longest sequence, in tokens."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_index_heads", "head_dim", "block_size", "topk", "max_sequence_tokens"):
            self._require_integer(name, minimum=1)
        for name in ("init_blocks", "local_blocks"):
            self._require_integer(name, minimum=0)
        if self.init_blocks + self.local_blocks > self.topk:
            forced = f"{self.init_blocks} + {self.local_blocks}"
            raise SpecError(f"init_blocks + local_blocks must not exceed topk: {forced} > {self.topk}")
        if self.score != "max":
            raise SpecError(f"score must be 'max', got {self.score!r}")
        if self.key_dtype not in KEY_DTYPE_BYTES:
            raise SpecError(f"key_dtype must be one of {', '.join(KEY_DTYPE_BYTES)}, got {self.key_dtype!r}")
        if self.scale is None:
            object.__setattr__(self, "scale", 1.0 / math.sqrt(self.head_dim))
        is_number = isinstance(self.scale, int | float) and not isinstance(self.scale, bool)
        if not (is_number and math.isfinite(self.score_scale) and self.score_scale > 0):
            raise SpecError(f"scale must be a positive finite number, got {self.scale!r}")
        if self.max_sequence_tokens >= 2**31:
            raise SpecError(f"max_sequence_tokens must be below 2^31, got {self.max_sequence_tokens}")

    def _require_integer(self, name: str, *, minimum: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise SpecError(f"{name} must be an integer of at least {minimum}, got {value!r}")

    @property
    def score_scale(self) -> float:
        """`scale` as a number."""
        assert self.scale is not None
        return self.scale

    @property
    def max_blocks(self) -> int:
        """Blocks of the longest sequence."""
        return -(-self.max_sequence_tokens // self.block_size)

    @property
    def bytes_per_token(self) -> int:
        """Cache bytes of one token in all layers."""
        return self.num_layers * self.head_dim * KEY_DTYPE_BYTES[self.key_dtype]

    @property
    def bytes_per_page(self) -> int:
        """Cache bytes of one page: `[num_layers, block_size, head_dim]`."""
        return self.bytes_per_token * self.block_size

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> IndexSpec:
        """The indexer of a Hugging Face `config.json`, at its top or under `text_config`.

        Two spellings are read: `sparse_attention_config` with `sparse_*` fields (L = sum of `sparse_attention_freq`)
        and flat `index_*` fields (L = sparse entries of `layer_types`). A field that is absent keeps its default.

        Args:
            config: the parsed file.
            overrides: fields of `IndexSpec` that go before the file's; None stands for "not set".

        Raises:
            SpecError: neither spelling is there, or a value is out of bounds.
        """
        fields = _fields_of(config)
        fields.update({name: value for name, value in overrides.items() if value is not None})
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise SpecError(f"unknown field {unknown[0]!r}")
        return cls(**fields)

    @classmethod
    def from_file(cls, path: str | Path, **overrides: Any) -> IndexSpec:
        """`from_config` of a file.

        Raises:
            SpecError: the file cannot be read, is not a JSON object, or `from_config` refuses it.
        """
        try:
            config = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise SpecError(f"{path}: {error.strerror}") from error
        except ValueError as error:
            raise SpecError(f"{path}: not JSON: {error}") from error
        if not isinstance(config, dict):
            raise SpecError(f"{path}: not a JSON object")
        try:
            return cls.from_config(config, **overrides)
        except SpecError as error:
            raise SpecError(f"{path}: {error}") from error


def _fields_of(config: Mapping[str, Any]) -> dict[str, Any]:
    for place in (config, config.get("text_config")):
        if not isinstance(place, Mapping):
            continue
        nested = place.get("sparse_attention_config")
        if isinstance(nested, Mapping):
            fields = {ours: nested[theirs] for theirs, ours in _NESTED_FIELDS.items() if theirs in nested}
            if "sparse_attention_freq" in nested:
                fields["num_layers"] = _sum_of_flags("sparse_attention_freq", nested["sparse_attention_freq"])
            return fields
        fields = {ours: place[theirs] for theirs, ours in _FLAT_FIELDS.items() if theirs in place}
        if fields:
            if "layer_types" in place:
                if not isinstance(place["layer_types"], list):
                    raise SpecError(f"layer_types must be a list, got {place['layer_types']!r}")
                fields["num_layers"] = place["layer_types"].count(_SPARSE_LAYER_TYPE)
            return fields
    raise SpecError("no sparse_attention_config and no index_* field, at the top or under text_config")


def _sum_of_flags(name: str, flags: Any) -> int:
    if not isinstance(flags, list) or any(flag not in (0, 1) for flag in flags):
        raise SpecError(f"{name} must be a list of zeros and ones, got {flags!r}")
    return sum(flags)
