"""Inputs that are nearly right: messages by their descriptors, words of the control channel, HTTP, slots."""

from __future__ import annotations

import json
import random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from blockdex.v1 import indexer_pb2 as pb

RPCS: dict[str, tuple[type[Message], type[Message]]] = {
    method.name: (getattr(pb, method.input_type.name), getattr(pb, method.output_type.name))
    for method in pb.DESCRIPTOR.services_by_name["IndexerService"].methods
    if method.name != "Stream"
}
"""Request and response of every method but the stream."""

NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    16,
    127,
    128,
    255,
    300,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 63,
    (1 << 64) - 1,
)
_LENGTHS = (0, 1, 2, 3, 16, 255, 256, 512, 1024)
_MOST_REPEATED = 4
_DEEPEST = 3


def message(draw: random.Random, kind: type[Message], depth: int = 0) -> Message:
    """A message with some of its fields."""
    made = kind()
    for field in made.DESCRIPTOR.fields:
        if draw.random() < (0.15 if depth else 0.2):
            continue
        if field.containing_oneof and draw.random() < 0.8:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            continue
        count = draw.randrange(1, _MOST_REPEATED) if field.is_repeated else 1
        for _ in range(count):
            _fill(draw, made, field, depth)
    return made


def _fill(draw: random.Random, made: Any, field: Any, depth: int) -> None:
    """Sets a field, or adds to one that is repeated."""
    held = getattr(made, field.name)
    if field.message_type is None:
        value = _value(draw, field)
        held.append(value) if field.is_repeated else setattr(made, field.name, value)
    elif depth <= _DEEPEST:
        inner = held.add() if field.is_repeated else held
        inner.CopyFrom(message(draw, type(inner), depth + 1))


def _value(draw: random.Random, field: Any) -> Any:
    """A number of a type, or what stands for it."""
    if field.type == FieldDescriptor.TYPE_BYTES:
        return bytes(draw.choice(_LENGTHS))
    if field.type == FieldDescriptor.TYPE_STRING:
        return "x" * draw.choice((0, 1, 5, 300))
    if field.cpp_type in {FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT}:
        return draw.choice((0.0, -1.0, 1e30, float("inf"), float("nan")))
    choices = {
        FieldDescriptor.CPPTYPE_BOOL: (False, True),
        FieldDescriptor.CPPTYPE_ENUM: range(6),
        FieldDescriptor.CPPTYPE_INT32: (-1, 0, 1, 100, (1 << 31) - 1),
        FieldDescriptor.CPPTYPE_INT64: (-1, 0, 1, 100, (1 << 31) - 1),
        FieldDescriptor.CPPTYPE_UINT32: [number for number in NUMBERS if number < 1 << 32],
    }
    return draw.choice(choices.get(field.cpp_type, NUMBERS))


def spoiled(draw: random.Random, data: bytes) -> bytes:
    """Bytes that are changed somewhere, cut, or doubled."""
    if not data:
        return data
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(changed))
        match draw.randrange(4):
            case 0:
                changed[at] = draw.randrange(256)
            case 1:
                changed[at] ^= 1 << draw.randrange(8)
            case 2:
                del changed[at : at + draw.randrange(1, 9)]
            case _:
                changed[at:at] = changed[at : at + draw.randrange(1, 9)]
        if not changed:
            break
    return bytes(changed)


def rpc(draw: random.Random) -> tuple[str, bytes]:
    """A method, and bytes that may be its request."""
    name = draw.choice(list(RPCS))
    kind = RPCS[name][0] if draw.random() < 0.95 else draw.choice(list(RPCS.values()))[0]
    data = message(draw, kind).SerializeToString()
    return name, spoiled(draw, data) if draw.random() < 0.5 else data


def stream_message(draw: random.Random) -> bytes:
    """Bytes that may be a request of a stream, which what is none ends."""
    made = message(draw, pb.StreamRequest)
    field: Any = draw.choice(pb.StreamRequest.DESCRIPTOR.oneofs_by_name["request"].fields)
    if field.message_type is not None:
        inner = getattr(made, field.name)
        inner.CopyFrom(message(draw, type(inner), 1))
    data = made.SerializeToString()
    return spoiled(draw, data) if draw.random() < 0.03 else data


_WORDS: tuple[Any, ...] = (
    *({"ask": what} for what in ("info", "stats", "overview", "requests", "", 7, None)),
    {"ask": "overview", "max_cells": 16},
    {"ask": "overview", "max_cells": -1},
    {"ask": "overview", "max_cells": "many"},
    {"share": "memfd"},
    {"share": {"kind": "memfd", "bytes": 1 << 40}},
    {"region": {"kind": "cuda_ipc", "handle": "00" * 64, "device": "0" * 32}},
    {"release": 1},
    {"give_back": 0},
    {"channel": {"bound": 1.0}},
    {"answer": {}},
    {"failed": "why"},
    {},
    [],
    7,
    None,
    "words",
)


def words(draw: random.Random) -> bytes:
    """What may be said on a control channel, its length before it."""
    said = draw.choice(_WORDS)
    if isinstance(said, dict) and draw.random() < 0.3:
        said = said | {
            draw.choice(("ask", "kind", "bytes", "max_cells", "region")): draw.choice((0, -1, "x", [], {}, 1e99))
        }
    body = json.dumps(said).encode()
    body = spoiled(draw, body) if draw.random() < 0.2 else body
    length = len(body) if draw.random() < 0.97 else draw.choice((0, 1, len(body) + 1, 1 << 27, (1 << 32) - 1))
    return length.to_bytes(4, "little") + body


_PATHS = ("/healthz", "/readyz", "/metrics", "/v1/info", "/v1/live", "/", "/page.js", "/../etc/passwd", "/%00", "*", "")
_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "CONNECT", "BREW", "get")
_HEADERS = (
    "Host: x",
    "Connection: close",
    "Accept: application/openmetrics-text",
    "Content-Length: 5",
    "Content-Length: -1",
    "Content-Length: 99999999999999999999",
    "Transfer-Encoding: chunked",
    "Transfer-Encoding: nonsense",
    "Authorization: Bearer x",
    "Expect: 100-continue",
    "Upgrade: websocket",
    "X: " + "y" * 3000,
    ": nameless",
)


def http(draw: random.Random) -> bytes:
    """What may be a request of HTTP."""
    headers = [draw.choice(_HEADERS) for _ in range(draw.randrange(5))]
    version = draw.choice(("HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/9", ""))
    path = draw.choice(_PATHS) + draw.choice(("", "?cells=9", "?cells=-1", "?cells=x", "#", "?" + "q" * 500))
    body = draw.choice((b"", b"hello", b"5\r\nhello\r\n0\r\n\r\n", b"zz\r\n", b"\0" * 20))
    lines = "\r\n".join([f"{draw.choice(_METHODS)} {path} {version}", *headers, "", ""])
    data = lines.encode("latin-1") + body
    return spoiled(draw, data) if draw.random() < 0.5 else data
