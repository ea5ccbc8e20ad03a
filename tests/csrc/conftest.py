"""Programs of this folder, compiled in every way."""

from __future__ import annotations

from functools import partial

import pytest

from support.c_programs import BUILDS, Built, compiled
from support.programs import program


@pytest.fixture(
    scope="module",
    params=["here", *(pytest.param(name, marks=pytest.mark.slow) for name in BUILDS if name != "here")],
)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Gives commands that run programs of one build."""
    build, folder = BUILDS[request.param], tmp_path_factory.mktemp("programs")
    if build.runner:
        program(build.runner[0], "qemu-user")
    return partial(compiled, build, folder=folder)
