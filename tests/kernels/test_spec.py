"""The spec: its defaults, each spelling of a model's config, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from blockdex_kernels import IndexSpec, SpecError

NESTED: dict[str, Any] = {
    "sparse_attention_config": {
        "use_sparse_attention": True,
        "sparse_attention_freq": [0, 0, 1, 1, 1, 0, 1],
        "sparse_num_index_heads": 2,
        "sparse_index_dim": 64,
        "sparse_block_size": 32,
        "sparse_topk_blocks": 8,
        "sparse_init_block": 1,
        "sparse_local_block": 2,
        "sparse_score_type": "max",
    }
}
FLAT: dict[str, Any] = {
    "layer_types": [
        "full_attention",
        "minimax_m3_sparse",
        "minimax_m3_sparse",
        "minimax_m3_sparse",
        "minimax_m3_sparse",
    ],
    "index_n_heads": 2,
    "index_head_dim": 64,
    "index_block_size": 32,
    "index_topk_blocks": 8,
    "index_init_blocks": 1,
    "index_local_blocks": 2,
    "index_score_type": "max",
}
SMALL = IndexSpec(num_layers=4, num_index_heads=2, head_dim=64, block_size=32, topk=8, init_blocks=1, local_blocks=2)


def test_defaults_are_those_of_minimax_m3() -> None:
    spec = IndexSpec()

    assert (spec.num_layers, spec.num_index_heads, spec.head_dim, spec.block_size, spec.topk) == (57, 4, 128, 128, 16)
    assert (spec.init_blocks, spec.local_blocks, spec.score, spec.key_dtype) == (0, 1, "max", "bf16")
    assert spec.score_scale == 1 / math.sqrt(128)
    assert (spec.max_sequence_tokens, spec.max_blocks) == (1_048_576, 8192)
    assert (spec.bytes_per_token, spec.bytes_per_page) == (57 * 128 * 2, 57 * 128 * 2 * 128)


def test_fp8_halves_the_bytes() -> None:
    assert IndexSpec(key_dtype="fp8_e4m3").bytes_per_token == 57 * 128


def test_a_last_block_that_is_not_full_counts() -> None:
    assert IndexSpec(max_sequence_tokens=129).max_blocks == 2


@pytest.mark.parametrize("fields", [NESTED, FLAT], ids=["sparse_attention_config", "index_fields"])
@pytest.mark.parametrize("place", ["top", "text_config"])
def test_each_spelling_is_read_in_each_place(fields: dict[str, Any], place: str) -> None:
    config = fields if place == "top" else {"model_type": "minimax_m3_vl", "text_config": fields}

    assert IndexSpec.from_config(config) == SMALL


def test_a_field_that_a_spelling_lacks_keeps_its_default() -> None:
    spec = IndexSpec.from_config({"index_n_heads": 8})

    assert spec == IndexSpec(num_index_heads=8)


def test_an_override_goes_before_the_file_and_none_does_not() -> None:
    spec = IndexSpec.from_config(NESTED, num_layers=5, key_dtype="fp8_e4m3", topk=None)

    assert (spec.num_layers, spec.key_dtype, spec.topk) == (5, "fp8_e4m3", 8)


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"text_config": FLAT}), encoding="utf-8")

    assert IndexSpec.from_file(path) == SMALL


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "no sparse_attention_config and no index_"),
    ],
)
def test_a_file_that_is_not_a_config_is_refused_by_name(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")

    with pytest.raises(SpecError, match=message) as refusal:
        IndexSpec.from_file(path)

    assert str(path) in str(refusal.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_blocks": 9, "local_blocks": 8}, "init_blocks + local_blocks must not exceed topk: 9 + 8 > 16"),
        ({"score": "mean"}, "score must be 'max', got 'mean'"),
        ({"key_dtype": "int8"}, "key_dtype must be one of bf16, fp8_e4m3, got 'int8'"),
        ({"num_layers": 0}, "num_layers must be an integer of at least 1, got 0"),
        ({"num_index_heads": 0}, "num_index_heads must be an integer of at least 1, got 0"),
        ({"head_dim": "128"}, "head_dim must be an integer of at least 1, got '128'"),
        ({"block_size": 128.0}, "block_size must be an integer of at least 1, got 128.0"),
        ({"topk": True}, "topk must be an integer of at least 1, got True"),
        ({"init_blocks": -1}, "init_blocks must be an integer of at least 0, got -1"),
        ({"local_blocks": -1}, "local_blocks must be an integer of at least 0, got -1"),
        ({"scale": 0.0}, "scale must be a positive finite number, got 0.0"),
        ({"scale": math.nan}, "scale must be a positive finite number, got nan"),
        ({"scale": "1"}, "scale must be a positive finite number, got '1'"),
        ({"max_sequence_tokens": 2**31}, "max_sequence_tokens must be below 2^31, got 2147483648"),
        ({"colour": 1}, "unknown field 'colour'"),
    ],
)
def test_what_cannot_be_is_refused_in_words(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as refusal:
        IndexSpec.from_config(FLAT | {"index_topk_blocks": 16}, **fields)

    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sparse_attention_config": {"sparse_score_type": "mean"}}, "score must be 'max', got 'mean'"),
        ({"sparse_attention_config": {"sparse_attention_freq": [0, 2]}}, "sparse_attention_freq must be a list of"),
        ({"sparse_attention_config": {"sparse_attention_freq": 3}}, "sparse_attention_freq must be a list of"),
        ({"sparse_attention_config": {"sparse_attention_freq": [0, 0]}}, "num_layers must be an integer of at least 1"),
        ({"index_n_heads": 4, "layer_types": 57}, "layer_types must be a list, got 57"),
        ({"index_n_heads": 4, "layer_types": ["full_attention"]}, "num_layers must be an integer of at least 1, got 0"),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_words(config: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        IndexSpec.from_config(config)
