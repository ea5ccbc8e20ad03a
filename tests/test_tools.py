"""The script that installs what the tests run, with an apt of its own: its lists, its locks, no sources."""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "tools.sh"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(30)]


def install(package: str, folder: Path) -> subprocess.Popen[str]:
    """The script, begun: a program is missing that the package has."""
    for name in ("lists/partial", "cache/archives/partial", "dpkg"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "dpkg/status").write_bytes(Path("/var/lib/dpkg/status").read_bytes())
    config = folder / "apt.conf"
    config.write_text(
        f'Dir::State::lists "{folder}/lists"; Dir::State::status "{folder}/dpkg/status"; '
        f'Dir::Cache "{folder}/cache"; Dir::Etc::sourcelist "/dev/null"; Dir::Etc::sourceparts "/dev/null";',
        encoding="utf-8",
    )
    return subprocess.Popen(
        ["/bin/sh", SCRIPT, f"no-such-program={package}"],
        env=os.environ | {"APT_CONFIG": str(config)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("lock", ["lists/lock", "cache/archives/lock", "dpkg/lock-frontend"])
def test_another_apt_is_waited_for(lock: str, tmp_path: Path) -> None:
    path = tmp_path / lock
    path.parent.mkdir(parents=True)
    with path.open("w") as held, install("dpkg", tmp_path) as running:
        fcntl.lockf(held, fcntl.LOCK_EX)
        assert running.stdout is not None
        assert running.stdout.readline() == "installing dpkg\n"
        assert running.stdout.readline() == "another apt runs: waiting for it\n"
        fcntl.lockf(held, fcntl.LOCK_UN)
        assert running.wait() == 0


def test_what_is_no_lock_fails_at_once(tmp_path: Path) -> None:
    with install("no-such-package", tmp_path) as running:
        said, wrong = running.communicate()
    assert running.returncode == 1
    assert said == "installing no-such-package\n"
    assert "no-such-package" in wrong
