"""The figures of an engine beside its server: that rows run, are checked, bounded and told."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.colocated import __main__ as colocated
from benchmarks.colocated.rows import ROWS, Row
from benchmarks.colocated.run import compile_client, measure, serving
from benchmarks.colocated.settings import FIRST_ID, Settings

SMALL = "--layers 2 --sequences 2 --tokens 2500 --steps 5 --clients 2 --prompt 600 --queries 64 --cache-bytes 64MiB"


def settings(folder: Path) -> Settings:
    numbers = dict.fromkeys(("core", "layers", "sequences", "tokens", "steps", "clients", "fleet_layers"), 1)
    words = dict.fromkeys(("grpc", "http", "socket", "device", "engine_device"), "")
    return Settings(folder=str(folder), prompt=1, queries=1, idle_seconds=0.1, **numbers, **words)  # type: ignore[arg-type]


def test_rows_of_c_clients_run_and_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    colocated.main([*SMALL.split(), *f"--rows c,region,ranks,fleet,channel --output {tmp_path}".split()])
    result = json.loads((tmp_path / "colocated-cpu.json").read_text(encoding="utf-8"))
    assert result["failed"] == {}
    assert list(result["parts"]) == ["c", "region", "ranks", "fleet"], "a CPU has no device channel"
    assert all(row["measured"] > 0 and row["target"] is None for row in result["rows"])
    assert {"command", "commit", "machine", "versions", "tokens"} <= result.keys()
    assert (tmp_path / "colocated-cpu.png").read_bytes().startswith(b"\x89PNG")
    assert "4 ranks of one head" in capsys.readouterr().out


@pytest.mark.slow
def test_rows_of_python_run(tmp_path: Path) -> None:
    colocated.main([*SMALL.split(), *f"--rows python,prefill --output {tmp_path}".split()])
    result = json.loads((tmp_path / "colocated-cpu.json").read_text(encoding="utf-8"))
    assert list(result["parts"]) == ["python", "prefill"] and not result["failed"]
    assert {"unary", "stream", "ring"} <= result["parts"]["python"].keys()


def test_a_wrong_answer_is_seen(tmp_path: Path) -> None:
    """What a client expects is changed by one bit: it says so, and prints no figure."""
    arguments = colocated.parsed([*SMALL.split(), "--clients=0"])
    with serving(arguments) as now:
        asked = Path(now.folder) / f"{FIRST_ID}.bin"
        data = bytearray(asked.read_bytes())
        data[-1] ^= 1
        asked.write_bytes(data)
        with pytest.raises(RuntimeError, match="layer 1: block ids differ"):
            measure(ROWS["c"], now)


def row(*command: str, seconds: float = 20.0) -> Row:
    def figures(numbers: dict[str, Any], settings: Settings) -> Any:
        raise NotImplementedError

    return Row(lambda settings: list(command), figures, seconds)


def test_a_row_is_ended_with_all_that_it_has_started(tmp_path: Path) -> None:
    nap = "import subprocess, sys; subprocess.run(['sleep', '60'])"
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"ended after 0\.5 s"):
        measure(row(sys.executable, "-c", nap, seconds=0.5), settings(tmp_path))
    assert time.monotonic() - began < 20, "the pipes of what it has started were waited for"
    with pytest.raises(RuntimeError, match="ended with 3: no GPU"):
        measure(
            row(sys.executable, "-c", "import sys; print('no GPU', file=sys.stderr); sys.exit(3)"), settings(tmp_path)
        )


def test_clients_end_where_nobody_serves(tmp_path: Path) -> None:
    compile_client(tmp_path / "client")
    shutil.copy(sys.executable, tmp_path / "1.bin")
    command = [str(tmp_path / "client"), str(tmp_path / "ring"), str(tmp_path), *"14411150"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "a client has failed" in done.stderr
