"""What the plugin refuses, with both numbers, and that vLLM is left as it was."""

from __future__ import annotations

import importlib.metadata
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.models.minimax_m3.common import indexer

from blockdex_kernels import IndexSpec
from blockdex_kernels.triton.foreign import ForeignBackend
from blockdex_vllm import plugin
from blockdex_vllm.selection import select_impl
from blockdex_vllm.settings import Settings
from engine import Engine, build_layers, config_of


def test_loading_twice_installs_once() -> None:
    assert indexer.select_indexer_impl_cls is select_impl
    plugin.register()
    assert indexer.select_indexer_impl_cls is select_impl


@pytest.mark.parametrize("version", ["0.32.1", "0.330.0", "1.0.0"])
def test_another_version_of_vllm_is_left_alone(
    version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    monkeypatch.setattr(indexer, "select_indexer_impl_cls", original := object())
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    plugin.register()
    assert indexer.select_indexer_impl_cls is original
    assert f"is for vLLM 0.33, got {version}: vLLM keeps its own indexer" in caplog.text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_index_heads": 1}, "num_index_heads is 1, the model's configuration has 2"),
        ({"num_kv_heads": 4}, "num_kv_heads is 4, the model's configuration has 2"),
        ({"index_head_dim": 64}, "head_dim is 64, the model's configuration has 128"),
        ({"sparse_block_size": 64}, "block_size is 64, the model's configuration has 128"),
        ({"topk_blocks": 8}, "topk is 8, the model's configuration has 4"),
        ({"init_blocks": 1}, "init_blocks is 1, the model's configuration has 0"),
        ({"local_blocks": 2}, "local_blocks is 2, the model's configuration has 1"),
        ({"score_type": "mean"}, "score is mean, the model's configuration has max"),
        (
            {"topk_indices_buffer": torch.zeros(2, 4096, 4, dtype=torch.int32)},
            r"topk_indices_buffer must be \[tokens, 2, 4\], got \[2, 4096, 4\]",
        ),
        (
            {"topk_indices_buffer": torch.zeros(2, 4096, 4, dtype=torch.int32).transpose(0, 1)},
            r"must be \[tokens, 2, 4\], got \[4096, 2, 4\], strides \(4, 16384, 1\)",
        ),
    ],
)
def test_a_layer_that_is_not_the_models(model_dir: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_layers(config_of(model_dir), **changed)


@pytest.mark.parametrize(
    ("sparse", "message"),
    [
        ({"sparse_topk_blocks": 65}, "topk of at most 64, got 65"),
        ({"sparse_index_dim": 96}, "head_dim 16, 32, 64, 128, 256, got 96"),
        ({"sparse_init_block": 3, "sparse_local_block": 2}, r"must not exceed topk: 3 \+ 2 > 4"),
        ({"sparse_score_type": "mean"}, "score must be 'max', got 'mean'"),
    ],
)
def test_a_model_that_the_kernels_are_not_made_for(model_dir: Path, sparse: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(config_of(model_dir, sparse=sparse))


def test_layers_are_counted(model_dir: Path) -> None:
    """The first layer has no indexer: the model has two, not three."""
    engine = Engine(config_of(model_dir))
    assert [layer.index_cache.prefix.split(".")[2] for layer in engine.layers] == ["1", "2"]
    context = engine.config.compilation_config.static_forward_context
    del context[engine.layers[1].index_cache.prefix]
    with pytest.raises(ValueError, match="layers_with_an_indexer is 1, the model's configuration has 2"):
        type(engine.builder)(engine.builder.kv_cache_spec, [], engine.config, engine.device)


def test_settings(model_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"verify must be a number from 0 to 1, got 2"):
        build_layers(config_of(model_dir, additional={"blockdex": {"verify": 2}}))
    with pytest.raises(ValueError, match=r"may hold verify, got {'verfy': 0.1}"):
        Settings.from_config({"blockdex": {"verfy": 0.1}})
    assert Settings.from_config({}) == Settings(verify=0.0)


def test_what_vllm_refuses_stays_refused(model_dir: Path) -> None:
    with set_current_vllm_config(config_of(model_dir)), pytest.raises(NotImplementedError, match="nvfp4"):
        select_impl(topk_blocks=4, indexer_kv_dtype="nvfp4")


def test_pages_and_queries_of_another_kind() -> None:
    spec = IndexSpec(num_layers=1, num_index_heads=2, topk=4)
    with pytest.raises(ValueError, match=r"must be torch.bfloat16 \[pages, 128, 128\], got torch.float32"):
        ForeignBackend(spec, torch.zeros(3, 128, 128))
    with pytest.raises(ValueError, match="each must be dense"):
        ForeignBackend(spec, torch.zeros(3, 128, 256, dtype=torch.bfloat16)[:, :, :128])
