"""`blockdex plan` against numbers worked out by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from blockdex.cli.main import main
from blockdex.contract.sizes import automatic_cache_bytes
from blockdex.server.config import load_settings
from blockdex_kernels.triton import SCORE_BYTES


def _planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["plan", *words, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert isinstance(made, dict)
    return made


def _fit(made: dict[str, Any], key_dtype: str) -> dict[str, Any]:
    (fit,) = [fit for fit in made["fits"] if fit["key_dtype"] == key_dtype]
    return dict(fit)


def test_the_defaults_are_the_model_s(capsys: pytest.CaptureFixture[str]) -> None:
    made = _planned(capsys, "--tokens", "2M", "--gpu", "141GB")
    # 2,000,000 tokens are at least two sequences of at most 1,048,576; all but one end in a page of a single token:
    # (2,000,000 - 2) // 128 + 2 = 15,624 + 2.
    assert (made["tokens"], made["sequences"], made["pages"]) == (2_000_000, 2, 15_626)
    assert made["gpu_cache_bytes"] == 126_900_000_000
    # 57 x 128 x 2 = 14,592; x 128 = 1,867,776; 126,900,000,000 // 1,867,776 = 67,941 pages of 128 tokens.
    assert _fit(made, "bf16") == {
        "key_dtype": "bf16",
        "bytes_per_token": 14_592,
        "bytes_per_page": 1_867_776,
        "cache_bytes": 29_185_867_776,
        "capacity_tokens": 8_696_448,
        "gpus": 1,
    }
    # Half of each; 126,900,000,000 // 933,888 = 135,883.
    assert _fit(made, "fp8_e4m3") == {
        "key_dtype": "fp8_e4m3",
        "bytes_per_token": 7_296,
        "bytes_per_page": 933_888,
        "cache_bytes": 14_592_933_888,
        "capacity_tokens": 17_393_024,
        "gpus": 1,
    }
    assert made["engine_bytes"] == {"4": 116_736_000_000, "8": 233_472_000_000}
    # 29,185,867,776 / 1,048,576 = 27,833.8
    assert made["command"] == "blockdex serve --cache-bytes 27834MiB"


def test_several_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    made = _planned(capsys, "--tokens", "12M", "--gpu", "141GB", "--sequences", "12")
    # (12,000,000 - 12) // 128 + 12 = 93,749 + 12 pages over 67,941 a GPU, or 135,883 in fp8.
    assert made["pages"] == 93_761
    assert _fit(made, "bf16")["gpus"] == 2
    assert _fit(made, "fp8_e4m3")["gpus"] == 1
    # 126,900,000,000 // 1,048,576 = 121,021.
    assert made["command"] == "blockdex serve --cache-bytes 121021MiB"


def test_many_short_sequences_waste_the_rest_of_their_last_pages(capsys: pytest.CaptureFixture[str]) -> None:
    assert _planned(capsys, "--tokens", "1k", "--sequences", "1")["pages"] == 8
    assert _planned(capsys, "--tokens", "1k", "--sequences", "1000")["pages"] == 1000
    # 129 + 1 + 1 + 1: two pages, and one for each of the others.
    assert _planned(capsys, "--tokens", "132", "--sequences", "4")["pages"] == 5


def test_a_model_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps({"index_head_dim": 64, "index_block_size": 64, "layer_types": ["minimax_m3_sparse", "full"] * 10})
    )
    flags = ("--key-dtype", "fp8_e4m3", "--model-config", str(config))
    made = _planned(capsys, "--tokens", "1M", *flags)
    assert _fit(made, "fp8_e4m3")["bytes_per_token"] == 10 * 64
    assert _fit(made, "bf16")["bytes_per_page"] == 10 * 64 * 64 * 2
    # 15,625 pages of 40,960 bytes are 640,000,000: 610.4 MiB.
    assert made["command"] == f"blockdex serve --cache-bytes 611MiB {' '.join(flags)}"
    made = _planned(capsys, "--tokens", "1M", "--num-layers", "11", *flags)
    assert _fit(made, "fp8_e4m3")["bytes_per_token"] == 11 * 64
    assert made["command"].endswith("--num-layers 11")


def test_the_command_starts_a_server_of_that_capacity(capsys: pytest.CaptureFixture[str]) -> None:
    made = _planned(capsys, "--tokens", "3.5M", "--key-dtype", "fp8_e4m3", "--num-layers", "58")
    settings = load_settings(made["command"].split()[2:])
    spec = settings.index_spec()
    assert isinstance(settings.cache_bytes, int)
    assert settings.cache_bytes // spec.bytes_per_page >= made["pages"]
    assert settings.cache_bytes < made["pages"] * spec.bytes_per_page + 2**20


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--tokens", "12M", "--gpu", "141GB"]) == 0
    printed = capsys.readouterr().out
    assert "tokens that fit on one GPU         8,696,448      17,393,024\n" in printed
    assert "  8 ranks  1,400.83 GB, 8.0 times the bf16 cache\n" in printed
    assert "Spread the sequences over 2 servers" in printed
    assert printed.endswith("With --key-dtype fp8_e4m3 1 would do.\n")


def test_a_gpu_that_holds_no_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert _planned(capsys, "--tokens", "1", "--gpu", "807MB")["command"] is None
    assert main(["plan", "--tokens", "1", "--gpu", "807MB"]) == 0
    printed = capsys.readouterr().out
    assert "GPUs for the wanted tokens      no page fits               1\n" in printed
    assert printed.endswith("Not a single page fits in bf16.\n")


def test_what_auto_leaves_free() -> None:
    """On a small GPU what the kernels work in is more than a tenth."""
    assert automatic_cache_bytes(141 * 10**9) == 126_900_000_000
    assert automatic_cache_bytes(4 << 30) == (4 << 30) - SCORE_BYTES - (256 << 20)
    assert automatic_cache_bytes(100) == 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "blockdex plan: the following arguments are required: --tokens\n"),
        (["--tokens", "2X"], "blockdex plan: argument --tokens: must be a whole number of at least 1, with k, M or G"),
        (["--tokens", "0"], "blockdex plan: argument --tokens: must be a whole number of at least 1"),
        (["--tokens", "0.5"], "blockdex plan: argument --tokens: must be a whole number of at least 1"),
        (["--tokens", "1M", "--gpu", "huge"], "blockdex plan: argument --gpu: must be bytes, or a number with kB"),
        (["--tokens", "1M", "--num-layers", "0"], "blockdex plan: num_layers must be an integer of at least 1, got 0"),
        (
            ["--tokens", "2M", "--sequences", "1"],
            "blockdex plan: sequences: 2000000 tokens are those of 2 to 2000000 sequences, got 1\n",
        ),
        (["--tokens", "1M", "--model-config", "nowhere.json"], "blockdex plan: nowhere.json: No such file"),
    ],
)
def test_what_cannot_be_planned_is_one_line(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *words])
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(line)
    assert printed.count("\n") == 1


def test_it_runs_without_torch() -> None:
    code = (
        "import sys; from blockdex.cli.sizing import plan; plan(['--tokens', '1M']); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
