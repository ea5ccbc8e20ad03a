"""Runs all mutants, or those whose name has a word: `python -m mutants [WORD ...]`. Fails where one survives."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import blockdex
from mutants import c_client, channel, client, core, pools, ring, simulation, wire
from mutants.mutant import Mutant

TESTS = Path(__file__).resolve().parent.parent
PACKAGE = Path(blockdex.__file__).parent
MUTANTS = (
    *ring.MUTANTS,
    *c_client.MUTANTS,
    *client.MUTANTS,
    *wire.MUTANTS,
    *core.MUTANTS,
    *pools.MUTANTS,
    *channel.MUTANTS,
    *simulation.MUTANTS,
)
_SECONDS = 240
_PROGRAMS = ("csrc/test_interleavings.py", "csrc/test_programs.py")
"""Tests that need neither the compiled module nor what other tests share: they compile programs of their own."""
_FAILED = 1
"""What pytest ends with where tests failed; other numbers say that it could not run them."""


def check(mutants: Iterable[Mutant]) -> None:
    """Checks that all of them can be made.

    Raises:
        ValueError: a text is not there, or not once; a test's file is not there.
    """
    for mutant in mutants:
        count = (PACKAGE / mutant.file).read_text(encoding="utf-8").count(mutant.old)
        if count != 1:
            raise ValueError(f"{mutant.name}: what it changes is {count} times in {mutant.file}, not once")
        for test in mutant.tests:
            if not (TESTS / test.partition("::")[0]).exists():
                raise ValueError(f"{mutant.name}: there is no {test}")


def quiet_compilers(folder: Path) -> Path:
    """A folder of compilers that are quick and warn of nothing: a mutant is to be caught by what it does."""
    folder.mkdir()
    for name in ("cc", "gcc"):
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec {shutil.which(name)} "$@" -w -O1\n', encoding="utf-8")
        script.chmod(0o755)
    return folder


def copy(mutant: Mutant | None, folder: Path) -> Path:
    """A copy of the package with the fault in it."""
    copied = folder / "blockdex"
    shutil.copytree(PACKAGE, copied, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if mutant is not None:
        file = copied / mutant.file
        file.write_text(file.read_text(encoding="utf-8").replace(mutant.old, mutant.new), encoding="utf-8")
    return copied


def build(copied: Path, environment: Mapping[str, str]) -> None:
    """Compiles a copy.

    Raises:
        RuntimeError: it does not compile.
    """
    command: list[str | Path] = [sys.executable, copied / "csrc" / "compile.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"it does not compile:\n{done.stderr}")


def catcher(mutant: Mutant | None, tests: Sequence[str], compilers: Path) -> str:
    """The test that fails or crashes with the fault, or that they hang; nothing where it survives.

    Raises:
        RuntimeError: it does not compile, or pytest cannot run the tests.
    """
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        environment = os.environ | {"PYTHONPATH": name, "PATH": f"{compilers}:{os.environ['PATH']}"}
        copied = copy(mutant, Path(name))
        options = ["-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", "--timeout=60"]
        if all(test.startswith(_PROGRAMS) for test in tests):
            options.append(f"--confcutdir={TESTS / 'csrc'}")
        else:
            build(copied, environment)
        command = [sys.executable, "-m", "pytest", *options, *(str(TESTS / test) for test in tests)]
        with subprocess.Popen(
            command, cwd=TESTS.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as running:
            try:
                said, _ = running.communicate(timeout=_SECONDS)
            except subprocess.TimeoutExpired:
                running.kill()
                return f"no end after {_SECONDS} s"
    if running.returncode < 0:
        return f"signal {-running.returncode}"
    if running.returncode > _FAILED:
        raise RuntimeError(f"{mutant.name if mutant else 'nothing'}: pytest ended with {running.returncode}:\n{said}")
    failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(.*)", said, re.MULTILINE)
    if failed:
        return failed[1]
    return said.strip().splitlines()[-1] if running.returncode else ""


def outcome(compilers: Path, mutant: Mutant) -> tuple[Mutant, str]:
    """A mutant, and what caught it."""
    caught = catcher(mutant, mutant.tests, compilers)
    print(f"{mutant.name} ({mutant.file}): {'caught by ' + caught if caught else 'SURVIVED'}", flush=True)
    return mutant, caught


def main() -> int:
    """Runs them; the number of those that survive."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="of the names of the mutants to run; all without any")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time")
    options = parser.parse_args()
    chosen = [each for each in MUTANTS if all(word in f"{each.name} {each.file}" for word in options.words)]
    check(chosen)
    tests = sorted({test for mutant in chosen for test in mutant.tests})
    with tempfile.TemporaryDirectory(prefix="compilers-") as name, ThreadPoolExecutor(options.jobs) as pool:
        compilers = quiet_compilers(Path(name, "bin"))
        if failed := catcher(None, tests, compilers):
            raise RuntimeError(f"the tests fail without any mutant: {failed}")
        survived = [mutant.name for mutant, caught in pool.map(partial(outcome, compilers), chosen) if not caught]
    print(f"{len(chosen) - len(survived)} of {len(chosen)} caught")
    return len(survived)


if __name__ == "__main__":
    sys.exit(main())
