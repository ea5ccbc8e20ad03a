"""The core's admission under a coverage-guided fuzzer: a copy of the package, instrumented by clang, and atheris."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from support.c_programs import PACKAGE
from support.programs import REPOSITORY, program, run

_COMPILER = "clang -fsanitize=fuzzer-no-link,address -g"


def fuzz(folder: Path, seconds: int, seed: int = 1) -> tuple[int, int, int]:
    """Runs it for so long; how many inputs there were, and how many edges of the compiled module, reached and in all.

    Raises:
        AssertionError: an input was found that ends it, which lies in the folder.
    """
    program("clang", "clang libclang-rt-dev")
    copied, corpus = folder / "blockdex", folder / "slots"
    shutil.copytree(PACKAGE, copied, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    run("env", f"CC={_COMPILER}", sys.executable, copied / "csrc" / "compile.py", seconds=300)
    corpus.mkdir()
    sanitizer = Path(sysconfig.get_path("platlib"), "asan_with_fuzzer.so")
    libraries = f"{sanitizer} {run('gcc', '-print-file-name=libstdc++.so.6').strip()}"
    variables = {
        "LD_PRELOAD": libraries,
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": f"{folder}:{REPOSITORY / 'tests'}:{REPOSITORY}",
    }
    options = (f"-max_total_time={seconds}", "-max_len=4096", f"-seed={seed}", "-print_final_stats=1")
    command = [sys.executable, "-m", "fuzz.admission", *options, f"-artifact_prefix={folder}/", str(corpus)]
    done = subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, check=False, timeout=seconds + 120
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    (count,) = re.findall(r"number_of_executed_units: (\d+)", done.stderr)
    (edges,) = re.findall(r"Loaded 1 modules +\((\d+) inline", done.stderr)
    return int(count), int(re.findall(r"cov: (\d+)", done.stderr)[-1]), int(edges)
