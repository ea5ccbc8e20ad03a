"""Programs of tests/csrc, as they are compiled: on this machine, under the sanitizers, and for ARM under qemu."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import blockdex
from support.programs import REPOSITORY, program, run

HERE = REPOSITORY / "tests" / "csrc"
PACKAGE = Path(blockdex.__file__).parent
CSRC = PACKAGE / "csrc"
FLAGS = ("-std=gnu11", "-Wall", "-Wextra", "-Werror", "-g", f"-I{CSRC}", f"-I{PACKAGE / 'ring' / 'include'}")


class Build(NamedTuple):
    """How a program is compiled and run.

    Attributes:
        compiler: its name, and the Debian package that has it.
        flags: beside the usual ones.
        runner: what runs the program.
    """

    compiler: tuple[str, str]
    flags: tuple[str, ...]
    runner: tuple[str, ...] = ()


GCC = ("gcc", "build-essential")
BUILDS = {
    "here": Build(GCC, ("-O2",)),
    "address and undefined": Build(GCC, ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")),
    # It knows no fences; these order what is atomic anyway. Its memory lies where random addresses may be in the way.
    "thread": Build(GCC, ("-O1", "-fsanitize=thread", "-Wno-tsan"), ("setarch", "-R")),
    "aarch64": Build(
        ("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu libc6-dev-arm64-cross"),
        ("-O2",),
        ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"),
    ),
}
SOURCES = {
    "ring_stress": ("ring/server.c",),
    "tables_test": ("ring/inflight.c",),
    "wire_test": ("wire/messages.c", "wire/request_codec.c"),
    "connect_test": (),
    "client_calls": (),
}
"""Programs, and what they have of the package."""

Built = Callable[[str], tuple[str, ...]]


def compiled(build: Build, name: str, folder: Path) -> tuple[str, ...]:
    """The command that runs a program, which is compiled when it is first asked for."""
    made = folder / name
    if not made.exists():
        sources = [HERE / f"{name}.c", *(CSRC / source for source in SOURCES[name])]
        run(program(*build.compiler), *FLAGS, *build.flags, *sources, "-pthread", "-o", made, seconds=120)
    return (*build.runner, str(made))
