"""What the files of `deploy/` say, read for tests."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from blockdex.server.config import ServeSettings, load_settings
from support.programs import REPOSITORY, program, run

DEPLOY = REPOSITORY / "deploy"

Resource = dict[str, Any]
"""One of Kubernetes."""


def read_yaml(path: Path) -> Any:
    """The one document of a YAML file."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def services(*names: str) -> dict[str, dict[str, Any]]:
    """The services of `deploy/compose.yaml`, with other files of that folder on top, as Docker Compose merges them."""
    merged: Any = {}
    for name in ("compose.yaml", *names):
        merged = _merged(merged, read_yaml(DEPLOY / name))
    of_services: dict[str, dict[str, Any]] = merged["services"]
    return of_services


def _merged(below: Any, above: Any) -> Any:
    """Mappings key by key, sequences one behind the other, anything else, and what is a command, from above."""
    if isinstance(below, dict) and isinstance(above, dict):
        both = {key for key in above if key in below and key not in {"command", "test"}}
        return below | above | {key: _merged(below[key], above[key]) for key in both}
    if isinstance(below, list) and isinstance(above, list):
        return below + above
    return above


@cache
def kubectl() -> str:
    """Where kubectl is, new enough for the manifests."""
    path = program("kubectl", "kubernetes-client")
    version = json.loads(run(path, "version", "--client", "--output", "json"))["clientVersion"]
    assert int(version["minor"].rstrip("+")) >= 21, (
        f"{path} is {version['gitVersion']}, whose kustomize is too old: 1.21"
    )
    return path


@cache
def built(folder: str) -> list[Resource]:
    """The resources of a folder of `deploy/kubernetes`, overlays applied."""
    return list(yaml.safe_load_all(run(kubectl(), "kustomize", DEPLOY / "kubernetes" / folder)))


def image_settings() -> dict[str, str]:
    """The BLOCKDEX_* variables that every image sets."""
    dockerfile = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    return dict(re.findall(r"^(?:ENV)? +(BLOCKDEX_(?:GRPC|HTTP)_ADDRESS)=(\S+)", dockerfile, re.MULTILINE))


def settings_of(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> ServeSettings:
    """What `blockdex serve` reads in a container with these variables on top of the image's own."""
    for name, value in (image_settings() | environment).items():
        monkeypatch.setenv(name, value)
    known = {f"BLOCKDEX_{field.alias or name}".upper() for name, field in ServeSettings.model_fields.items()}
    assert {name for name in environment if name.startswith("BLOCKDEX_")} <= known
    return load_settings([])
