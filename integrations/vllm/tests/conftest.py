"""vLLM's real package on the CPU: its kernels and ours run in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    # An empty list of devices is how vLLM is told that Triton may be used though no driver is active.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["VLLM_NO_USAGE_STATS"] = "1"

from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.models.minimax_m3.common.ops import index_topk
from vllm.plugins import load_general_plugins

from support.triton_device import DEVICE

if DEVICE.type == "cpu":
    # The autotuner measures on a GPU; the interpreter takes the configuration of the fewest blocks at once.
    for _kernel in (index_topk._topk_index_kernel, index_topk._topk_index_partial_kernel):
        del _kernel.fn.configs[:-1]


@pytest.fixture(scope="session", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The plugin as vLLM loads it, and a process group of one."""
    load_general_plugins()
    meeting = tmp_path_factory.mktemp("ranks") / "meeting"
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig(DEVICE.type))):
        parallel_state.init_distributed_environment(1, 0, f"file://{meeting}", 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1, backend="gloo")
    yield
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """An empty folder for a model's configuration."""
    return tmp_path
