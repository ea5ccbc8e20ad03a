"""`blockdex health`, `blockdex info` and what the command line says of itself."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

import blockdex
from blockdex.cli.main import main
from support.serving import Serving


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"blockdex {blockdex.__version__}\n"


def test_help_of_serve(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--help"])
    assert ended.value.code == 0
    assert "--cache-bytes SIZE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "blockdex: the following arguments are required: COMMAND\n"),
        (["fly"], "blockdex: argument COMMAND: invalid choice: 'fly'"),
        (["health", "--adress", "x"], "blockdex health: unrecognized arguments: --adress x, did you mean --address?\n"),
        (["info", "--addr", "x"], "blockdex info: unrecognized arguments: --addr x, did you mean --address?\n"),
        (
            ["plan", "--tokens", "1", "--gpus", "1"],
            "blockdex plan: unrecognized arguments: --gpus 1, did you mean --gpu?",
        ),
        (["info", "--timeout", "x"], "blockdex info: argument --timeout: invalid float value: 'x'\n"),
    ],
)
def test_what_cannot_be_run_is_one_line(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(line)
    assert printed.count("\n") == 1


def test_health_of_a_server_that_serves(server: Serving, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health", "--address", server.grpc_address]) == 0
    assert capsys.readouterr().out == "SERVING\n"


def test_the_address_comes_from_the_environment(
    server: Serving, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLOCKDEX_GRPC_ADDRESS", server.grpc_address)
    assert main(["health"]) == 0
    assert capsys.readouterr().out == "SERVING\n"


@pytest.mark.parametrize("command", ["health", "info"])
def test_nobody_there(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        assert main([command, "--address", address]) == 1
    assert capsys.readouterr().err.startswith(f"blockdex: {address}: UNAVAILABLE: ")


@pytest.mark.parametrize("command", ["health", "info"])
def test_somebody_there_who_does_not_answer(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert main([command, "--address", address, "--timeout", "0.3"]) == 1
    assert capsys.readouterr().err.startswith(f"blockdex: {address}: DEADLINE_EXCEEDED: ")


def test_info_as_text(server: Serving, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--address", server.grpc_address]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "device: cpu" in lines
    assert "  num_layers: 3" in lines
    assert "  init_blocks: 0" in lines
    assert any(line.startswith("  decode: ") for line in lines)


def test_info_as_json(server: Serving, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--address", server.grpc_address, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["epoch"] == str(server.event("serving")["epoch"])


def test_a_reader_that_has_seen_enough_ends_it_quietly(server: Serving) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "blockdex", "info", "--address", server.grpc_address]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
