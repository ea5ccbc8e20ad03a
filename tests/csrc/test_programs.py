"""The C that needs no Python, as programs: on this machine, under the sanitizers, and for ARM under qemu."""

from __future__ import annotations

import runpy
import struct
from pathlib import Path

import numpy as np
import pytest

from blockdex.v1 import indexer_pb2 as pb
from support.c_programs import BUILDS, CSRC, Built, compiled
from support.programs import program, run


def test_nobody_sleeps_on_and_nothing_is_lost(built: Built) -> None:
    """Both ends in C, which are faster than any Python, and sleep all the time."""
    assert run(*built("ring_stress"), "50000") == "done\n"


def test_arena_and_in_flight_table_do_what_the_plainest_ones_do(built: Built) -> None:
    assert run(*built("tables_test"), "100000") == "done\n"


NO_SERVER = "link: what greets is no server of blockdex"
NO_SEGMENT = "segment: it is none of version 3"


@pytest.mark.parametrize(
    ("server", "outcome"),
    [
        ("right", "connected"),
        ("no greeting", "link: no greeting in time"),
        ("hung up", "link: the server hung up"),
        ("refused", "link: not you"),
        ("no files", NO_SERVER),
        ("two files", NO_SERVER),
        ("half a greeting", NO_SERVER),
        ("greeting of another version", "link: the server speaks version 4 of the ring, this client 3"),
        ("segment of another kind", NO_SEGMENT),
        ("segment of another version", NO_SEGMENT),
        ("segment of another size", NO_SEGMENT),
        ("slots of another size", NO_SEGMENT),
        ("slots whose number is no power of two", NO_SEGMENT),
        ("slots in the header", NO_SEGMENT),
        ("an arena that ends outside", NO_SEGMENT),
        ("short segment", NO_SEGMENT),
    ],
)
def test_a_connection_that_fails_leaves_nothing_and_is_not_waited_for(built: Built, server: str, outcome: str) -> None:
    assert run(*built("connect_test"), server) == f"{outcome}, in time, 0 files left, not mapped\n"


def test_a_file_too_many_is_refused(tmp_path: Path) -> None:
    """Not under qemu, which loses one itself."""
    command = compiled(BUILDS["here"], "connect_test", tmp_path)
    assert run(*command, "four files") == f"{NO_SERVER}, in time, 0 files left, not mapped\n"


def messages() -> list[pb.StreamRequest]:
    """Appends, selections and both, of one span and of many."""
    made = []
    for layer, (kind, spans) in enumerate((kind, spans) for kind in ("append", "select", "both") for spans in (1, 5)):
        columns = pb.Spans(sequence_ids=range(1, 1 + spans), starts=[7] * spans, lengths=[1] * spans)
        keys = pb.Tensor(dtype=pb.DTYPE_BF16, data=np.ones((spans, 128), np.uint16).tobytes())
        queries = pb.Tensor(dtype=pb.DTYPE_BF16, data=np.ones((spans, 4, 128), np.uint16).tobytes())
        one = pb.StreamRequest(request_id=layer + 1)
        if kind == "append":
            one.append_keys.CopyFrom(pb.AppendKeysRequest(layer=layer, spans=columns, keys=keys))
        elif kind == "select":
            one.select_blocks.CopyFrom(pb.SelectBlocksRequest(layer=layer, spans=columns, queries=queries))
        else:
            both = pb.AppendAndSelectRequest(layer=layer, spans=columns, keys=keys, queries=queries)
            one.append_and_select.CopyFrom(both)
        made.append(one)
    return made


def test_of_a_message_nothing_behind_its_end_is_read(built: Built, tmp_path: Path) -> None:
    written = [message.SerializeToString() for message in messages()]
    said = tmp_path / "messages"
    said.write_bytes(b"".join(struct.pack("<I", len(each)) + each for each in [*written, written[0] + b"\xff"]))
    layers = run("sh", "-c", '"$@" < "$0"', said, *built("wire_test"), "3000")
    assert layers.split() == [*map(str, range(len(written))), "-1"]


@pytest.mark.slow
def test_the_module_compiles_for_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it; its programs above run there."""
    monkeypatch.setenv("CC", program(*BUILDS["aarch64"].compiler))
    module = runpy.run_path(str(CSRC / "compile.py"))["compile_native"](tmp_path / "_native.so", "-Werror")
    assert module.read_bytes()[18:20] == b"\xb7\0", "the ELF header says another machine than EM_AARCH64"
