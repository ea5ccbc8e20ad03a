"""The layout of the ring: the same in Python, in the C header and in the documentation."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from blockdex.ring import layout
from blockdex.ring.channel_layout import CONTROL, CONTROL_BYTES
from blockdex.ring.layout import ANSWER, HEADER, REQUEST, Field
from support.programs import REPOSITORY, program

INCLUDE = REPOSITORY / "service" / "blockdex" / "ring" / "include"
DOCUMENT = REPOSITORY / "docs" / "ring.md"
TYPES = {"B": "u8", "H": "u16", "I": "u32", "Q": "u64", "q": "i64", "d": "f64"}
RECORDS = {"Header": HEADER, "Request": REQUEST, "Answer": ANSWER, "Channel memory": CONTROL}


def compiled(source: Path, folder: Path) -> Path:
    """The program that gcc makes of a file; a warning is an error."""
    made = folder / source.stem
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O2", f"-I{INCLUDE}"]
    subprocess.run([program("gcc", "build-essential"), *flags, "-o", made, source], check=True, timeout=60)
    return made


@pytest.mark.parametrize("name", RECORDS)
def test_the_tables_of_the_documentation(name: str) -> None:
    section = DOCUMENT.read_text(encoding="utf-8").partition(f"### {name}\n")[2].partition("\n### ")[0]
    rows = re.findall(r"^\| (\d+) \| (\w+) \| `(\w+)` \| .+ \|$", section, re.MULTILINE)
    assert rows == [(str(field.offset), TYPES[field.code], field.name) for field in RECORDS[name]]


@pytest.mark.parametrize("fields", RECORDS.values(), ids=RECORDS)
def test_numbers_do_not_overlap_and_lie_at_multiples_of_their_size(fields: tuple[Field, ...]) -> None:
    end = 0
    for field in fields:
        assert field.offset >= end
        assert field.offset % field.size == 0
        end = field.offset + field.size
    assert end <= {HEADER: layout.HEADER_BYTES, CONTROL: CONTROL_BYTES}.get(fields, layout.SLOT_BYTES)


def test_the_numbers_of_the_c_header(tmp_path: Path) -> None:
    places = [
        f'printf("{name} {field.name} %zu %zu\\n", offsetof(struct blockdex_{name}, {field.name}), '
        f"sizeof ((struct blockdex_{name} *)0)->{field.name});"
        for name, fields in (("header", HEADER), ("request", REQUEST), ("answer", ANSWER))
        for field in fields
    ]
    names = ["OPEN", "GET", "FORK", "TRUNCATE", "CLOSE", "TOKENS", "CANCEL", "RETURN_SCORES", "WAIT_FOR_KEYS"]
    names += ["ROLLBACK", "RAW_SCORES", "SLOT_BYTES", "MAX_TENANT_BYTES", "MAX_REFUSAL_BYTES"]
    names += ["HAS_BLOCK_IDS", "HAS_SCORES", "HAS_LENGTHS", "IS_STATE", "VERSION"]
    values_of = [f'printf("{name} %d\\n", (int)BLOCKDEX_{name});' for name in names]
    source = tmp_path / "offsets.c"
    lines = ["#include <stdio.h>", '#include "blockdex_ring.h"', "int main(void) {", *places, *values_of, "}"]
    source.write_text("\n".join(lines), encoding="utf-8")
    said = subprocess.run([compiled(source, tmp_path)], check=True, capture_output=True, text=True, timeout=10).stdout
    expected = [
        f"{name} {field.name} {field.offset} {field.size}"
        for name, fields in (("header", HEADER), ("request", REQUEST), ("answer", ANSWER))
        for field in fields
    ]
    assert said.splitlines() == expected + [f"{name} {getattr(layout, name)}" for name in names]
