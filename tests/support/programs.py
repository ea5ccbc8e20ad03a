"""Programs of others that tests run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
"""Where pip put the programs that it brings."""


def program(name: str, package: str) -> str:
    """The path of a program that a Debian package has; without it the test fails and says how to get it."""
    found = shutil.which(name)
    if found is None:
        pytest.fail(f"{name} is missing: make tools (as root), or apt-get install {package}", pytrace=False)
    return found


def run(*command: str | Path, text: str | None = None, seconds: float = 60) -> str:
    """Runs a command in the repository and returns its stdout; if it fails, the test does, with all that it says."""
    done = subprocess.run(
        command, cwd=REPOSITORY, input=text, capture_output=True, text=True, timeout=seconds, check=False
    )
    said = f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    assert done.returncode == 0, said
    return done.stdout


def run_module(name: str, *arguments: str, seconds: float = 60) -> str:
    """Runs a module of `support` in a Python of its own, which sees what this one sees."""
    folders = os.pathsep.join([str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")])
    command = ("env", f"PYTHONPATH={folders}", sys.executable, "-X", "faulthandler", "-m", name)
    return run(*command, *arguments, seconds=seconds)
