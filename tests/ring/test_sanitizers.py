"""The compiled module under the sanitizers of gcc: no test of it reads or writes where it must not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import blockdex

ROOT = Path(__file__).parent.parent.parent
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g"
TESTS = ("scheduler", "ring", "csrc/test_native_calls.py")
ENDS_ITSELF = "tests/scheduler/test_core_faults.py::test_nobody_is_answered_twice_where_no_memory_is_left"
"""Where no memory is left the sanitizer ends the process, before anything else can be seen."""


def library(name: str) -> str:
    """Where gcc has a library."""
    return subprocess.run(
        ["gcc", f"-print-file-name={name}"], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables with which every Python loads a copy of the package whose module is instrumented."""
    copied = tmp_path_factory.mktemp("sanitized") / "blockdex"
    source = Path(blockdex.__file__).parent
    shutil.copytree(source, copied, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    compiler = os.environ | {"CC": f"gcc {FLAGS}"}
    subprocess.run([sys.executable, copied / "csrc" / "compile.py"], check=True, env=compiler, capture_output=True)
    return os.environ | {
        # The sanitizer has to be there first; torch throws exceptions, for which it needs to know who catches them.
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so.6')}",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(copied.parent),
        # Into files, since whoever catches what a test writes is ended with it.
        "ASAN_OPTIONS": f"detect_leaks=0:log_path={copied.parent}/report",
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={copied.parent}/report",
    }


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_nothing_is_found(environment: dict[str, str]) -> None:
    # What the sanitizer of undefined behaviour finds goes to the process's own stderr, which must not be captured.
    options = ["-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", "--timeout=300", "--capture=sys"]
    command = [sys.executable, "-m", "pytest", *options]
    paths = [f"--deselect={ENDS_ITSELF}", *(str(ROOT / "tests" / name) for name in TESTS)]
    done = subprocess.run([*command, *paths], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    reports = [file.read_text() for file in Path(environment["PYTHONPATH"]).glob("report*")]
    assert not reports, reports[0]
    assert done.returncode == 0, (done.stdout + done.stderr)[-12_000:]


@pytest.mark.slow
def test_it_is_the_instrumented_module_that_is_tested(environment: dict[str, str]) -> None:
    program = "from blockdex import _native; print(_native.__file__); print('asan' in open('/proc/self/maps').read())"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(Path(environment["PYTHONPATH"]) / "blockdex" / "_native.abi3.so"), "True"]
