"""gRPC on a Unix socket: who may open the file, and whose sequences are theirs."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

import blockdex
from blockdex.cli.main import main
from support.credentials import TOKENS, Papers
from support.processes import eventually
from support.serving import SMALL, serve


@pytest.mark.parametrize("processes", ["single", "split"])
def test_the_server_s_user_comes_in_and_is_the_tenant_of_the_access_file(processes: str, tmp_path: Path) -> None:
    papers, path = Papers(tmp_path), tmp_path / "grpc"
    papers.write_access(more=f'\n[[users]]\nuser = {os.getuid()}\ntenant = "engine-a"\n')
    flags = ("--grpc-address", f"unix:{path}", "--access-file", papers.path("access.toml"), "--processes", processes)
    with serve(*SMALL, *flags) as serving:
        assert serving.grpc_address == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert main(["health", "--address", serving.grpc_address]) == 0
        with (
            blockdex.Client(serving.grpc_address) as me,
            blockdex.Client(serving.grpc_address, token=TOKENS["engine-b"]) as other,
            blockdex.Client(serving.grpc_address, token=TOKENS["engine-a"]) as same,
        ):
            me.open_sequence(1)
            with pytest.raises(blockdex.NotFoundError):
                other.get_sequence(1)
            assert same.get_sequence(1).lengths == (0, 0, 0)
            papers.write_access()

            def is_refused() -> bool:
                try:
                    me.get_sequence(1)
                except blockdex.UnauthenticatedError as error:
                    assert error.reason == blockdex.Reason.MISSING_CREDENTIALS
                    return True
                return False

            eventually(is_refused, "the user is known no more")
        if processes == "split":
            os.kill(serving.pids()[-1], 9)
            with blockdex.Client(serving.grpc_address, token=TOKENS["engine-a"], timeout=20) as again:
                eventually(lambda: again.get_sequence(1) is not None, "another frontend listens")
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()


def test_a_group_may_come_in_as_its_tenant(tmp_path: Path) -> None:
    papers, path = Papers(tmp_path), tmp_path / "grpc"
    group = os.getgroups()[-1] if os.getuid() else 4242
    papers.write_access(more=f'\n[[groups]]\ngroup = {group}\ntenant = "engine-a"\n')
    flags = (
        "--grpc-address",
        f"unix:{path}",
        "--socket-group",
        str(group),
        "--access-file",
        papers.path("access.toml"),
    )
    with serve(*SMALL, *flags) as serving:
        made = path.stat()
        assert (stat.S_IMODE(made.st_mode), made.st_gid) == (0o660, group)
        with blockdex.Client(serving.grpc_address) as member:
            member.open_sequence(1)
        with blockdex.Client(serving.grpc_address, token=TOKENS["engine-a"]) as same:
            same.close_sequence(1)


def test_a_file_that_is_there_is_replaced_only_where_a_dead_server_left_it(tmp_path: Path) -> None:
    path = tmp_path / "grpc"
    flags = (*SMALL, "--grpc-address", f"unix:{path}", "--processes", "single")
    path.write_text("precious", encoding="utf-8")
    with pytest.raises(AssertionError, match=r"grpc_address: .*/grpc is there and is no socket"), serve(*flags):
        pass
    assert path.read_text(encoding="utf-8") == "precious"
    path.unlink()
    with serve(*flags) as serving:
        with pytest.raises(AssertionError, match="grpc_address: another server listens on"), serve(*flags):
            pass
        with blockdex.Client(serving.grpc_address) as client:
            client.info()
        serving.process.kill()
        serving.wait()
    assert path.exists()
    with serve(*flags) as serving, blockdex.Client(serving.grpc_address) as client:
        client.info()
