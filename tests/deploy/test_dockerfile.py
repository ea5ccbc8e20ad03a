"""The Dockerfile and what it pins, as far as that can be seen without building it."""

from __future__ import annotations

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from support.programs import BIN, REPOSITORY, run

DOCKERFILE = REPOSITORY / "Dockerfile"
LOCKS = REPOSITORY / "deploy" / "requirements"
PYTHONS = ("3.11", "3.12", "3.13")


def locked(name: str) -> list[Requirement]:
    """The requirements of a lock; each has hashes and one version."""
    text = (LOCKS / name).read_text(encoding="utf-8")
    lines = re.sub(r" \\\n +", " ", text).splitlines()
    requirements = []
    for line in lines:
        if not line.startswith("#"):
            requirement, *hashes = re.split(r" --hash=sha256:(?=[0-9a-f]{64}\b)", line)
            assert hashes, f"{name}: no hash: {line}"
            assert re.search("==[^,]+$", str(Requirement(requirement).specifier)), f"{name}: no one version: {line}"
            requirements.append(Requirement(requirement))
    return requirements


def pins(name: str, python: str) -> dict[str, str]:
    """Versions by package, of those that a Linux with that Python gets."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
        "platform_system": "Linux",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    chosen = [pin for pin in locked(name) if pin.marker is None or pin.marker.evaluate(environment)]
    versions: dict[str, str] = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in chosen}
    assert len(versions) == len(chosen), f"{name} has a package twice for Python {python}"
    return versions


def declared(*extras: str) -> list[Requirement]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    if extras == ("build",):
        return [Requirement(line) for line in project["build-system"]["requires"]]
    lines = [*project["project"]["dependencies"]]
    for extra in extras:
        lines += project["project"]["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


def test_hadolint_has_no_complaint() -> None:
    assert run(BIN / "hadolint", DOCKERFILE) == ""


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(
    ("name", "extras", "elsewhere"),
    [
        ("build.txt", ["build"], set()),
        ("server.txt", ["server", "loadtest", "tracing", "gpu"], set()),
        ("cpu.txt", ["server", "loadtest", "tracing"], {"torch", "triton"}),
        ("engine.txt", ["server", "loadtest", "tracing", "examples"], {"torch", "triton"}),
    ],
)
def test_a_lock_has_what_the_project_asks_for(name: str, extras: list[str], elsewhere: set[str], python: str) -> None:
    versions = pins(name, python)
    for requirement in declared(*extras):
        package = canonicalize_name(requirement.name)
        if package in elsewhere:
            assert package not in versions
        else:
            assert versions[package] in requirement.specifier, f"{name}, Python {python}: {requirement}: make lock"


@pytest.mark.parametrize("python", PYTHONS)
def test_the_cpu_locks_have_the_versions_of_the_server_and_no_cuda(python: str) -> None:
    server, cpu, engine = (pins(name, python) for name in ("server.txt", "cpu.txt", "engine.txt"))
    assert any(package.startswith("nvidia-") for package in server)
    left_out = {package for package in server if package not in cpu}
    assert {name for name in left_out if not name.startswith(("nvidia-", "cuda-"))} == {"torch", "triton"}
    assert cpu == {package: version for package, version in server.items() if package not in left_out}
    assert cpu.items() <= engine.items()


def test_torch_is_the_tested_one_in_every_image() -> None:
    constraints = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    (tested,) = re.findall(r"^torch==(\S+)$", constraints, re.MULTILINE)
    assert pins("server.txt", "3.12")["torch"] == tested
    assert f"\nARG TORCH_VERSION={tested}+cpu\n" in DOCKERFILE.read_text(encoding="utf-8")


def test_no_package_registry_is_named() -> None:
    for path in (DOCKERFILE, *LOCKS.iterdir()):
        if path.is_file():
            assert not re.search(r"https?://|--(extra-)?index-url [^$\"]|\.org\b", path.read_text(encoding="utf-8")), (
                path
            )
