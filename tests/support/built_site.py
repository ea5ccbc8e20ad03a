"""The documentation site, built from a copy of its sources, and what its pages link to."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"
BUILD_SECONDS = 60.0


def copy_sources(folder: Path) -> Path:
    """Copies what the site is built from; the answer is the copy of `docs/`."""
    shutil.copy(ROOT / "zensical.toml", folder)
    (folder / "service").symlink_to(ROOT / "service")
    return Path(shutil.copytree(DOCS, folder / "docs"))


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    """Builds the sources in a folder strictly, into its `site/`."""
    return subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=BUILD_SECONDS,
        check=False,
    )


class Page(HTMLParser):
    """A page of the site.

    Attributes:
        anchors: the ids in it.
        links: where it leads.
        assets: what a browser loads with it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.assets: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Takes up one element."""
        values = {name: value for name, value in attrs if value is not None}
        if "id" in values:
            self.anchors.add(values["id"])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and "href" in values:
            self.assets.append(values["href"])
        if "src" in values:
            self.assets.append(values["src"])


def broken(site: Path) -> Iterator[str]:
    """Every link and asset inside a built site that leads nowhere, with the page it is on."""
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
    for path, page in pages.items():
        for address in page.links + page.assets:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            folder = site.resolve() if parts.path.startswith("/") else path.parent
            target = (folder / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (
                parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors
            ):
                yield f"{path.relative_to(site.resolve())}: {address}"
