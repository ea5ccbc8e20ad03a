"""Faults of what reads and writes messages."""

from __future__ import annotations

from mutants.mutant import Mutant

_PROTOBUF, _MESSAGES, _CODEC = "csrc/wire/protobuf.h", "csrc/wire/messages.c", "csrc/wire/request_codec.c"
_LINK = ("ring/test_link.py",)

MUTANTS = (
    Mutant("bytes behind the end are read", _PROTOBUF, " || size > (uint64_t)(cursor->end - cursor->at)", "", _LINK),
    Mutant(
        "a number behind the end is read", _PROTOBUF, "    if (cursor->end - cursor->at < 8) return false;\n", "", _LINK
    ),
    Mutant("a number beyond 64 bits", _PROTOBUF, "        if (count == 9 && byte > 1) return false;\n", "", _LINK),
    Mutant("columns run over", _MESSAGES, "if (count < spans->most) spans->columns", "spans->columns", _LINK),
    Mutant(
        "columns of different lengths",
        _CODEC,
        "if (counts[STARTS] != count || counts[LENGTHS] != count ||",
        "if (",
        _LINK,
    ),
    Mutant("more spans than there is room for", _CODEC, "    if (count > spans->most)\n", "    if (0)\n", _LINK),
)
