"""Makes what is released, from the last commit, and checks it: `make wheels`.

| file in `dist` | for |
|---|---|
| `*-cp311-abi3-manylinux_2_28_x86_64.whl`, `..._aarch64.whl` | Linux, any CPython from 3.11 on: needs no compiler |
| `*-py3-none-any.whl` | the client anywhere else: without shared memory and server |
| `*.tar.gz` | the sources |

One compiler makes them for both machines, so that a commit gives the same bytes wherever it is built: twice, here.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
DIST = REPOSITORY / "dist"
MACHINES = ("x86_64", "aarch64")
GLIBC = "2.28"


class WheelError(Exception):
    """Something that may not be released: one line that says why."""


def main() -> None:
    """Makes and checks the files; ends with a traceback where one is not as it should be."""
    shutil.rmtree(DIST, ignore_errors=True)
    commit = git("rev-parse", "HEAD").decode().strip()
    build(DIST, commit)
    check_tag(commit)
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), commit)
        for path in sorted(DIST.iterdir()):
            if digest(path) != digest(Path(folder, path.name)):
                raise WheelError(f"{path.name}: built again it has other bytes")
    for machine in MACHINES:
        (wheel,) = DIST.glob(f"*_{machine}.whl")
        check_platform(wheel, f"manylinux_{GLIBC.replace('.', '_')}_{machine}")
    run("twine", "check", "--strict", *map(str, DIST.iterdir()))
    for path in sorted(DIST.iterdir()):
        print(digest(path), path.name)


def build(output: Path, commit: str = "HEAD") -> None:
    """Writes the wheels and the sources of a commit into a folder."""
    made = git("log", "-1", "--format=%ct", commit).decode().strip()
    with tempfile.TemporaryDirectory() as folder:
        # Not in the checkout: what is compiled there is this machine's, and in use.
        with tarfile.open(fileobj=io.BytesIO(git("archive", commit))) as files:
            files.extractall(folder, filter="data")
        for machine in MACHINES:
            compiler = f"{sys.executable} -m ziglang cc -target {machine}-linux-gnu.{GLIBC} -g0 -s"
            platform = f"manylinux_{GLIBC.replace('.', '_')}_{machine}"
            hatch(folder, made, output, "wheel", CC=f"{compiler} -ffile-prefix-map={folder}=.", BLOCKDEX_WHEEL=platform)
            Path(folder, "service", "blockdex", "_native.abi3.so").unlink()
        hatch(folder, made, output, "wheel", BLOCKDEX_WHEEL="any")
        hatch(folder, made, output, "sdist")


def hatch(folder: str, made: str, output: Path, target: str, **variables: str) -> None:
    """Has hatchling build a target of the sources in a folder, which were made at that second."""
    environment = os.environ | variables | {"SOURCE_DATE_EPOCH": made}
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(output)]
    subprocess.run(command, cwd=folder, env=environment, check=True)


def git(*words: str) -> bytes:
    """What git prints."""
    return subprocess.run(["git", *words], cwd=REPOSITORY, check=True, capture_output=True).stdout  # noqa: S607


def check_tag(commit: str) -> None:
    """Holds the version to the tag of a commit, where it has one.

    Raises:
        WheelError: it is another version's.
    """
    (source,) = DIST.glob("*.tar.gz")
    version = source.name.removeprefix("blockdex-").removesuffix(".tar.gz")
    for tag in git("tag", "--points-at", commit, "--list", "v*").decode().split():
        if tag != f"v{version}":
            raise WheelError(f"the commit is tagged {tag}, and pyproject.toml says {version}")


def check_platform(wheel: Path, platform: str) -> None:
    """Holds a wheel to the platform of its name.

    Raises:
        WheelError: it asks for more than that platform has.
    """
    told = " ".join(run("auditwheel", "show", str(wheel)).split())
    if f'consistent with the following platform tag: "{platform}"' not in told:
        raise WheelError(f"{wheel.name}: not {platform}: {told}")


def run(program: str, *arguments: str) -> str:
    """What a program of this environment prints."""
    done = subprocess.run(
        [Path(sys.executable).with_name(program), *arguments], check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
