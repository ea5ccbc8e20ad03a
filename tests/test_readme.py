"""What the README says, held against what is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from blockdex.server.config import ServeSettings, settings_table
from blockdex.v1 import indexer_pb2 as pb
from support.serving import serve

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_example_runs_as_printed() -> None:
    """On a server as it is without flags, but for its ports, which are free ones."""
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(example.splitlines()) <= 15
    address = ServeSettings.model_fields["grpc_address"].default
    assert address in example
    with serve("--device", "auto") as server:
        command = [sys.executable, "-c", example.replace(address, server.grpc_address)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(1, 4, 16) [")


def test_every_rpc_is_in_the_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `", README, re.MULTILINE)
    assert rows == [method.name for method in pb.DESCRIPTOR.services_by_name["IndexerService"].methods]


def test_every_setting_is_in_the_table() -> None:
    rows = re.findall(r"^\| `(--[a-z0-9-]+ \S+)` \| (?:`(.*?)`)? ?\| (.*) \|$", README, re.MULTILINE)
    told = re.findall(r"^  (--[a-z0-9-]+ \S+) +\S+ +(\S+)\n +(.*)$", settings_table(), re.MULTILINE)
    assert rows == [(flag, "" if default == "-" else default, what) for flag, default, what in told]


def test_every_file_that_it_links_to_is_there() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (Path(__file__).parent.parent / link).exists(), link
