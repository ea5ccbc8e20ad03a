"""Pins what goes into the images, with hashes: `make lock`.

| file | for |
|---|---|
| `build.txt` | what builds the project's own wheel |
| `server.txt` | the target `server`: torch and its CUDA libraries as the package registry has them |
| `cpu.txt` | the target `cpu`: the same versions without CUDA, and without torch itself |
| `engine.txt` | the target `engine`: `cpu.txt` and what the transformers example needs |

torch's CPU build is not in the package registry but in an index of its own, and who builds it again gets other bytes:
its hash depends on where it comes from. So the CPU images pin its version in the Dockerfile, and its hash is given
with its source when the image is built (`--build-arg TORCH_SHA256`).
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

FOLDER = Path(__file__).parent
PROJECT = FOLDER.parents[1] / "pyproject.toml"
COMPILE = (
    *("pip", "compile", "--quiet", "--upgrade", "--system-certs"),
    *("--universal", "--python-version", "3.11", "--only-binary", ":all:", "--generate-hashes"),
    *("--no-annotate", "--custom-compile-command", "make lock"),
)
SERVER = ("--extra", "server", "--extra", "loadtest", "--extra", "tracing")
CPU = ("--constraint", str(FOLDER / "server.txt"), "--override", str(FOLDER / "without-cuda.txt"))


def main() -> None:
    """Writes the four files anew, each with the newest versions that fit."""
    builders = "\n".join(tomllib.loads(PROJECT.read_text(encoding="utf-8"))["build-system"]["requires"])
    _compile("build.txt", "-", text=builders)
    _compile(
        "server.txt", str(PROJECT), *SERVER, "--extra", "gpu", "--constraint", str(PROJECT.with_name("constraints.txt"))
    )
    _compile("cpu.txt", str(PROJECT), *SERVER, *CPU, "--no-emit-package", "torch")
    _compile("engine.txt", str(PROJECT), *SERVER, "--extra", "examples", *CPU, "--no-emit-package", "torch")


def _compile(output: str, *arguments: str, text: str = "") -> None:
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([uv, *COMPILE, *arguments, "--output-file", FOLDER / output], input=text, text=True, check=True)


if __name__ == "__main__":
    main()
