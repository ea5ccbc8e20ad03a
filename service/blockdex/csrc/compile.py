"""Compiles `blockdex._native`; imports nothing but the standard library, since it runs before anything is installed.

python service/blockdex/csrc/compile.py        beside the package, for a checkout
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGET = HERE.parent / "_native.abi3.so"
FLAGS = (
    *("-std=gnu11", "-O3", "-fno-trapping-math", "-fPIC", "-shared", "-fvisibility=hidden"),
    *("-Wall", "-Wextra", "-Wshadow", "-Wconversion"),
)


MACHINES = ("x86_64", "aarch64")


def supported() -> bool:
    """Whether there is anything to compile: the ring needs Linux, and a machine that it is tested for."""
    return platform.system() == "Linux" and platform.machine() in MACHINES


def compile_native(target: Path = TARGET, *options: str) -> Path:
    """Compiles the module.

    Args:
        target: where to.
        options: more of the compiler's.

    Raises:
        RuntimeError: there is no C compiler, or it fails; with what it says.
    """
    compiler = shlex.split(os.environ.get("CC", "cc"))
    includes = (f"-I{HERE}", f"-I{sysconfig.get_path('include')}", f"-I{HERE.parent / 'ring' / 'include'}")
    command = [*compiler, *FLAGS, *options, *includes, *map(str, sorted(HERE.rglob("*.c"))), "-o", str(target)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError(
            f"blockdex needs a C compiler to be built: {compiler[0]} is none (Debian: gcc). The client alone "
            "needs none: BLOCKDEX_WHEEL=any pip install ..."
        ) from None
    except subprocess.CalledProcessError as failure:
        words = failure.stderr
        raise RuntimeError(f"blockdex needs a C compiler and Python's headers to be built:\n{words}") from None
    return target


if __name__ == "__main__":
    # Another compiler than ours may find more to say, and a user's build does not end there.
    print(compile_native(TARGET, "-Werror"))
