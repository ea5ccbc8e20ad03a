"""The part of the vLLM plugin that needs no vLLM, what a configuration describes. The rest: `make test-vllm`."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from blockdex_kernels import IndexSpec, SpecError
from blockdex_vllm.model import num_sparse_layers, require, spec_of_rank
from blockdex_vllm.settings import Settings

SPARSE = {
    "sparse_num_index_heads": 4,
    "sparse_index_dim": 128,
    "sparse_block_size": 128,
    "sparse_topk_blocks": 16,
    "sparse_init_block": 0,
    "sparse_local_block": 1,
    "sparse_score_type": "max",
    "sparse_attention_freq": [0, 0, 0, *[1] * 57],
}


def text_config(**changed: Any) -> Any:
    return SimpleNamespace(num_hidden_layers=60, sparse_attention_config=SPARSE | changed)


@pytest.mark.parametrize(("ranks", "heads"), [(1, 4), (2, 2), (4, 1), (8, 1)])
def test_a_rank_has_its_share_of_the_heads(ranks: int, heads: int) -> None:
    spec = spec_of_rank(text_config(), tensor_parallel=ranks, max_model_len=1_048_576, fp8=True)
    assert spec == IndexSpec(num_layers=1, num_index_heads=heads, key_dtype="fp8_e4m3")


def test_forced_blocks_that_are_not_named_are_none() -> None:
    """The defaults of vLLM, where those of an `IndexSpec` are the model's."""
    config = text_config()
    del config.sparse_attention_config["sparse_local_block"]
    assert spec_of_rank(config, tensor_parallel=1, max_model_len=4096, fp8=False).local_blocks == 0


def test_a_model_that_cannot_be() -> None:
    with pytest.raises(SpecError, match=re.escape("must not exceed topk: 16 + 1 > 16")):
        spec_of_rank(text_config(sparse_init_block=16), tensor_parallel=1, max_model_len=4096, fp8=False)


def test_layers_of_a_draft_count_and_dense_ones_do_not() -> None:
    assert num_sparse_layers(text_config(), None) == 57
    assert num_sparse_layers(text_config(), SimpleNamespace(num_mtp_modules=3)) == 60
    assert num_sparse_layers(text_config(sparse_attention_freq=[0, 1, *[1] * 60]), None) == 59


def test_what_differs_is_refused_with_both_values() -> None:
    require("layer", heads=(4, 4))
    with pytest.raises(ValueError, match="layer: topk is 8, the model's configuration has 16"):
        require("layer", heads=(4, 4), topk=(8, 16))


@pytest.mark.parametrize("given", [{"verify": -0.1}, {"verify": True}, {"verify": "all"}, {"share": 1}, 3])
def test_settings_that_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(given["verify"] if "verify" in str(given) else given))):
        Settings.from_config({"blockdex": given})


def test_settings() -> None:
    assert Settings.from_config({"blockdex": {"verify": 0.01}}) == Settings(verify=0.01)
    assert Settings.from_config({}) == Settings.from_config(None) == Settings()
