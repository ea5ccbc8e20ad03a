"""What the page asks for: bounded, made once a second, and without names."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

import blockdex
from blockdex.frontend.http.app import PAGE_FILES, PAGE_HEADERS
from blockdex.frontend.http.live_page import MAX_CELLS
from support.processes import eventually
from support.serving import Serving, serve


def get(server: Serving, path: str) -> httpx.Response:
    return httpx.get(f"http://{server.http_address}{path}")


def made_anew(server: Serving) -> httpx.Response:
    """What is made after all that was done before."""
    before = get(server, "/v1/live").content
    eventually(lambda: get(server, "/v1/live").content != before, "it is made anew")
    return get(server, "/v1/live")


def test_the_page_and_its_files_let_nothing_else_in(server: Serving) -> None:
    policy = dict(part.split(" ", 1) for part in PAGE_HEADERS["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert set(policy.values()) == {"'none'", "'self'"}
    for path, (_, content_type) in PAGE_FILES.items():
        answer = get(server, path)
        assert (answer.status_code, answer.headers["content-type"]) == (200, content_type)
        assert PAGE_HEADERS.items() <= dict(answer.headers).items()
        assert "http://" not in answer.text.replace("http://www.w3.org/", "")
        assert "https://" not in answer.text


def test_it_names_nobody(server: Serving) -> None:
    sequence = 8_461_927_350_164  # digits that no float of the figures shows by chance, as repeating ones would
    with blockdex.Client(server.grpc_address, tenant="Reynholm-Industries") as client:
        client.open_sequence(sequence)
        client.append_keys(layer=0, sequences=[sequence], lengths=[3], keys=np.full((3, 128), 0.3333, np.float32))
        body = made_anew(server).text
        client.close_sequence(sequence)
    assert json.loads(body)["sequences"]["open"] >= 1
    assert "Reynholm" not in body
    assert str(sequence) not in body


@pytest.mark.alone
def test_it_is_made_at_most_once_a_second(server: Serving) -> None:
    # One client, since making one takes longer than asking.
    with httpx.Client(base_url=f"http://{server.http_address}") as asking:

        def body() -> bytes:
            return asking.get("/v1/live").content

        before = body()
        while body() == before:  # until a second has just begun
            time.sleep(0.02)
        with ThreadPoolExecutor(4) as pool:
            bodies = set(pool.map(lambda _: body(), range(8)))
    assert len(bodies) == 1
    assert get(server, "/v1/live").headers["cache-control"] == "no-store"


@pytest.fixture(scope="module")
def many_pages() -> Iterator[Serving]:
    """A server of 10,922 small pages."""
    with serve("--num-layers", "1", "--cache-bytes", "341.3125MiB", "--device", "cpu") as serving:
        yield serving


@pytest.mark.slow
def test_many_pages_share_a_cell(many_pages: Serving) -> None:
    with blockdex.Client(many_pages.grpc_address) as client:
        client.open_sequence(1)
        client.append_keys(layer=0, sequences=[1], lengths=[1000], keys=np.ones((1000, 128), np.float32))
        answer = made_anew(many_pages)
    cache = answer.json()["cache"]
    assert cache["pages"] == {"total": 10922, "free": 10914, "private": 8, "shared": 0, "idle": 0}
    assert cache["cells"]["pages_per_cell"] == 3
    assert len(cache["cells"]["private"]) == 3641 <= MAX_CELLS
    assert cache["cells"]["private"][:4] == [3, 3, 2, 0]
    assert len(answer.content) < 64 * 1024
