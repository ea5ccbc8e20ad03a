"""What is in the wheel: the page, and the compiled module, which loads from there."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from blockdex.frontend.http.app import PAGE_FILES
from support.programs import REPOSITORY, run

LOAD = """
import sys
sys.path.insert(0, sys.argv[1])
from blockdex import _native
print(_native.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder)
    (path,) = folder.glob("*.whl")
    return path


def test_a_wheel_has_the_files_of_the_page(wheel: Path) -> None:
    with ZipFile(wheel) as files:
        for name, _ in PAGE_FILES.values():
            packed = files.read(f"blockdex/frontend/http/page/{name}")
            assert packed == (REPOSITORY / "service/blockdex/frontend/http/page" / name).read_bytes()


def test_the_compiled_module_loads_from_a_wheel(wheel: Path, tmp_path: Path) -> None:
    assert wheel.name.endswith(f"-cp311-abi3-linux_{platform.machine()}.whl")
    with ZipFile(wheel) as files:
        files.extractall(tmp_path)
    # -P and -E: nothing of the checkout is found by way of the folder or the environment.
    loaded = run(sys.executable, "-P", "-E", "-c", LOAD, tmp_path)
    assert loaded.strip() == str(tmp_path / "blockdex" / "_native.abi3.so")
