"""The Python code of the documentation, run page by page against a real server; it prints what the page shows.

The blocks of a page are one program. A `text` block straight after one is what that one prints; without it, it prints
nothing.
"""

from __future__ import annotations

import contextlib
import io
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from blockdex.server.config import ServeSettings
from support.built_site import DOCS, ROOT
from support.serving import Serving, serve

ADDRESS = ServeSettings.model_fields["grpc_address"].default
_BLOCK = re.compile(r"^( *)```python\n(.*?)^ *```\n(?:\n*\1```text\n(.*?)^ *```$)?", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A block of code, the line of the page that it begins after, and what it prints."""

    line: int
    code: str
    output: str


def _blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in _BLOCK.finditer(text):
        _, code, output = found.groups(default="")
        line = text[: found.start()].count("\n") + 1
        yield Block(line, textwrap.dedent(code), textwrap.dedent(output))


PAGES = [page for page in sorted(DOCS.glob("*.md")) if any(_blocks(page))]


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serve("--device", "cpu", "--cache-bytes", "256MiB") as serving:
        yield serving


def _run(page: Path, address: str) -> Iterator[tuple[Block, str]]:
    """Runs a page's blocks one after another; yields each with what it printed."""
    names: dict[str, Any] = {"__name__": f"docs.{page.stem}"}
    for block in _blocks(page):
        # Blank lines before the code, so that a traceback names the line of the page.
        source = "\n" * block.line + block.code.replace(ADDRESS, address)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source, page, "exec"), names)
        yield block, printed.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_and_prints_what_it_shows(
    page: Path, server: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "proto").symlink_to(ROOT / "proto")
    for block, printed in _run(page, server.grpc_address):
        assert printed == block.output, f"{page}:{block.line}"


def test_the_pages_that_promise_code_have_some() -> None:
    assert {"quickstart", "concepts", "integration"} <= {page.stem for page in PAGES}


def test_every_block_of_python_is_run() -> None:
    for page in DOCS.rglob("*.md"):
        assert page.read_text(encoding="utf-8").count("```python") == len(list(_blocks(page))), page


def test_what_differs_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n```python\nprint(x)\n```\n\n```text\n2\n```\n", encoding="utf-8")
    assert [printed == block.output for block, printed in _run(page, ADDRESS)] == [True, False]
