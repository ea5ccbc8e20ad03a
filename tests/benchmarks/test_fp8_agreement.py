"""What an fp8 cache keeps of bf16's blocks: that it is counted right, and that keys have the structure they name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import fp8_agreement, tables
from benchmarks.fp8_agreement import OPEN_PLACES, ROUGHNESS, best, block_scores, compare, scorings
from benchmarks.structured_keys import HEAD_DIM, HEADS, QUERIES, STRUCTURES, isotropic, language_like
from blockdex_kernels import IndexSpec, reference
from blockdex_kernels.interface import Fp8Scoring
from blockdex_kernels.spec import KeyDtype
from support.built_site import DOCS

TOKENS = 4_096


def test_what_is_kept_and_lost() -> None:
    exact = torch.arange(20.0, 0.0, -1.0).expand(2, 3, 20)
    rounded = exact.clone()
    rounded[0, 0, [0, 14]] = -1.0
    kept, lost = compare(exact, rounded)
    expected = torch.ones(2, 3, OPEN_PLACES, dtype=torch.bool)
    expected[0, 0, [0, 14]] = False
    assert torch.equal(kept, expected)
    # Blocks that score 20 and 6 make room for 5 and 4, of 15 places, between 20 and 6.
    assert lost[0, 0].item() == pytest.approx((20 + 6 - 5 - 4) / 15 / 14)
    assert lost.flatten()[1:].abs().max() == 0


def test_equal_scores_go_to_the_lower_block() -> None:
    assert best(torch.zeros(1, 1, 30)).tolist() == [[list(range(OPEN_PLACES))]]


@pytest.mark.parametrize(
    ("key_dtype", "fp8_scoring"), [("bf16", "native"), ("fp8_e4m3", "native"), ("fp8_e4m3", "upcast")]
)
def test_the_blocks_are_those_that_the_reference_selects(key_dtype: KeyDtype, fp8_scoring: Fp8Scoring) -> None:
    keys, queries = language_like(TOKENS, 3)
    queries = queries[:, :1]
    spec = IndexSpec(num_layers=1, key_dtype=key_dtype)
    judge = reference.select(keys, queries, TOKENS - QUERIES, spec, fp8_scoring=fp8_scoring)
    ours = best(block_scores(keys, queries, key_dtype, fp8_scoring))
    forced = torch.full((QUERIES, 1, 1), TOKENS // 128 - 1)
    reference.count_flips(torch.cat([ours, forced], dim=2), judge.block_ids, judge)


def test_rough_sums_stay_within_what_was_measured() -> None:
    keys, queries = isotropic(TOKENS, 0)
    scored = dict(scorings(keys, queries, 0))
    error = (scored["native, rough sums"] - scored["native"]).abs() / queries.float().norm(dim=2, keepdim=True)
    error /= keys.float().norm(dim=1).max()
    assert 0.99 * ROUGHNESS < error.max() < 1.01 * ROUGHNESS


@pytest.mark.parametrize("structure", STRUCTURES)
def test_keys_and_queries_of_every_structure(structure: str) -> None:
    keys, queries = STRUCTURES[structure].make(TOKENS, 0)
    assert keys.shape == (TOKENS, HEAD_DIM) and queries.shape == (QUERIES, HEADS, HEAD_DIM)
    assert keys.dtype == queries.dtype == torch.bfloat16
    again, _ = STRUCTURES[structure].make(TOKENS, 0)
    other, _ = STRUCTURES[structure].make(TOKENS, 1)
    assert torch.equal(keys, again) and not torch.equal(keys, other)


def test_language_like_keys_are_as_described() -> None:
    keys = language_like(TOKENS, 0)[0].float()
    channels = keys.abs().median(dim=0).values
    large = channels.topk(4).indices
    assert channels[large].min() > 9 and channels[large].max() < 31
    assert channels.topk(5).values[4] < 1.5
    keys[:, large] = 0
    next_to = torch.cosine_similarity(keys[:-1], keys[1:]).mean()
    far_from = torch.cosine_similarity(keys[:-2_000], keys[2_000:]).mean()
    assert next_to > 0.4 and next_to > far_from + 0.3


@torch.inference_mode()
def test_the_random_model_selects_what_its_own_indexer_does() -> None:
    from examples.transformers_engine.model import build_model, sparse_attentions

    tokens = 2_560
    text = b"".join(path.read_bytes() for path in sorted(DOCS.glob("*.md")))[:tokens]
    model = build_model("cpu")
    indexer = sparse_attentions(model)[0].indexer
    assert indexer is not None
    selected: list[torch.Tensor] = []
    indexer.register_forward_hook(lambda module, inputs, output: selected.append(output))
    model(input_ids=torch.tensor([list(text)]), use_cache=False)
    own = selected[0][0, :, -QUERIES:].transpose(0, 1)
    keys, queries = STRUCTURES["random model"].make(tokens, 0)
    judge = reference.select(keys, queries, tokens - QUERIES, IndexSpec(num_layers=1))
    assert reference.count_flips(own, judge.block_ids, judge) < 4


def test_a_run_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "fp8_agreement.json"
    fp8_agreement.main(f"--tokens {TOKENS} --sequences 1 --output {output}".split())
    result = json.loads(output.read_text(encoding="utf-8"))
    assert result["structures"].keys() == STRUCTURES.keys() == {row["structure"] for row in result["rows"]}
    assert len(result["rows"]) == 3 * len(STRUCTURES)
    for row in result["rows"]:
        assert row["selections"] == QUERIES * HEADS
        assert 0.85 < row["kept"] < row["kept_with_local"] < 1, "fp8 exchanges some blocks and keeps most"
        assert row["kept_least"] < row["kept"] and row["unchanged"] < 1
        assert 0 < row["lost"] < 0.02 and row["lost"] < row["lost_most"] < 0.3
    assert output.with_suffix(".png").stat().st_size > 10_000
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.measured().count(f"| language-like | {TOKENS:,} | ") == 3
