"""The indexer that a model's configuration describes, and the refusal of another one."""

from __future__ import annotations

from typing import Any

from blockdex_kernels import IndexSpec


def spec_of_rank(text_config: Any, *, tensor_parallel: int, max_model_len: int, fp8: bool) -> IndexSpec:
    """What one tensor-parallel rank's layer selects: its heads of a model's indexer, and one layer.

    Args:
        text_config: the language model's Hugging Face configuration.
        tensor_parallel: ranks; those beyond the heads share them.
        max_model_len: longest sequence, in tokens.
        fp8: whether the index cache holds e4m3.

    Raises:
        SpecError: the configuration does not describe an indexer.
    """
    sparse = text_config.sparse_attention_config
    # Where vLLM and the configuration of a served model differ in a default, vLLM's counts.
    given = {"sparse_init_block": 0, "sparse_local_block": 0, **sparse}
    heads = max(1, given["sparse_num_index_heads"] // tensor_parallel)
    return IndexSpec.from_config(
        {"sparse_attention_config": given},
        num_layers=1,
        num_index_heads=heads,
        max_sequence_tokens=max_model_len,
        key_dtype="fp8_e4m3" if fp8 else "bf16",
    )


def num_sparse_layers(text_config: Any, draft_config: Any | None) -> int:
    """Layers that have an indexer: the model's sparse ones, and every layer of a multi-token-prediction draft."""
    flags = text_config.sparse_attention_config["sparse_attention_freq"][: text_config.num_hidden_layers]
    drafts: int = 0 if draft_config is None else draft_config.num_mtp_modules
    sparse: int = sum(flag != 0 for flag in flags)
    return sparse + drafts


def require(layer: str, **fields: tuple[Any, Any]) -> None:
    """Refuses what differs from the configuration.

    Args:
        layer: whose fields they are.
        fields: what is there, and what must be.

    Raises:
        ValueError: names the layer, the field and both values.
    """
    for name, (found, expected) in fields.items():
        if found != expected:
            raise ValueError(f"{layer}: {name} is {found}, the model's configuration has {expected}")
