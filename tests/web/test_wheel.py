"""The page is in the wheel."""

from __future__ import annotations

import sys
from pathlib import Path
from zipfile import ZipFile

from blockdex.web.app import PAGE_FILES
from programs import REPOSITORY, run


def test_a_wheel_has_the_files_of_the_page(tmp_path: Path) -> None:
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", tmp_path)
    (path,) = tmp_path.glob("*.whl")
    with ZipFile(path) as wheel:
        for name, _ in PAGE_FILES.values():
            packed = wheel.read(f"blockdex/web/page/{name}")
            assert packed == (REPOSITORY / "service/blockdex/web/page" / name).read_bytes()
