"""The documentation site builds strictly, leads nowhere wrong, and loads nothing from elsewhere."""

from __future__ import annotations

import inspect
import re
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

import blockdex
from support.built_site import DOCS, ROOT, Page, broken, build, copy_sources


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    copy_sources(folder)
    built = build(folder)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder / "site"


def test_no_link_is_broken(site: Path) -> None:
    assert list(broken(site)) == []


def test_a_browser_loads_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        assert [address for address in Page(path).assets if re.match(r"(\w+:)?//", address)] == [], path
    for path in site.rglob("*.css"):
        style = path.read_text(encoding="utf-8")
        assert "@import" not in style, path
        assert re.findall(r"url\([\"']?(?:https?:)?//[^)]*\)", style) == [], path


def test_every_page_is_in_the_navigation() -> None:
    config = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    listed = re.findall(r"\"([^\"]+\.md)\"", str(tomllib.loads(config)["project"]["nav"]).replace("'", '"'))
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_every_page_has_its_title(site: Path) -> None:
    for path in DOCS.rglob("*.md"):
        (title,) = re.findall(r"^# (.+)$", re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL), re.M)
        page = (site / path.relative_to(DOCS)).with_suffix(".html").read_text(encoding="utf-8")
        assert f"<title>{title}" in page, path


def test_the_reference_has_every_public_name_and_method(site: Path) -> None:
    anchors = Page(site / "python.html").anchors
    # Reasons and the errors of their codes have a page of their own.
    elsewhere = {"Code", "Reason", "__version__"} | {name for name in blockdex.__all__ if name.endswith("Error")}
    assert {f"blockdex.{name}" for name in {*blockdex.__all__} - elsewhere} <= anchors
    for kind in (blockdex.Client, blockdex.AsyncClient):
        methods = [name for name, _ in inspect.getmembers(kind, callable) if not name.startswith("_")]
        assert len(methods) > 10
        assert {f"blockdex.{kind.__name__}.{name}" for name in methods} <= anchors


def test_every_page_tells_the_version(site: Path) -> None:
    for path in DOCS.rglob("*.md"):
        page = (site / path.relative_to(DOCS)).with_suffix(".html").read_text(encoding="utf-8")
        assert f"blockdex {blockdex.__version__}, Apache-2.0" in page, path


def test_the_diagram_can_be_read_on_a_phone() -> None:
    drawing = (DOCS / "data-path.svg").read_text(encoding="utf-8")
    width, *_ = re.findall(r'viewBox="0 0 (\d+) ', drawing)
    sizes = [float(size) for size in re.findall(r'font-size[=:] ?"?(\d+)', drawing)]
    phone, margins = 390, 2 * 16
    assert min(sizes) * (phone - margins) / float(width) > 11


def test_every_alert_leads_to_its_runbook(site: Path) -> None:
    (group,) = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]:
        address = urlsplit(rule["annotations"]["runbook_url"])
        assert address.fragment == rule["alert"].lower()
        assert address.fragment in Page(site / address.path.removeprefix("/")).anchors


def test_the_strict_build_refuses_broken_links(tmp_path: Path) -> None:
    page = copy_sources(tmp_path) / "index.md"
    lines = "[to](nowhere.md)\n[to](index.md#nowhere)\n[to](#nowhere)\n"
    page.write_text(f"{page.read_text(encoding='utf-8')}\n{lines}", encoding="utf-8")
    built = build(tmp_path)
    assert built.returncode != 0
    assert "3 issues found" in built.stdout + built.stderr


def test_what_the_strict_build_lets_through_is_found(tmp_path: Path) -> None:
    docs = copy_sources(tmp_path)
    (docs / "dependencies.md").unlink()
    page = docs / "index.md"
    page.write_text("# blockdex\n\n![](nowhere.png)\n\n[to](../LICENSE)\n\n<a href='metrics.html#nowhere'>to</a>\n")
    for other in set(docs.glob("*.md")) - {page}:
        other.write_text(f"# {other.stem}\n", encoding="utf-8")
    built = build(tmp_path)
    assert built.returncode == 0, built.stdout + built.stderr
    found = set(broken(tmp_path / "site"))
    assert {"index.html: nowhere.png", "index.html: ../LICENSE", "index.html: metrics.html#nowhere"} < found
    assert any("dependencies" in line for line in found)
