"""Rooms and arrows: who may import whom, by the words of the source and when the modules are really loaded."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"blockdex": ROOT / "service" / "blockdex", "blockdex_kernels": ROOT / "kernels" / "blockdex_kernels"}

MAY_IMPORT = {
    "kernels": set(),
    "contract": {"kernels"},
    "v1": set(),
    "cache": {"contract", "kernels"},
    "executor": {"kernels"},
    "scheduler": {"contract", "cache", "executor", "ring", "kernels"},
    "ring": {"contract", "kernels"},
    "frontend": {"contract", "ring", "v1", "kernels"},
    "device_channel": {"contract", "ring", "kernels"},
    "client": {"contract", "device_channel", "ring", "v1", "kernels"},
    "cluster": {"contract", "client", "kernels"},
    "loadtest": {"contract", "client", "v1", "kernels"},
}
"""Rooms that a room may import, besides itself. What is not listed here puts the rooms together, and may import all."""

ANYWHERE = {"faults", "flags", "logs", "_native"}
"""Modules of the service that belong to no room; every room may use them."""

FRONT = {"grpc", "google", "grpc_health", "grpc_reflection", "fastapi", "starlette", "uvicorn", "prometheus_client"}
TENSORS = {"torch", "triton"}
MAY_NOT_LOAD = {
    "kernels": FRONT | {"blockdex"},
    "contract": FRONT | TENSORS,
    "v1": TENSORS,
    "cache": FRONT | TENSORS,
    "executor": FRONT,
    "scheduler": FRONT,
    "ring": FRONT | TENSORS,
    "frontend": TENSORS,
    "device_channel": FRONT,
    "client": TENSORS,
    "cluster": TENSORS,
}
"""What no module of a room may bring into the process, however indirectly."""


class Module(NamedTuple):
    """A module of the two packages."""

    name: str
    path: Path

    @property
    def room(self) -> str:
        """The room it is in; `house` for what puts the rooms together."""
        package, *rest = self.name.split(".")
        if package == "blockdex_kernels":
            return "kernels"
        if rest and rest[0] in ANYWHERE:
            return "contract"
        return rest[0] if rest and rest[0] in MAY_IMPORT else "house"

    @property
    def tree(self) -> ast.Module:
        """Its source."""
        return ast.parse(self.path.read_text(encoding="utf-8"))


def _modules() -> Iterator[Module]:
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield Module(".".join((package, *(part for part in parts if part != "__init__"))), path)


MODULES = {module.name: module for module in _modules()}


@cache
def _imports(module: Module, *, types_too: bool) -> tuple[str, ...]:
    """Full names of what a module imports, anywhere in it, functions included."""
    return tuple(_walk_imports(module, types_too))


def _walk_imports(module: Module, types_too: bool) -> Iterator[str]:
    skipped: set[ast.AST] = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            skipped.update(inner for statement in node.body for inner in ast.walk(statement))
        if node in skipped and not types_too:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module.name}: imports are absolute"
            inside = module.name.startswith("blockdex.")
            assert not inside or node.module != "blockdex", (
                f"{module.name}: the package leads to its clients, and round"
            )
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _ours(name: str) -> Module | None:
    """The module of ours that an imported name is, or is defined in; the compiled one has no source to read here."""
    while name and not name.startswith("blockdex._native"):
        if name in MODULES:
            return MODULES[name]
        name = name.rpartition(".")[0]
    return None


def test_the_tree_is_seen() -> None:
    assert set(MAY_IMPORT) == {module.room for module in MODULES.values()} - {"house"}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_arrows_run_one_way(room: str) -> None:
    for module in MODULES.values():
        if module.room != room or module.name == "blockdex":
            continue
        for name in _imports(module, types_too=True):
            target = _ours(name)
            if target is not None:
                assert target.room in {room, *MAY_IMPORT[room]}, f"{module.name} imports {name}"


def _reached(module: Module) -> set[str]:
    """All modules of ours that reading this one leads to, by way of others."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        current = todo.pop()
        for name in _imports(current, types_too=True):
            target = _ours(name)
            # Where a module is taken from its package, no more of the package is meant than that module.
            if target is not None and target.name != current.name and target.name not in seen:
                seen.add(target.name)
                todo.append(target)
    return seen


def test_no_module_leads_back_to_itself() -> None:
    circles = [name for name, module in MODULES.items() if name in _reached(module)]
    assert not circles


@pytest.mark.parametrize("room", MAY_NOT_LOAD)
def test_rooms_name_no_library_that_is_not_theirs(room: str) -> None:
    for module in MODULES.values():
        if module.room == room:
            for name in _imports(module, types_too=False):
                assert name.split(".")[0] not in MAY_NOT_LOAD[room], f"{module.name} imports {name}"


LOADER = """
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in refused:
            raise ImportError(f"{name} must not be loaded here")

refused, modules = set(sys.argv[1].split(",")), sys.argv[2].split(",")
sys.meta_path.insert(0, Refuse())
for module in modules:
    importlib.import_module(module)
"""


def _load(names: list[str], *, refused: AbstractSet[str]) -> subprocess.CompletedProcess[str]:
    """Imports modules in a new process that cannot load some libraries."""
    command = [sys.executable, "-c", LOADER, ",".join(refused), ",".join(names)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


PROCESSES = {"engine_process": FRONT, "frontend_process": TENSORS, "supervisor": TENSORS, "main": TENSORS}
"""Modules of the server that are processes, and what none of these may ever load."""


@pytest.mark.parametrize(
    "rooms",
    [("kernels",), ("contract", "cache", "ring"), ("executor", "scheduler"), ("v1", "client", "cluster", "frontend")],
)
def test_rooms_and_processes_load_without_the_libraries_of_others(rooms: tuple[str, ...]) -> None:
    (refused,) = {frozenset(MAY_NOT_LOAD[room]) for room in rooms}
    names = [module.name for module in MODULES.values() if module.room in rooms]
    names += [f"blockdex.server.{process}" for process, libraries in PROCESSES.items() if libraries == refused]
    loaded = _load(names, refused=refused)
    assert loaded.returncode == 0, loaded.stderr


def test_what_refuses_libraries_does_refuse_them() -> None:
    loaded = _load(["blockdex.executor.interface"], refused=TENSORS)
    assert loaded.returncode != 0
    assert "torch must not be loaded here" in loaded.stderr


def test_benchmarks_and_examples_need_nothing_of_the_tests() -> None:
    for path in [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/**/*.py")]:
        for name in _imports(Module(path.stem, path), types_too=True):
            assert name.split(".")[0] not in {"tests", "support"}, f"{path.name} imports {name}"


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith("blockdex.v1.indexer_pb2")])
def test_every_module_says_what_it_is(name: str) -> None:
    assert ast.get_docstring(MODULES[name].tree), f"{MODULES[name].path}: no docstring"
