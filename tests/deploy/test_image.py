"""The images, built from Debian's packages and run confined as compose.yaml says. Takes root, a network, gigabytes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.containers import USER, Container, Images, running
from support.deployed import DEPLOY, services
from support.programs import run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SERVICES = services()

SELECTION = """
import blockdex
import numpy as np

BLOCKS = 20
keys = np.zeros((BLOCKS * 128, 128), np.float32)
keys[:, 0] = np.repeat(np.arange(BLOCKS), 128)
queries = np.zeros((1, 4, 128), np.float32)
queries[..., 0] = 1
with blockdex.Client("127.0.0.1:50051") as client:
    client.open_sequence(7)
    client.append_keys(layer=0, sequences=[7], lengths=[len(keys)], keys=keys)
    print(client.select_blocks(layer=0, sequences=[7], lengths=[1], queries=queries)[0].tolist())
"""

EXTENSION = """
import pathlib, subprocess, sys, sysconfig
source = pathlib.Path("/var/cache/triton/launcher.c")
source.write_text('''
#include <Python.h>
static struct PyModuleDef launcher = {PyModuleDef_HEAD_INIT, "launcher", 0, -1, 0};
PyMODINIT_FUNC PyInit_launcher(void) { return PyModule_Create(&launcher); }
''')
include = "-I" + sysconfig.get_path("include")
subprocess.run(["gcc", "-shared", "-fPIC", include, source, "-o", source.with_suffix(".so")], check=True)
sys.path.insert(0, str(source.parent))
import launcher
print(launcher.__file__)
"""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="blockdex-images-"))
    yield place
    shutil.rmtree(place)


@pytest.fixture(scope="module")
def images(folder: Path) -> Iterator[Images]:
    assert os.getuid() == 0, "buildah, debootstrap and runc need root here"
    images = Images(folder)
    images.make_base()
    yield images
    images.remove()


@pytest.fixture(scope="module")
def torch_arguments(folder: Path) -> list[str]:
    """Where torch's CPU build comes from, and its hash there.

    TORCH_INDEX names an index; without it pip's own configuration must lead to the build.
    """
    (version,) = [
        line.removeprefix("ARG TORCH_VERSION=")
        for line in (DEPLOY.parent / "Dockerfile").read_text(encoding="utf-8").splitlines()
        if line.startswith("ARG TORCH_VERSION=")
    ]
    index = os.environ.get("TORCH_INDEX", "")
    download = ["/usr/bin/env", "python3", "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    python = ["--python-version", "3.11", "--dest", str(folder / "torch"), f"torch=={version}"]
    run(*download, *(["--index-url", index] if index else []), *python, seconds=600)
    (wheel,) = (folder / "torch").iterdir()
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return [f"TORCH_INDEX={index}", f"TORCH_SHA256={digest}"]


@pytest.fixture(scope="module")
def cpu(images: Images, torch_arguments: list[str]) -> str:
    return images.build("cpu", *torch_arguments)


@pytest.fixture(scope="module")
def server(images: Images, cpu: str, folder: Path) -> Iterator[Container]:
    smaller = {"BLOCKDEX_NUM_LAYERS": "3", "BLOCKDEX_CACHE_BYTES": "256MiB", "BLOCKDEX_INSECURE": "true"}
    service = SERVICES["blockdex"] | {"environment": smaller}
    probe = images.configuration(cpu)["Healthcheck"]["Test"]
    assert probe[0] == "CMD"
    with running(images, cpu, service, folder / "server") as container:
        container.wait_until_healthy(probe[1:], seconds=120)
        yield container


def tell_size(images: Images, image: str) -> None:
    with images.root_of(image) as root:
        size = run("du", "--summarize", "--block-size=MB", str(root / "opt" / "blockdex")).split()[0]
    print(f"{image}: {size} of packages")


def test_the_cpu_image_says_how_it_is_run(images: Images, cpu: str) -> None:
    configuration = images.configuration(cpu)
    assert configuration["User"] == f"{USER}:{USER}"
    assert configuration["Entrypoint"] == ["blockdex"]
    assert configuration["Cmd"] == ["serve"]
    assert configuration["ExposedPorts"].keys() == {"50051/tcp", "9051/tcp"}
    assert configuration["Healthcheck"]["Test"] == ["CMD", "blockdex", "health", "--timeout", "4"]
    tell_size(images, cpu)


def test_a_container_answers_a_real_selection(server: Container) -> None:
    done = server.execute("python", "-", text=SELECTION)
    assert done.returncode == 0, done.stderr
    # The highest scores, and the block of the query itself.
    assert json.loads(done.stdout) == [list(range(4, 20))] * 4


def test_a_container_holds_the_compiled_module_and_no_compiler(server: Container) -> None:
    loaded = "from blockdex import _native; import shutil; print(_native.MAX_RUNS, shutil.which('gcc'))"
    done = server.execute("python", "-c", loaded)
    assert done.stdout.split() == ["256", "None"], done.stderr


def test_a_container_is_confined(server: Container) -> None:
    (status,) = [
        dict(
            line.split(":\t", 1)
            for line in server.execute("cat", "/proc/1/status").stdout.splitlines()
            if ":\t" in line
        )
    ]
    assert status["Uid"].split() == [str(USER)] * 4
    assert status["NoNewPrivs"] == "1"
    assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    written = server.execute("touch", "/opt/blockdex/mark")
    assert "Read-only file system" in written.stderr
    assert server.execute("touch", "/tmp/mark", "/run/blockdex/mark").returncode == 0


def test_http_answers_too(server: Container) -> None:
    ask = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9051/readyz').read().decode())"
    assert server.execute("python", "-c", ask).stdout.strip() == "ready"


def test_the_load_test_runs_against_the_server_and_leaves_its_report(
    images: Images, cpu: str, server: Container, folder: Path
) -> None:
    service = SERVICES["loadtest"]
    words = [word.replace("blockdex:", "127.0.0.1:") for word in service["command"]]
    short = [*words, "--duration=2", "--warm-up=0.5", "--ceiling=0", "--clients=2", "--layers=1"]
    with running(images, cpu, service | {"command": short}, folder / "loadtest", network=server.network()) as loadtest:
        assert loadtest.process.wait(120) == 0, loadtest.output.read_text(encoding="utf-8")
    reports = folder / "loadtest" / "reports"
    assert json.loads((reports / "loadtest.json").read_text(encoding="utf-8"))["checks"]["wrong"] == []
    assert (reports / "loadtest.html").exists()


def test_the_engine_image_runs_the_example_against_the_server(
    images: Images, torch_arguments: list[str], server: Container, folder: Path
) -> None:
    image = images.build("engine", *torch_arguments)
    tell_size(images, image)
    service = SERVICES["engine"] | {"command": ["--address", "127.0.0.1:50051", "--small"]}
    with running(images, image, service, folder / "engine", network=server.network()) as engine:
        assert engine.process.wait(600) == 0, engine.output.read_text(encoding="utf-8")
    print(engine.output.read_text(encoding="utf-8"))


def test_triton_can_compile_and_load_where_a_gpu_image_lets_it(images: Images, folder: Path) -> None:
    """The stage below torch's CUDA build, which takes gigabytes and a GPU to try."""
    image = images.build("triton")
    service = services("compose.gpu.yaml")["blockdex"] | {"command": ["-c", "import time; time.sleep(600)"]}
    configuration = images.configuration(image)
    assert "TRITON_CACHE_DIR=/var/cache/triton" in configuration["Env"]
    with running(images, image, service | {"entrypoint": ["python3"]}, folder / "triton") as container:
        container.wait_until_healthy(["true"], seconds=20)
        done = container.execute("python3", "-", text=EXTENSION)
        assert done.stdout.strip() == "/var/cache/triton/launcher.so", done.stderr


def test_a_container_stops_when_told(server: Container) -> None:
    """The last of this file: it takes the server away."""
    assert server.stop() == 0
    lines = [
        json.loads(line) for line in server.output.read_text(encoding="utf-8").splitlines() if line.startswith("{")
    ]
    assert lines == [] or lines[-1]["event"] == "stopped"
