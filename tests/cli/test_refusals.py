"""A server that cannot be: exit status 2, one line on stderr that says why, nothing left behind."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.serving import environment


def refused(*flags: str, before: str = "pass", **variables: str) -> str:
    """The one line of a `blockdex serve` that refuses to start."""
    program = f"import sys; {before}; from blockdex.cli.main import main; sys.exit(main())"
    ports = ("--grpc-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0")
    done = subprocess.run(
        [sys.executable, "-c", program, "serve", *ports, *flags],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def config(folder: Path, **attention: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps({"sparse_attention_config": attention}), encoding="utf-8")
    return str(path)


def test_unknown_flag() -> None:
    assert (
        refused("--cash-bytes", "3")
        == "blockdex serve: unrecognized arguments: --cash-bytes 3, did you mean --cache-bytes?"
    )


def test_bad_variable() -> None:
    assert refused(BLOCKDEX_DEVICE="gpu") == (
        "blockdex serve: BLOCKDEX_DEVICE: must be auto, cpu, cuda or cuda:N, got 'gpu'"
    )


def test_misspelt_variable() -> None:
    line = refused(BLOCKDEX_CASH_BYTES="2GiB")
    assert line.endswith("BLOCKDEX_CASH_BYTES: unknown setting in the environment, did you mean BLOCKDEX_CACHE_BYTES?")


@pytest.mark.parametrize("flag", ["--grpc-address", "--http-address"])
def test_port_in_use(flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert f"cannot listen on {address}: Address already in use" in refused(flag, address)


def test_address_of_another_machine() -> None:
    assert "cannot listen on 192.0.2.1:5000: Cannot assign requested address" in refused(
        "--grpc-address", "192.0.2.1:5000", "--insecure"
    )


def test_address_that_is_no_name() -> None:
    assert "cannot listen on a..b:5000: not a host name" in refused("--http-address", "a..b:5000")


def test_forced_blocks_beyond_topk(tmp_path: Path) -> None:
    path = config(tmp_path, sparse_topk_blocks=4, sparse_init_block=3, sparse_local_block=2)
    line = refused("--model-config", path)
    assert f"{path}: init_blocks + local_blocks must not exceed topk: 3 + 2 > 4" in line


def test_unknown_score_type(tmp_path: Path) -> None:
    assert "score must be 'max', got 'mean'" in refused("--model-config", config(tmp_path, sparse_score_type="mean"))


def test_unreadable_model_config(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{", encoding="utf-8")
    assert f"{path}: not JSON" in refused(BLOCKDEX_MODEL_CONFIG=str(path))


def test_cache_smaller_than_a_page() -> None:
    line = refused("--num-layers", "2", "--cache-bytes", "65535")
    assert "cache_bytes: one page takes 65536 bytes, got 65535" in line


def test_cache_larger_than_the_machine() -> None:
    line = refused("--device", "cpu", "--cache-bytes", "1048576TiB")
    said = re.search(r"cache_bytes: at most about (\d+) can be had on device cpu, got (\d+)", line)
    assert said is not None, line
    assert 2**20 < int(said[1]) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert int(said[2]) == 2**60


def test_cache_of_the_free_memory_of_a_gpu_on_the_cpu() -> None:
    assert "cache_bytes: auto is for a GPU, got device cpu; name a size instead" in refused(
        "--device", "cpu", "--cache-bytes", "auto"
    )


# As if torch were built without CUDA, whatever the machine has.
WITHOUT_CUDA = "import torch; torch.version.cuda = None"


def test_cache_of_the_free_memory_of_a_gpu_that_is_not_there() -> None:
    line = refused("--cache-bytes", "auto", before=WITHOUT_CUDA)
    assert "cache_bytes: auto is for a GPU, got device cpu (no GPU: torch is built without CUDA); name a size" in line


def test_device_that_is_not_there() -> None:
    assert "device cuda:99: torch is built without CUDA" in refused("--device", "cuda:99", before=WITHOUT_CUDA)


def test_line_for_machines() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        line = json.loads(refused("--log-format", "json", "--http-address", address))
    assert (line["level"], line["event"]) == ("error", "refused to start")
    assert line["reason"] == f"cannot listen on {address}: Address already in use"


@pytest.mark.parametrize("package", ["pydantic_settings", "fastapi", "torch"])
def test_client_alone_installed(package: str) -> None:
    line = refused("--num-layers", "2", before=f"sys.modules['{package}'] = None")
    assert line == f"blockdex serve: package '{package}' is missing: pip install 'blockdex[server]'"
