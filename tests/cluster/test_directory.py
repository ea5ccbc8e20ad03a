"""What directories tell, and what of it is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from blockdex.cluster.directory import DnsDirectory, FileDirectory, StaticDirectory, Watch
from blockdex.cluster.views import Member, View, check_views

SECONDS = 10.0


def write(path: Path, version: int, *names: str, cluster: str = "a", weight: float = 1) -> None:
    members = [{"name": name, "address": f"{name}:1", "weight": weight} for name in names]
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({"cluster": cluster, "views": [{"version": version, "members": members}]}))
    fresh.replace(path)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_that_cannot_be(weight: float) -> None:
    with pytest.raises(ValueError, match=f"member a: weight must be a finite number, at least 0, got {weight}"):
        Member("a", "b:1", weight)


def test_views_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="view 3: none of its 2 members has a weight above 0"):
        View(3, (Member("a", "a:1", 0), Member("b", "b:1", 0)))
    with pytest.raises(ValueError, match="view 3: two members of one name among a, a"):
        View(3, (Member("a", "a:1"), Member("a", "b:1")))
    with pytest.raises(ValueError, match="needs a name and an address"):
        Member("", "a:1")
    one = View(1, (Member("a", "a:1"),))
    for views in ([], [one, one]):
        with pytest.raises(ValueError, match="newest first"):
            check_views(views)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "directory.json"
    write(path, 1, "a", "b")
    return path


def wait_for_problem(watch: Watch) -> str:
    end = time.monotonic() + SECONDS
    while not watch.problem:
        assert time.monotonic() < end
        time.sleep(0.01)
    return watch.problem


@pytest.fixture
def watched(path: Path) -> Iterator[tuple[Watch, list[Sequence[View]]]]:
    told: list[Sequence[View]] = []
    watch = Watch(FileDirectory(path), told.append, 0.02)
    yield watch, told
    watch.close()


def test_a_file_is_followed(path: Path, watched: tuple[Watch, list[Sequence[View]]]) -> None:
    _, told = watched
    write(path, 2, "a", "b", "c")
    end = time.monotonic() + SECONDS
    while len(told) < 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert [[member.name for member in views[0].members] for views in told] == [["a", "b"], ["a", "b", "c"]]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"version": 0}, "the newest has version 0, known is 1"),
        ({"version": 1}, "two of version 1 that differ: are there two directories?"),
        ({"version": 2, "cluster": "b"}, "is of cluster 'b', was of 'a'"),
        ({"version": 2, "weight": 0}, "none of its 1 members has a weight above 0"),
    ],
)
def test_what_is_refused_changes_nothing(
    path: Path, watched: tuple[Watch, list[Sequence[View]]], change: dict[str, Any], why: str
) -> None:
    watch, told = watched
    write(path, change.pop("version"), "c", **change)
    assert why in wait_for_problem(watch)
    assert len(told) == 1 and [member.name for member in watch.views[0].members] == ["a", "b"]


@pytest.mark.parametrize("text", ["{", "[]", '{"views": []}', '{"cluster": "a", "views": [{"version": 1}]}'])
def test_files_that_are_no_directory(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(ValueError, match=r"."):
        Watch(FileDirectory(path), lambda views: None, 1)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        FileDirectory(path).views()


def test_names_of_pods() -> None:
    """A real resolver: numbers in the last place of loopback addresses are names that are known, up to 255."""
    views = DnsDirectory("127.0.0.{}:50051").views()
    assert [view.version for view in views] == list(range(256, 0, -1))
    assert views[0].members[3] == Member("3", "127.0.0.3:50051")
    assert views[-1].members == views[0].members[:1]
    with pytest.raises(OSError, match="none of the first 8 names is known"):
        DnsDirectory("127.0.0.{}x:1").views()
    for pattern in ("blockdex:50051", "blockdex-{}"):
        with pytest.raises(ValueError, match="must be HOST:PORT"):
            DnsDirectory(pattern)


def test_a_list_stays() -> None:
    directory = StaticDirectory({"a": "a:1"})
    assert directory.views() == directory.views() == (View(1, (Member("a", "a:1"),)),)
