"""The ring's socket: whose the links of other users are, what is refused, and that the file is read anew."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import blockdex
from support.credentials import TOKENS, Papers
from support.processes import eventually
from support.serving import SMALL, Serving, serve

USER = """
[[users]]
user = {user}
tenant = "engine-a"
"""


@pytest.mark.parametrize("processes", ["single", "split"])
def test_a_link_has_the_tenant_of_its_user_until_the_file_says_otherwise(processes: str, tmp_path: Path) -> None:
    papers = Papers(tmp_path)
    papers.write_access(more=USER.format(user=os.getuid()))
    flags = ("--access-file", papers.path("access.toml"), "--processes", processes)
    with (
        serve(*SMALL, *flags) as serving,
        blockdex.Client(serving.grpc_address, token=TOKENS["engine-a"], transport="ring") as me,
        blockdex.Client(serving.grpc_address, token=TOKENS["engine-a"]) as same,
        blockdex.Client(serving.grpc_address, token=TOKENS["engine-b"]) as other,
    ):
        me.open_sequence(1)
        assert same.get_sequence(1).lengths == (0, 0, 0)
        with pytest.raises(blockdex.NotFoundError):
            other.get_sequence(1)
        with (
            blockdex.Client(
                serving.grpc_address, token=TOKENS["engine-b"], tenant="engine-b", transport="ring"
            ) as another,
            pytest.raises(blockdex.UnauthenticatedError, match="'engine-b' is not the caller's, 'engine-a' is"),
        ):
            another.get_sequence(1)

        papers.write_access(more=USER.format(user=os.getuid()).replace("engine-a", "engine-b"))
        serving.process.send_signal(signal.SIGHUP)

        def is_another() -> bool:
            try:
                me.get_sequence(1)
            except (blockdex.NotFoundError, blockdex.UnavailableError):
                return True
            return False

        eventually(is_another, "links of what the file said before are ended")
        with pytest.raises(blockdex.NotFoundError):
            me.get_sequence(1)
        me.open_sequence(1)
        assert other.get_sequence(1).lengths == (0, 0, 0)


ASKING = """
import os, sys
from blockdex import _native  # which the other user may not read
if int(sys.argv[2]) != os.getuid():
    os.setgroups([int(sys.argv[3])])
    os.setgid(int(sys.argv[2]))
    os.setuid(int(sys.argv[2]))
try:
    _native.RingConnection(sys.argv[1], "", 10.0, 4, 8, 1 << 20).close()
    print("let in")
except OSError as error:
    print(type(error).__name__, error)
"""


def asked_by(serving: Serving, user: int, group: int = 4999) -> str:
    """What becomes of a link of another user, where this one may be it."""
    command = (sys.executable, "-c", ASKING, str(serving.socket), str(user), str(group))
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


def test_other_users_take_an_entry_of_their_own_or_their_group(tmp_path: Path) -> None:
    """Where the tests run as root others can be had; else who runs them is known, and nobody else can be."""
    known = 4343 if os.getuid() == 0 else os.getuid()
    shared = 4242 if os.getuid() == 0 else os.getgid()
    papers = Papers(tmp_path)
    papers.write_access(
        more=USER.format(user=known)
        + f"""
[[groups]]
group = {shared}
tenant = "engine-b"
"""
    )
    with serve(*SMALL, "--access-file", papers.path("access.toml"), "--socket-group", str(shared)) as serving:
        serving.socket.parent.chmod(0o755)
        serving.socket.chmod(0o666)  # so that the file keeps nobody out, and the server alone does
        assert asked_by(serving, known) == "let in"
        if os.getuid() == 0:
            assert asked_by(serving, 4444, shared) == "let in"
            assert asked_by(serving, 4444) == (
                "PermissionError link: the server does not know user 4444 of this host: "
                "use one of its access file, or add this one"
            )
