"""The socket of `--socket`: who may use it, what becomes of its file, and what the server says of it."""

from __future__ import annotations

import grp
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest

import blockdex
from support.serving import SMALL, Serving, serve

MODES = ("--processes=single", "--processes=split")


def refused(path: Path, *flags: str) -> str:
    """What a server says that does not start."""
    ports = ("--grpc-address=127.0.0.1:0", "--http-address=127.0.0.1:0")
    command = (sys.executable, "-m", "blockdex", "serve", *SMALL, *ports, f"--socket={path}", *flags)
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    return ended.stderr


def one_call(address: str, sequence: int = 1) -> None:
    with blockdex.Client(address, transport="ring") as client:
        client.open_sequence(sequence)
        client.append_keys(0, sequences=sequence, keys=np.ones((2, 128), np.float32))
        client.close_sequence(sequence)


@pytest.mark.parametrize("mode", MODES)
def test_it_is_the_users_own_and_goes_with_the_server(mode: str) -> None:
    with serve(*SMALL, mode) as serving:
        assert stat.S_IMODE(serving.socket.stat().st_mode) == 0o600
        transports = ("grpc", f"ring:{serving.socket}")
        with blockdex.Client(serving.grpc_address) as client:
            assert client.info().transports == transports
        assert tuple(httpx.get(f"http://{serving.http_address}/v1/info").json()["transports"]) == transports
        one_call(serving.grpc_address)
        serving.stop()
        assert not serving.socket.exists()


def test_one_that_a_dead_server_has_left_is_replaced_and_a_live_one_is_not(server: Serving, tmp_path: Path) -> None:
    left = tmp_path / "left"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(left))
    with serve(*SMALL, "--socket", str(left)) as serving:
        one_call(serving.grpc_address)
        assert f"socket: another server listens on {left}" in refused(left)
        one_call(serving.grpc_address, sequence=2)


def test_what_is_no_socket_stays(tmp_path: Path) -> None:
    file = tmp_path / "notes"
    file.write_text("mine")
    assert f"socket: {file} is there and is no socket" in refused(file)
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("x" * 200, (), "socket: cannot listen on "),
        ("no/such/folder", (), "No such file or directory"),
        ("ring", ("--socket-group=no-such-group",), "there is no 'no-such-group' on this machine"),
    ],
)
def test_one_that_cannot_be(tmp_path: Path, name: str, flags: tuple[str, ...], words: str) -> None:
    assert words in refused(tmp_path / name, *flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", MODES)
def test_a_group_may_use_it_and_names_its_tenant(mode: str) -> None:
    group = grp.getgrgid(os.getgid()).gr_name
    with serve(*SMALL, mode, "--socket-group", group) as serving:
        found = serving.socket.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, os.getgid())
        one_call(serving.grpc_address)


def test_the_next_engine_core_takes_the_clients_of_the_last() -> None:
    with (
        serve(*SMALL, "--processes=split") as serving,
        blockdex.Client(serving.grpc_address, transport="ring") as client,
    ):
        client.open_sequence(1)
        os.kill(int(serving.event("serving")["core_pid"]), signal.SIGKILL)
        with pytest.raises(blockdex.FailedPreconditionError) as lost:
            client.get_sequence(1)
        assert lost.value.reason == blockdex.Reason.EPOCH_MISMATCH
        client.open_sequence(1)
        assert client.get_sequence(1).lengths == (0, 0, 0)
