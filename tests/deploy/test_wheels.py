"""What `make wheels` makes, from the last commit: installed nowhere, but loaded and run; and what `make sbom` says."""

from __future__ import annotations

import json
import platform
import re
import runpy
import struct
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from support.programs import BIN, REPOSITORY, run

WHEELS = runpy.run_path(str(REPOSITORY / "deploy" / "wheels.py"))
MACHINES = {"x86_64": 62, "aarch64": 183}
"""Numbers of the machines in the header of an ELF file."""

CLIENT_ALONE = """
import sys
sys.path.insert(0, sys.argv[1])
for package in ("torch", "pydantic", "pydantic_settings", "fastapi", "rich"):
    sys.modules[package] = None
import blockdex
from blockdex.cli.main import main
assert blockdex.__file__.startswith(sys.argv[1])
blockdex.Client("127.0.0.1:1").close()
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    WHEELS["build"](folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_wheels_of_both_machines_keep_their_platform_and_one_is_loaded(dist: Path, tmp_path: Path) -> None:
    for machine, number in MACHINES.items():
        (wheel,) = dist.glob(f"*-cp311-abi3-manylinux_2_28_{machine}.whl")
        WHEELS["check_platform"](wheel, f"manylinux_2_28_{machine}")
        with pytest.raises(WHEELS["WheelError"], match="not manylinux_2_5"):
            WHEELS["check_platform"](wheel, f"manylinux_2_5_{machine}")
        with ZipFile(wheel) as files:
            module = files.read("blockdex/_native.abi3.so")
            files.extractall(tmp_path / machine)
        assert struct.unpack_from("<H", module, 18) == (number,)
        assert re.search(rb"/tmp/|/root/|/work/", module) is None, "it names no place of the machine that made it"
    load = "import sys; sys.path.insert(0, sys.argv[1]); from blockdex import _native; print(_native.__file__)"
    loaded = run(sys.executable, "-P", "-E", "-c", load, tmp_path / platform.machine())
    assert loaded.startswith(str(tmp_path / platform.machine()))
    run(BIN / "twine", "check", "--strict", *dist.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_client_s_wheel_has_nothing_compiled_and_plans_without_what_a_server_needs(
    dist: Path, tmp_path: Path
) -> None:
    (wheel,) = dist.glob("*-py3-none-any.whl")
    with ZipFile(wheel) as files:
        assert not [name for name in files.namelist() if name.endswith(".so")]
        files.extractall(tmp_path)
    planned = run(sys.executable, "-P", "-E", "-c", CLIENT_ALONE, tmp_path, "plan", "--tokens", "1m", "--json")
    assert json.loads(planned)["tokens"] == 1_000_000


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_an_image_holds_is_told_with_its_hashes(tmp_path: Path) -> None:
    lock = REPOSITORY / "deploy" / "requirements" / "server.txt"
    told = tmp_path / "server.cdx.json"
    words = ("requirements", "--pyproject", REPOSITORY / "pyproject.toml", "--output-reproducible")
    run(BIN / "cyclonedx-py", *words, "--output-file", told, lock)
    bom = json.loads(told.read_text(encoding="utf-8"))
    assert bom["bomFormat"] == "CycloneDX"
    assert bom["metadata"]["component"]["name"] == "blockdex"
    names = set(re.findall(r"^([a-z0-9_.-]+)==", lock.read_text(encoding="utf-8"), re.MULTILINE))
    assert {component["name"] for component in bom["components"]} == names
    assert all(each["externalReferences"][0]["hashes"] for each in bom["components"])
