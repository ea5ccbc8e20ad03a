"""The calls: what they are called, and which messages they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from blockdex.v1 import indexer_pb2 as pb

_BYTES = 2
_FIRST_DATA = pb.StreamRequest.DESCRIPTOR.fields_by_name["append_keys"].number


@dataclass(frozen=True, slots=True)
class Kind:
    """One of the calls.

    Attributes:
        rpc: its name.
        field: what it and its answer are called on a stream; empty where no stream takes it.
        tag: what stands before its request in a `StreamRequest`.
        number: of a data call, among `TOKEN_KINDS`; else -1.
        request, response: its messages.
    """

    rpc: str
    field: str
    tag: bytes
    number: int
    request: type[Any]
    response: type[Any]

    @property
    def appends(self) -> bool:
        """Whether it carries keys."""
        return self in (APPEND_KEYS, APPEND_AND_SELECT)

    @property
    def selects(self) -> bool:
        """Whether it carries queries."""
        return self in (SELECT_BLOCKS, APPEND_AND_SELECT)


def _kind(rpc: str, field: str = "") -> Kind:
    number = pb.StreamRequest.DESCRIPTOR.fields_by_name[field].number if field else 0
    tag = bytes([number << 3 | _BYTES]) if field else b""
    is_data = _FIRST_DATA <= number < pb.StreamRequest.CANCEL_FIELD_NUMBER
    return Kind(
        rpc,
        field,
        tag,
        number - _FIRST_DATA if is_data else -1,
        getattr(pb, f"{rpc}Request"),
        getattr(pb, f"{rpc}Response"),
    )


GET_INFO = _kind("GetInfo")
GET_STATS = _kind("GetStats")
OPEN_SEQUENCES = _kind("OpenSequences", "open_sequences")
GET_SEQUENCE = _kind("GetSequence", "get_sequence")
FORK_SEQUENCE = _kind("ForkSequence", "fork_sequence")
TRUNCATE_SEQUENCE = _kind("TruncateSequence", "truncate_sequence")
CLOSE_SEQUENCES = _kind("CloseSequences", "close_sequences")
CREATE_POOL = _kind("CreatePool", "create_pool")
SET_PAGE_TABLES = _kind("SetPageTables", "set_page_tables")
CLOSE_POOL = _kind("ClosePool", "close_pool")
APPEND_KEYS = _kind("AppendKeys", "append_keys")
SELECT_BLOCKS = _kind("SelectBlocks", "select_blocks")
APPEND_AND_SELECT = _kind("AppendAndSelect", "append_and_select")

TOKEN_KINDS = (APPEND_KEYS, SELECT_BLOCKS, APPEND_AND_SELECT)
