"""Faults of what reads and writes messages."""

from __future__ import annotations

from mutants.mutant import Mutant

_MESSAGES, _CODEC, _PROTOBUF = "csrc/wire/messages.c", "csrc/wire/request_codec.c", "csrc/wire/protobuf.h"
_LINK, _ANSWERS = ("ring/test_link_requests.py",), ("ring/test_link_answers.py",)

MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "bytes beyond the message's end",
        _PROTOBUF,
        " || size > (uint64_t)(cursor->end - cursor->at)) return false;",
        ") return false;",
        _LINK,
    ),
    Mutant(
        "a second header is taken",
        _MESSAGES,
        "message->type != BYTES || request->has_header",
        "message->type != BYTES",
        _LINK,
    ),
    Mutant(
        "a second tensor is taken",
        _MESSAGES,
        "message->type != BYTES || tensor->present",
        "message->type != BYTES",
        _LINK,
    ),
    Mutant("more spans than there is room for", _MESSAGES, "if (count < spans->most) spans", "spans", _LINK),
    Mutant("uneven columns", _CODEC, "    if (counts[STARTS] != count || ", "    if (", _LINK),
    Mutant("any dtype", _CODEC, " && dtype <= BLOCKDEX_FP8_E4M3) return true;", ") return true;", _LINK),
    Mutant("any order", _CODEC, "    if (selects && request->order > BLOCKDEX_SCORE)", "    if (false)", _LINK),
    Mutant("any message size", _CODEC, "    if (bytes > allowed)", "    if (false)", _LINK),
    Mutant(
        "queries where keys are",
        "ring/include/blockdex_ring.h",
        "(request->keys_region ? 0 : blockdex_aligned(request->keys_bytes))",
        "0",
        _LINK,
    ),
    Mutant(
        "a slice is copied again",
        _CODEC,
        "keys->data + written, bytes",
        "keys->data, bytes",
        ("ring/test_link_room.py",),
    ),
    Mutant("revisions of another request", _CODEC, "    if (!revisions) memset", "    if (false) memset", _LINK),
    Mutant(
        "an answer that is not in its payload",
        _CODEC,
        "        bytes > slot->payload_bytes)",
        "        false)",
        _ANSWERS,
    ),
    Mutant(
        "a number behind the end is read", _PROTOBUF, "    if (cursor->end - cursor->at < 8) return false;\n", "", _LINK
    ),
    Mutant("a number beyond 64 bits", _PROTOBUF, "        if (count == 9 && byte > 1) return false;\n", "", _LINK),
)
