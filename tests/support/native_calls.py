"""Calls everything in the compiled module with anything: `python -m support.native_calls SEED`. It ends, or it crashes.

Most arguments are of the kind that the stub names, at its edges; any of them may be of any other kind.
"""

from __future__ import annotations

import ast
import contextlib
import random
import sys
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

import blockdex
from blockdex import _native as native
from blockdex.client.lengths import Sequences
from blockdex.client.requests import NO_POOL, NO_QUERIES, RequestMaker, maker_of
from blockdex.faults import SEAMS
from blockdex.ring.handshake import Handles, new_link
from blockdex.ring.segment import Sizes
from support.bare_core import BareCore, bare_core
from support.clients import some_info
from support.links import link_of
from support.running_engine import LIMITS, SPEC
from support.strange_server import strange_server

KEYS, QUERIES = np.zeros((1, 128), np.float32), np.zeros((1, 4, 128), np.float32)
ROUNDS, CALLS = 10, 25
SIZES = Sizes(4, 4096, 4096)
WAITS = {"run", "drain", "wait", "await_alone", "may_sleep", "ask"}
"""They wait as long as they are told."""

NUMBERS = [0, 1, 2, 3, 7, 64, 255, 256, 4096, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
ARRAYS = [np.zeros(shape, kind) for shape in (0, 1, 3, 17, (3, 16)) for kind in (np.uint8, np.int32, np.int64)]
KINDS: dict[str, list[Any]] = {
    "int": [*NUMBERS, -1, -(2**63), 2**64, 2**200, True],
    "float": [0.0, 1e-6, 1.0, -1.0, 1e300, float("inf"), float("nan")],
    "bool": [True, False],
    "str": ["", "x", "\0", "\ud800", "tenant", "t" * 300],
    "bytes": [b"", b"x", b"\0" * 64, bytearray(8), memoryview(b"abcdefgh"), memoryview(b"abcdefgh")[::2]],
    "NDArray": [*ARRAYS, ARRAYS[-1].T, np.array([None])],
    "list": [[], [1, 2], [(1, 1, 1, 1, 1)], [(1,)], [None], [(None, 1, 2)]],
    "Sequence": [[], [1, 2], [(1, 1, 1, 1, 1)], [(1,)], (1, 2)],
    "tuple": [(), (1, 2), (0.5, 0.1), (0.1, 0.5), (None,)],
    "dict": [{}, {1: 2}, {np.dtype(np.float32): 3}],
    "Callable": [len, int, lambda *_: None],
    "type": [int, Exception, np.ndarray],
    "object": [object(), None, np.dtype(np.float32)],
}


class Parameter(NamedTuple):
    """As the stub has it."""

    name: str
    kind: str
    by_name: bool


def signatures() -> dict[str, list[Parameter]]:
    """Of functions by their names, of types by that of the type, of methods by both."""
    stub = ast.parse(Path(blockdex.__file__).with_name("_native.pyi").read_text())
    found = {}
    for node in ast.walk(stub):
        for inner in ast.iter_child_nodes(node):
            if not isinstance(inner, ast.FunctionDef):
                continue
            made = isinstance(node, ast.ClassDef) and inner.name in {"__init__", "__new__"}
            taken = inner.args
            listed = [(each, False) for each in (*taken.posonlyargs, *taken.args)]
            listed += [(each, True) for each in taken.kwonlyargs]
            name = inner.name
            if isinstance(node, ast.ClassDef):
                name = node.name if made else f"{node.name}.{inner.name}"
            found[name] = [
                Parameter(each.arg, ast.unparse(each.annotation).split("[")[0].split(" |")[0], by_name)
                for each, by_name in listed
                if each.annotation
            ]
    return found


def segments(engine: Handles) -> list[Any]:
    """What looks like a segment, one of them right."""
    names = [name for name in vars(engine.segment) if not name.startswith("_")]
    right = {name: getattr(engine.segment, name) for name in names}
    changes = [{name: value} for name in names for value in (3, 2**63, 2**64 - 64, None)]
    return [SimpleNamespace(**right | change) for change in ({}, *changes)]


def callables(of: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    """What the module, or an object of it, can be called by, as `signatures` has it."""
    of_type = "" if of is native else f"{type(of).__name__}."
    for name in dir(of):
        if not name.startswith("__") and callable(got := getattr(of, name)):
            yield of_type + name, got


def call(function: Callable[..., Any], parameters: list[Parameter], pool: dict[str, list[Any]], waits: bool) -> None:
    """Calls it once."""
    everything = [value for values in pool.values() for value in values]
    positional, named = [], {}
    for parameter in parameters:
        usual = pool.get(parameter.kind, everything)
        value = random.choice(usual if random.random() < 0.85 else everything)
        if waits and isinstance(value, int | float) and not abs(value) < 1e-3:
            value = 0.0
        if parameter.by_name:
            named[parameter.name] = value
        else:
            positional.append(value)
    if random.random() < 0.05:
        positional = positional[: random.randrange(len(positional) + 1)]
    with contextlib.suppress(Exception):
        function(*positional, **named)


def use(objects: list[Any], pool: dict[str, list[Any]], known: dict[str, list[Parameter]]) -> None:
    """Calls everything of the module and of some of its objects, and sets what can be set."""
    everything = [value for values in pool.values() for value in values]
    for of in (native, *objects):
        # In any order, since some end what the others use.
        for name, function in random.sample(found := list(callables(of)), len(found)):
            for _ in range(CALLS):
                call(function, known.get(name, []), pool, name.rpartition(".")[2] in WAITS)
            # No wait ends by a clock that stands still.
            native.hold_clock(None)
            native.arm_faults(0, 0.0, (0.0,) * len(SEAMS))
        for name in () if of is native else set(dir(of)) - set(dir(object)):
            with contextlib.suppress(Exception):
                setattr(of, name, random.choice(everything))


class Made(NamedTuple):
    """Objects of the module, and what else its calls take."""

    line: native.ServerLink
    core: native.Core
    link: native.ClientLink
    connection: native.RingConnection
    maker: RequestMaker
    request: native.TokenRequest
    bare: BareCore
    engine: Handles

    @property
    def pool(self) -> dict[str, list[Any]]:
        """Values by kind."""
        columns = list(self.bare.cache.sequence_columns[1:])
        return KINDS | {
            "NDArray": KINDS["NDArray"] + 3 * columns,
            "memoryview": [self.engine.segment.memory, bytearray(64)],
            "object": KINDS["object"] + segments(self.engine) + [7, [7, 8], KEYS, QUERIES, "ascending", "score", "raw"],
            "dict": [*KINDS["dict"], Sequences(2), {7: array("q", [1]), 8: array("q", [5] * 8)}],
            "RingConnection": [self.connection],
            "ServerLink": [*self.bare.lines, self.line],
            "SequenceIndex": [self.bare.cache.sequence_columns.sequences],
        }


@contextlib.contextmanager
def made() -> Iterator[Made]:
    """One of each."""
    engine, client = new_link(SIZES, epoch=1)
    bounds = (SPEC.num_index_heads, LIMITS.max_spans, LIMITS.max_message_bytes)
    with (
        contextlib.closing(engine),
        contextlib.closing(client),
        bare_core() as bare,
        strange_server(SIZES) as (address, _),
    ):
        bare.open_client()
        line = native.ServerLink(engine.segment, engine.client_bell, engine.engine_bell)
        link = link_of(client.segment, client.engine_bell)
        connection = native.RingConnection(address, "tenant", 10.0, *bounds, room_seconds=0.0)
        maker = maker_of(some_info(), native)
        keys = np.repeat(KEYS, 2, axis=0)
        request = maker.make(0, 1, [7, 8], [1, 1], None, None, None, keys, *NO_QUERIES, False, *NO_POOL)
        assert isinstance(request, native.TokenRequest)
        yield Made(line, bare.core, link, connection, maker, request, bare, engine)


def main(seed: int) -> None:
    """Some rounds, each with objects of its own."""
    random.seed(seed)
    known = signatures()
    for _ in range(ROUNDS):
        with made() as them:
            use([them.line, them.core, them.link, them.connection, them.maker, them.request], them.pool, known)


if __name__ == "__main__":
    main(int(sys.argv[1]))
