"""Images built by buildah and run by runc, as a container engine does it; both as root, in a folder of their own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.programs import REPOSITORY, program, run

BASE = "localhost/base"
BASE_PACKAGES = "ca-certificates,python3,python3-dev,python3-pip,python3-venv"
"""What the Dockerfile takes for granted of its BASE: Python with venv, pip and headers."""
DOCKER_TMPFS = ("noexec", "nosuid", "nodev")
"""How Docker mounts a tmpfs unless it is told otherwise."""
USER = 10001


class Images:
    """A store of images in a folder, which `remove` empties.

    Args:
        folder: takes gigabytes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        places = ("--root", str(folder / "store"), "--runroot", str(folder / "run"))
        self._buildah = (program("buildah", "buildah"), *places)

    def buildah(self, *arguments: str, seconds: float = 300) -> str:
        """Runs buildah on this store; what it prints."""
        return run(*self._buildah, *arguments, seconds=seconds).strip()

    def make_base(self) -> None:
        """Makes the image `BASE` from Debian's packages."""
        root = self._folder / "base"
        bootstrap = (program("debootstrap", "debootstrap"), "--variant=minbase", f"--include={BASE_PACKAGES}")
        run(*bootstrap, "bookworm", str(root), seconds=600)
        recipe = self._folder / "base.Containerfile"
        recipe.write_text("FROM scratch\nCOPY base /\n", encoding="utf-8")
        build = ("build", "--isolation", "chroot", "--tag", BASE, "--file", str(recipe), str(self._folder))
        self.buildah(*build)

    def build(self, target: str, *arguments: str) -> str:
        """Builds a target of the Dockerfile on `BASE` and returns its name.

        Args:
            target: the stage.
            arguments: build arguments, `NAME=VALUE`.
        """
        image = f"localhost/blockdex:{target}"
        pip = self._folder / "pip.conf"
        pip.write_text(_pip_configuration(), encoding="utf-8")
        # chroot: steps run without a network namespace, so that they reach what this machine reaches.
        self.buildah(
            *("build", "--isolation", "chroot", "--layers", "--format", "docker"),
            *("--secret", f"id=pip.conf,src={pip}"),
            *(option for path in _pip_files() for option in ("--volume", f"{path}:{path}:ro")),
            *(option for each in (f"BASE={BASE}", *arguments) for option in ("--build-arg", each)),
            *("--target", target, "--tag", image, str(REPOSITORY)),
            seconds=900,
        )
        return image

    def configuration(self, image: str) -> dict[str, Any]:
        """What the image says of itself: user, environment, entry point, health check."""
        configuration: dict[str, Any] = json.loads(self.buildah("inspect", "--type", "image", image))["Docker"][
            "config"
        ]
        return configuration

    @contextlib.contextmanager
    def root_of(self, image: str) -> Iterator[Path]:
        """A new container's root folder, mounted."""
        container = self.buildah("from", image)
        try:
            yield Path(self.buildah("mount", container))
        finally:
            self.buildah("umount", container)
            self.buildah("rm", container)

    def remove(self) -> None:
        """Removes every image, so that the folder can be removed."""
        self.buildah("rmi", "--all", "--force")


def _pip_settings() -> dict[str, str]:
    """How pip reaches packages on this machine, but for indexes that are folders: they may link to anywhere."""
    lines = run(program("python3", "python3"), "-m", "pip", "config", "list").splitlines()
    settings = {}
    for name, value in (line.split("=", 1) for line in lines if "=" in line):
        words = [word for word in value.strip("'").split() if not word.startswith("file:")]
        if words:
            settings[name.rpartition(".")[2]] = " ".join(words)
    return settings


def _pip_configuration() -> str:
    return "\n".join(["[global]", *(f"{name} = {value}" for name, value in _pip_settings().items()), ""])


def _pip_files() -> list[str]:
    """Files and folders of this machine that pip's configuration names."""
    words = " ".join(_pip_settings().values()).split()
    return sorted({word for word in words if word.startswith("/") and Path(word).exists()})


@dataclass
class Container:
    """A container that runs.

    Attributes:
        identity: its name for runc.
        process: runc itself, which ends with the container and with its status.
        output: the file that has what the container prints.
        state: the folder where runc keeps what it knows.
    """

    identity: str
    process: subprocess.Popen[bytes]
    output: Path
    state: Path

    def execute(self, *command: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
        """Runs a command in the container, as its user."""
        runc = (program("runc", "runc"), "--root", str(self.state), "exec", self.identity)
        return subprocess.run([*runc, *command], input=text, capture_output=True, text=True, timeout=60, check=False)

    def wait_until_healthy(self, probe: Sequence[str], seconds: float) -> None:
        """Runs the image's health check until it succeeds."""
        deadline = time.monotonic() + seconds
        while self.execute(*probe).returncode != 0:
            assert self.process.poll() is None, self.output.read_text(encoding="utf-8")
            assert time.monotonic() < deadline, self.output.read_text(encoding="utf-8")
            time.sleep(0.2)

    def network(self) -> Path:
        """Its network namespace, for another container to join."""
        runc = (program("runc", "runc"), "--root", str(self.state), "state", self.identity)
        return Path("/proc", str(json.loads(run(*runc))["pid"]), "ns", "net")

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        run(program("runc", "runc"), "--root", str(self.state), "kill", self.identity, "TERM")
        return self.process.wait(60)


@contextlib.contextmanager
def running(
    images: Images, image: str, service: dict[str, Any], folder: Path, *, network: Path | None = None
) -> Iterator[Container]:
    """Runs an image as a service of compose.yaml says: user, command, tmpfs, limits, read-only root, no capability.

    Args:
        images: where the image is.
        image: its name.
        service: what compose.yaml says of it.
        folder: a new one for the container's own files.
        network: a network namespace to join; without one it gets its own, with a loopback alone.
    """
    folder.mkdir()
    runc, state, output = program("runc", "runc"), folder / "state", folder / "output"
    identity = f"{folder.parent.name}-{folder.name}"
    with images.root_of(image) as root, output.open("wb") as log:
        specification = _specification(images.configuration(image), service, root, folder, network)
        (folder / "config.json").write_text(json.dumps(specification), encoding="utf-8")
        process = subprocess.Popen(
            [runc, "--root", str(state), "run", "--bundle", str(folder), identity],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            yield Container(identity, process, output, state)
        finally:
            subprocess.run(
                [runc, "--root", str(state), "delete", "--force", identity], capture_output=True, check=False
            )
            process.wait(20)


def _specification(
    image: dict[str, Any], service: dict[str, Any], root: Path, folder: Path, network: Path | None
) -> dict[str, Any]:
    run(program("runc", "runc"), "spec", "--bundle", str(folder))
    specification: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    user, group = service["user"].split(":")
    assert image["User"] == service["user"]
    specification["process"] |= {
        "terminal": False,
        "user": {"uid": int(user), "gid": int(group)},
        "args": [*service.get("entrypoint", image["Entrypoint"]), *service.get("command", image["Cmd"])],
        "env": [*image["Env"], *(f"{name}={value}" for name, value in service.get("environment", {}).items())],
        "cwd": image["WorkingDir"],
        "capabilities": {},
        "noNewPrivileges": "no-new-privileges:true" in service["security_opt"],
    }
    assert service["cap_drop"] == ["ALL"]
    specification["root"] = {"path": str(root), "readonly": service["read_only"]}
    specification["mounts"] += [_tmpfs(each) for each in service["tmpfs"]]
    specification["mounts"] += [_volume(each, folder) for each in service["volumes"]]
    limits = service["deploy"]["resources"]["limits"]
    specification["linux"]["resources"] |= {
        "pids": {"limit": limits["pids"]},
        "memory": {"limit": int(limits["memory"].removesuffix("g")) * 2**30},
    }
    if network is not None:
        (own,) = [each for each in specification["linux"]["namespaces"] if each["type"] == "network"]
        own["path"] = str(network)
    return specification


def _tmpfs(text: str) -> dict[str, Any]:
    destination, _, options = text.partition(":")
    told = options.split(",")
    defaults = [each for each in DOCKER_TMPFS if each.removeprefix("no") not in told]
    return {"destination": destination, "type": "tmpfs", "source": "tmpfs", "options": [*defaults, *told]}


def _volume(text: str, folder: Path) -> dict[str, Any]:
    name, destination = text.split(":")
    source = folder / name
    source.mkdir()
    # A new named volume takes the owner that its folder has in the image.
    os.chown(source, USER, USER)
    return {
        "destination": destination,
        "type": "bind",
        "source": str(source),
        "options": ["bind", "rw", "nosuid", "nodev"],
    }
