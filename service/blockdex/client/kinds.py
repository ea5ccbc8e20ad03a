"""The three data calls: what they are called, and which messages they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from blockdex.v1 import indexer_pb2 as pb

_BYTES = 2


@dataclass(frozen=True, slots=True)
class Kind:
    """One of the data calls.

    Attributes:
        number: of it, as the compiled module counts them.
        rpc: its name.
        field: what its answer is called in a `StreamResponse`.
        tag: what stands before its request in a `StreamRequest`.
        request, response: its messages.
    """

    number: int
    rpc: str
    field: str
    tag: bytes
    request: type[Any]
    response: type[Any]


def _kind(number: int, rpc: str, field: str) -> Kind:
    tag = pb.StreamRequest.DESCRIPTOR.fields_by_name[field].number << 3 | _BYTES
    return Kind(number, rpc, field, bytes([tag]), getattr(pb, f"{rpc}Request"), getattr(pb, f"{rpc}Response"))


APPEND_KEYS = _kind(0, "AppendKeys", "append_keys")
SELECT_BLOCKS = _kind(1, "SelectBlocks", "select_blocks")
APPEND_AND_SELECT = _kind(2, "AppendAndSelect", "append_and_select")
