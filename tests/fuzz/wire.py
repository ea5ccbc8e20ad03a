"""The wire's reader under libFuzzer, with gcc's count of the lines that a corpus comes to."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

from support.c_programs import CSRC, PACKAGE
from support.programs import program, run

HERE = Path(__file__).parent
CORPUS = HERE / "wire.corpus"
"""Small inputs, one behind the other, an u16 of length before each."""
_SOURCES = (HERE / "wire.c", CSRC / "wire" / "messages.c", CSRC / "wire" / "request_codec.c")
_INCLUDES = ("-std=gnu11", "-g", f"-I{CSRC}", f"-I{PACKAGE / 'ring' / 'include'}")
_SANITIZED = ("-O1", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=undefined")
_MOST_BYTES = 4096


def fuzz(folder: Path, seconds: int, seed: int = 1) -> int:
    """Runs it for so long, beginning with the corpus in a folder, which grows; how many inputs there were.

    Raises:
        AssertionError: an input was found that ends it, which lies in the folder beside the corpus.
    """
    target, corpus = folder / "wire", folder / "corpus"
    run(program("clang", "clang libclang-rt-dev"), *_INCLUDES, *_SANITIZED, *_SOURCES, "-o", target, seconds=120)
    if not corpus.exists():
        corpus.mkdir()
        for number, each in enumerate(inputs()):
            (corpus / str(number)).write_bytes(each)
    options = (f"-max_total_time={seconds}", f"-max_len={_MOST_BYTES}", f"-seed={seed}", "-print_final_stats=1")
    command: list[str | Path] = [target, *options, f"-artifact_prefix={folder}/", corpus]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds + 120)
    assert done.returncode == 0, done.stderr[-4000:]
    (count,) = re.findall(r"number_of_executed_units: (\d+)", done.stderr)
    return int(count)


def lines_reached(folder: Path) -> dict[str, float]:
    """Share of the lines of each source that a corpus comes to, in percent."""
    counting = folder / "counting"
    main = folder / "main.c"
    main.write_text(_MAIN, encoding="ascii")
    flags = ("-O0", "--coverage", "-DNDEBUG")
    run(program("gcc", "build-essential"), *_INCLUDES, *flags, *_SOURCES, main, "-o", counting, seconds=120)
    files = sorted((folder / "corpus").iterdir())
    for first in range(0, len(files), 500):
        run(counting, *files[first : first + 500])
    said = run("gcov", "-n", *(f"{counting}-{source.stem}.gcda" for source in _SOURCES[1:]))
    found = re.findall(r"File '[^']*/(wire/\w+\.c)'\nLines executed:([\d.]+)%", said)
    return {name: float(percent) for name, percent in found}


def inputs() -> list[bytes]:
    """The corpus."""
    data, found = CORPUS.read_bytes(), []
    while data:
        (size,) = struct.unpack_from("<H", data)
        found.append(data[2 : 2 + size])
        data = data[2 + size :]
    return found


_MAIN = """
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);
int main(int argc, char **argv) {
    static uint8_t bytes[1 << 16];
    for (int at = 1; at < argc; at++) {
        FILE *file = fopen(argv[at], "rb");
        if (!file) return 2;
        LLVMFuzzerTestOneInput(bytes, fread(bytes, 1, sizeof bytes, file));
        fclose(file);
    }
    return 0;
}
"""
