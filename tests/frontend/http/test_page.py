"""The page in a real browser, on a real server under real load."""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

import grpc
import httpx
import numpy as np
import pytest
from playwright.sync_api import Browser, expect
from prometheus_client.parser import text_string_to_metric_families

import blockdex
from blockdex.v1 import indexer_pb2 as pb
from blockdex.v1 import indexer_pb2_grpc as pb_grpc
from support.browsing import Look, chromium, look
from support.processes import eventually
from support.serving import SMALL, Serving, serve

GROUNDS: dict[Literal["light", "dark"], str] = {"light": "rgb(244, 245, 247)", "dark": "rgb(14, 17, 21)"}
SPEC_LAYERS, HEADS, HEAD_DIM = 3, 4, 128
STATES = ("free", "private", "shared", "idle")
PAGE_FILES = {"/", "/page.css", "/page.js", "/icon.svg", "/v1/live"}

# Of all words that are seen, those with too little contrast to what is behind them: at least 4.5 to 1 (WCAG 2, AA).
LOW_CONTRAST = """() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    const found = channels(getComputedStyle(node).backgroundColor);
    return found.length === 3 || found[3] === 1 || !node.parentElement ? found : behind(node.parentElement);
  };
  const low = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.checkVisibility()) continue;
    const pair = [luminance(channels(getComputedStyle(node).color)), luminance(behind(node))].sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (ratio < 4.5) low.push(`${walker.currentNode.data.trim()}: ${ratio.toFixed(2)}`);
  }
  return low;
}"""

# Panels and cells whose contents are wider than they are.
CUT_OFF = """() => [...document.querySelectorAll(".panel, .tile, .tile p, .scale, th, td")]
  .filter((node) => node.scrollWidth > node.clientWidth + 1)
  .map((node) => `${node.innerText}: ${node.scrollWidth} in ${node.clientWidth}`)"""

# Pixels of the map in the colour of each state.
MAP_PIXELS = """() => {
  const canvas = document.getElementById("map");
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
  copy.drawImage(canvas, 0, 0);
  const { data } = copy.getImageData(0, 0, canvas.width, canvas.height);
  const probe = document.createElement("i");
  canvas.after(probe);
  const counts = {};
  for (const state of ["free", "private", "shared", "idle"]) {
    probe.style.color = `var(--${state})`;
    const [r, g, b] = getComputedStyle(probe).color.match(/\\d+/g).map(Number);
    counts[state] = 0;
    for (let i = 0; i < data.length; i += 4) {
      if (data[i] === r && data[i + 1] === g && data[i + 2] === b && data[i + 3] === 255) counts[state] += 1;
    }
  }
  probe.remove();
  return counts;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def shown() -> Iterator[Serving]:
    """A server of this module's own, so that nothing else happens on it."""
    with serve(*SMALL, "--shutdown-grace-seconds", "4") as serving:
        yield serving


@pytest.fixture
def client(shown: Serving) -> Iterator[blockdex.Client]:
    with blockdex.Client(shown.grpc_address, tenant="page") as connected:
        yield connected


def keys(tokens: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return np.ones((tokens, HEAD_DIM), np.float32)


def step(client: blockdex.Client, sequence: int, tokens: int) -> None:
    """Appends to every layer and selects for the last token."""
    for layer in range(SPEC_LAYERS):
        client.append_keys(layer=layer, sequences=[sequence], lengths=[tokens], keys=keys(tokens))
        client.select_blocks(
            layer=layer, sequences=[sequence], lengths=[1], queries=np.ones((1, HEADS, HEAD_DIM), np.float32)
        )


def samples(server: Serving) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(httpx.get(f"http://{server.http_address}/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def quantile(server: Serving, name: str, share: float, **labels: str) -> float:
    """As PromQL's `histogram_quantile` would say, of everything since the start."""
    series = samples(server)[f"{name}_bucket"]
    buckets = [(float(of["le"]), count) for of, count in series if labels.items() <= of.items()]
    rank = share * buckets[-1][1]
    for (lower, below), (upper, count) in pairwise([(0.0, 0.0), *buckets]):
        if count >= rank:
            return lower + (upper - lower) * (rank - below) / (count - below)
    raise AssertionError("no bucket")


def seconds(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"µs": 1e-6, "ms": 1e-3, "s": 1.0}[unit]


def number(text: str) -> float:
    return float(text.replace(",", ""))


@contextlib.contextmanager
def under_load(server: Serving) -> Iterator[None]:
    stop = threading.Event()

    def load() -> None:
        with blockdex.Client(server.grpc_address, tenant="load") as client:
            for sequence in itertools.count():
                if stop.is_set():
                    return
                client.open_sequence(sequence)
                step(client, sequence, 200)
                client.close_sequence(sequence)

    loading = threading.Thread(target=load)
    loading.start()
    try:
        yield
    finally:
        stop.set()
        loading.join()


def window_shown(seen: Look) -> int:
    """Seconds that the tables speak of."""
    return int(seen.text(".calls .window").split()[1])


def pages_shown(seen: Look) -> dict[str, int]:
    return {state: int(number(seen.row("pages", state)[-3])) for state in STATES}


def test_its_numbers_are_those_of_the_metrics(browser: Browser, shown: Serving, client: blockdex.Client) -> None:
    client.open_sequence(1)
    for _ in range(20):
        step(client, 1, 30)
    client.fork_sequence(1, 2, 500)
    with pytest.raises(blockdex.NotFoundError):
        client.get_sequence(3)
    live = f"http://{shown.http_address}/v1/live"
    earlier = httpx.get(live).content
    eventually(lambda: httpx.get(live).content != earlier, "the server looks at its own counters again")
    with look(browser, shown.http_address) as seen:
        # All that this server ever did lies within the minute that the page shows.
        seen.eventually(lambda: 3 <= window_shown(seen) < 60, "some seconds are shown, and all of them")
        metrics = samples(shown)
        codes: dict[str, float] = {}
        for labels, value in metrics["blockdex_requests_total"]:
            codes[labels["code"]] = codes.get(labels["code"], 0) + value
        assert codes == {"OK": 123, "NOT_FOUND": 1}
        for code, value in codes.items():
            assert [number(cell) for cell in seen.row("codes", code)] == [value, value]
        assert seen.row("calls", "Stream/GetSequence")[-1] == "1"
        assert seen.text("#sequences-open") == "2"
        assert seen.text("#sequences-tokens") == "1,100"
        pages = {labels["state"]: value for labels, value in metrics["blockdex_pages"]}
        assert pages_shown(seen) == pages | {"idle": 0}
        assert (pages["shared"], pages["private"]) == (3, 3)
        for table, metric, of, name in (
            ("stages", "blockdex_stage_duration_seconds", {"phase": "decode", "stage": "queue"}, "decode queue"),
            ("stages", "blockdex_stage_duration_seconds", {"phase": "append", "stage": "device"}, "append device"),
            ("stages", "blockdex_stage_duration_seconds", {"phase": "sequence", "stage": "plan"}, "sequence plan"),
            ("calls", "blockdex_request_duration_seconds", {"rpc": "Stream/AppendKeys"}, "Stream/AppendKeys"),
            ("calls", "blockdex_request_duration_seconds", {"rpc": "Stream/GetSequence"}, "Stream/GetSequence"),
        ):
            before = window_shown(seen)
            rate, p50, p99 = seen.row(table, name)[:3]
            count = next(value for labels, value in metrics[f"{metric}_count"] if labels == of)
            assert count / (window_shown(seen) + 1) < number(rate) < count / (before - 1)  # shown as whole seconds
            assert seconds(p50) == pytest.approx(quantile(shown, metric, 0.5, **of), rel=0.01)
            assert seconds(p99) == pytest.approx(quantile(shown, metric, 0.99, **of), rel=0.01)
        sizes = seen.page.locator("#batches tbody td:nth-child(2)").all_inner_texts()
        assert sum(map(number, sizes)) == metrics["blockdex_batch_requests_count"][0][1]
        info = httpx.get(f"http://{shown.http_address}/v1/info").json()
        assert seen.text("#epoch") == info["epoch"]
        assert seen.row("kernels", "decode")[0] == info["kernels"][1]["kernel"]
        assert seen.row("limits", "max spans") == ["4,096"]
        assert seen.row("limits", "max message bytes") == ["128 MiB"]
        past = httpx.get(live).json()["seconds"]
        assert (max(past["errors"]) > 0, max(past["faults"])) == (True, 0)
        of_decodes = {"phase": "decode"}.items()
        spent = [of for of in metrics["blockdex_stage_duration_seconds_sum"] if of_decodes <= of[0].items()]
        took = [seconds for seconds in past["decode_seconds"] if seconds is not None]
        (decodes,) = [
            of[1]
            for of in metrics["blockdex_stage_duration_seconds_count"]
            if of[0] == {"phase": "decode", "stage": "queue"}
        ]
        assert min(took) <= sum(seconds for _, seconds in spent) / decodes * 1.001
        assert max(took) >= sum(seconds for _, seconds in spent) / decodes * 0.999
    for sequence in (1, 2):
        client.close_sequence(sequence)


def test_it_is_calm_and_readable(browser: Browser, shown: Serving) -> None:
    with under_load(shown), look(browser, shown.http_address) as seen:
        seen.two_more_answers()
        assert number(seen.page.locator(".tile .value").first.inner_text()) > 0
        assert sum(seen.page.evaluate("window.shifts")) < 0.001
        for width in (1280, 375):
            seen.page.set_viewport_size({"width": width, "height": 900})
            assert seen.page.evaluate("document.documentElement.scrollWidth") == width
            assert seen.page.evaluate(CUT_OFF) == []
            for scheme, ground in GROUNDS.items():
                seen.page.emulate_media(color_scheme=scheme)
                assert seen.page.evaluate("getComputedStyle(document.body).backgroundColor") == ground
                assert seen.page.evaluate(LOW_CONTRAST) == []
        assert seen.complaints == []
        assert set(seen.requests) == {f"http://{shown.http_address}{path}" for path in PAGE_FILES}


def test_the_map_shows_what_sequences_do(browser: Browser, shown: Serving, client: blockdex.Client) -> None:
    with look(browser, shown.http_address) as seen:
        total = sum(pages_shown(seen).values())

        def become(**pages: int) -> None:
            expected = {state: pages.get(state, 0) for state in STATES}
            expected["free"] = total - sum(pages.values())
            seen.eventually(lambda: pages_shown(seen) == expected, f"the page shows {expected}")
            pixels = seen.page.evaluate(MAP_PIXELS)
            drawn = sum(pixels.values())
            for state, count in expected.items():
                assert pixels[state] / drawn == pytest.approx(count / total, abs=0.004), state

        client.open_sequence(102, lease_seconds=1)
        step(client, 102, 7 * 128)
        client.open_sequence(100)
        step(client, 100, 20 * 128)
        become(private=27)
        client.fork_sequence(100, 101, 20 * 128)
        become(shared=20, idle=7)
        client.close_sequence(100)
        become(private=20, idle=7)
        assert seen.text("#sequences-idle") == "1"
        assert seen.row("lengths", "1,024")[-1] == "1"

        seen.page.locator("#map").focus()
        seen.page.keyboard.press("ArrowRight")
        assert seen.text("#map-cell").startswith("Page 0: ")
        seen.page.keyboard.press("ArrowDown")
        assert seen.text("#map-cell") != "Page 0: "
        for sequence in (101, 102):
            client.close_sequence(sequence)
        become()
        assert seen.complaints == []


def test_a_server_that_does_not_answer_and_comes_back(browser: Browser, shown: Serving) -> None:
    with look(browser, shown.http_address) as seen:
        status = seen.page.locator("#status")
        expect(status).to_have_text("Serving")
        shown.process.send_signal(signal.SIGSTOP)
        try:
            expect(status).to_contain_text("Unreachable since", timeout=6000)
            expect(seen.page.locator("main.stale")).to_have_count(1)
            assert seen.page.title() == "blockdex, unreachable"
        finally:
            shown.process.send_signal(signal.SIGCONT)
        expect(status).to_have_text("Serving", timeout=6000)
        expect(seen.page.locator("main.stale")).to_have_count(0)
        assert seen.page.title() == "blockdex"
        assert seen.complaints == []


@pytest.mark.slow
def test_nobody_looks_nothing_is_asked(browser: Browser, shown: Serving) -> None:
    with look(browser, shown.http_address) as seen:
        show = "document.dispatchEvent(new Event('visibilitychange'))"
        seen.page.evaluate(f"Object.defineProperty(document, 'hidden', {{ value: true, writable: true }}); {show}")
        seen.page.wait_for_timeout(300)
        asked = len(seen.requests)
        seen.page.wait_for_timeout(2000)
        assert len(seen.requests) == asked
        seen.page.evaluate(f"document.hidden = false; {show}")
        seen.eventually(lambda: len(seen.requests) > asked, "it asks again")


@pytest.mark.slow
def test_a_server_that_stops(browser: Browser, shown: Serving, client: blockdex.Client) -> None:
    tokens, queries, asked = 20_000, 8_000, 10  # more than the four seconds of grace suffice for
    client.open_sequence(200)
    client.append_keys(layer=0, sequences=[200], lengths=[tokens], keys=keys(tokens))
    request = pb.SelectBlocksRequest(
        layer=0,
        spans=pb.Spans(sequence_ids=[200], starts=[tokens - queries], lengths=[queries]),
        queries=pb.Tensor(dtype=pb.DTYPE_BF16, data=bytes(queries * HEADS * HEAD_DIM * 2)),
    )
    with look(browser, shown.http_address) as seen, grpc.insecure_channel(shown.grpc_address) as channel:
        select = pb_grpc.IndexerServiceStub(channel).SelectBlocks
        prefills = [select.future(request, metadata=(("blockdex-tenant", "page"),), timeout=60) for _ in range(asked)]
        seen.eventually(lambda: seen.text('.tile[data-key="prefill"] .value') != "0", "a prefill runs")
        shown.process.send_signal(signal.SIGTERM)
        expect(seen.page.locator("#status")).to_have_text("Not ready: shutting down")
        expect(seen.page.locator("#status")).to_contain_text("Unreachable since", timeout=10_000)
        assert prefills[-1].code() == grpc.StatusCode.UNAVAILABLE
    assert shown.wait() == 0
