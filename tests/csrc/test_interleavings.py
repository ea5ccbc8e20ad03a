"""The ring's own C, both sides, in every interleaving and every order of memory that C11 allows."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import blockdex
from support.programs import program, run

HERE = Path(__file__).parent
PACKAGE = Path(blockdex.__file__).parent
HEADERS = PACKAGE / "ring" / "include"
FLAGS = ("-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O2", f"-I{HERE}", f"-I{PACKAGE / 'csrc'}")


def explored(name: str, folder: Path, *sources: Path, headers: Path = HEADERS) -> dict[str, str]:
    """What a program of scenarios has said of each."""
    gcc, include, model = program("gcc", "build-essential"), f"-I{headers}", folder / "model.o"
    run(gcc, *FLAGS, "-c", HERE / "interleavings.c", "-o", model)
    inside: tuple[str | Path, ...] = ("-include", HERE / "interleavings.h", include, HERE / f"{name}.c", *sources)
    run(gcc, *FLAGS, *inside, model, "-o", folder / name)
    said = run(folder / name).splitlines()
    return dict(row.split(": ") for row in said)


def test_what_c11_allows_is_seen_and_what_it_forbids_is_not(tmp_path: Path) -> None:
    assert explored("litmus", tmp_path) == {
        "store buffering": "seen",
        "store buffering, fences": "not seen",
        "message passing": "seen",
        "message passing, release": "seen",
        "message passing, acquire": "seen",
        "message passing, both": "not seen",
        "message passing, fences": "not seen",
        "coherence": "not seen",
        "exchange": "not seen",
    }


def test_nothing_is_lost_or_raced_for_and_nobody_sleeps_on(tmp_path: Path) -> None:
    """Requests, answers, a round trip, answers that wait for room in the arena, slots that are used again."""
    executions = explored("ring_model", tmp_path, PACKAGE / "csrc" / "ring" / "server.c")
    assert len(executions) == 6
    assert all(int(count) > 5 for count in executions.values()), executions


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("    atomic_thread_fence(memory_order_seq_cst);\n    if (", "    if (", "nobody wakes it"),
        ("atomic_load_explicit(counter, memory_order_acquire) == seen", "counter && (seen || true)", "nobody wakes it"),
        ("(counter, number, memory_order_release)", "(counter, number, memory_order_relaxed)", "a data race"),
    ],
    ids=["the fence before the bell", "the second look", "the release of what was written"],
)
def test_it_can_fail(old: str, new: str, words: str, tmp_path: Path) -> None:
    headers = shutil.copytree(HEADERS, tmp_path / "include")
    header = headers / "blockdex_ring.h"
    text = header.read_text()
    assert text.count(old) == 1
    header.write_text(text.replace(old, new))
    with pytest.raises(AssertionError, match=words):
        explored("ring_model", tmp_path, PACKAGE / "csrc" / "ring" / "server.c", headers=headers)
