"""Chromium, and a look at a server's page through it."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from playwright.sync_api import Browser, Page, sync_playwright

from support.programs import program

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # The browser's own errands look for hosts too.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)

# How much what is seen has moved by itself so far: https://web.dev/articles/cls
WATCH_SHIFTS = """
window.shifts = [];
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) window.shifts.push(entry.value);
}).observe({ type: "layout-shift", buffered: true });
"""


@dataclass
class Look:
    """A page that is open.

    Attributes:
        page: the page.
        requests: addresses that it asked for.
        complaints: what it wrote to the console, and errors that nothing caught.
    """

    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def text(self, selector: str) -> str:
        """What the reader sees there."""
        return self.page.locator(selector).inner_text().strip()

    def eventually(self, holds: Callable[[], bool], what: str) -> None:
        """Waits until something holds; the browser's events come in meanwhile."""
        deadline = time.monotonic() + 8
        while not holds():
            assert time.monotonic() < deadline, f"never: {what}"
            self.page.wait_for_timeout(50)

    def two_more_answers(self) -> None:
        """Waits until the page has asked twice more, and thus has shown one more answer at least."""
        asked = len(self.requests)
        self.eventually(lambda: len(self.requests) >= asked + 2, "the page asks again")

    def row(self, table: str, head: str) -> list[str]:
        """The cells of a table's row, by the words at its head."""
        rows = self.page.locator(f"#{table} tbody tr").all_inner_texts()
        (row,) = [row for row in rows if re.split(r"\t", row)[0].replace("\n", "").strip() == head]
        return [cell.strip() for cell in row.split("\t")[1:]]


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A browser without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program("chromium", "chromium"), args=FLAGS)
        yield browser
        browser.close()


@contextlib.contextmanager
def look(
    browser: Browser, address: str, *, width: int = 1280, height: int = 900, scheme: Literal["light", "dark"] = "light"
) -> Iterator[Look]:
    """Opens the page of the server whose HTTP address is given, and waits until it shows numbers."""
    with browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme) as context:
        page = context.new_page()
        page.set_default_timeout(10_000)
        opened = Look(page)
        page.on("request", lambda request: opened.requests.append(request.url))
        page.on("console", lambda message: opened.complaints.append(message.text))
        page.on("pageerror", lambda error: opened.complaints.append(str(error)))
        page.add_init_script(WATCH_SHIFTS)
        page.goto(f"http://{address}/")
        page.locator("main").wait_for()
        yield opened
