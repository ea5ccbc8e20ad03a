"""What the documentation lists, held against the code that it speaks of."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from benchmarks import client, tables
from benchmarks.environment import environment
from blockdex.cli.main import main
from blockdex.contract.errors import Code, Reason
from blockdex.server import bootstrap, config
from blockdex.v1 import indexer_pb2 as pb
from blockdex_kernels import IndexSpec
from blockdex_kernels.spec import KeyDtype
from support.built_site import DOCS, ROOT


def _page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def _rows(name: str) -> list[list[str]]:
    """The cells of every row of every table of a page, headings included."""
    lines = re.findall(r"^\| (.*) \|$", _page(name), re.MULTILINE)
    return [[cell.strip() for cell in line.split(" | ")] for line in lines]


def _told_reasons() -> dict[str, set[str]]:
    rows = [row for row in _rows("errors.md") if row[0].startswith("`")]
    assert all(len(row) == 4 and row[2] and row[3] for row in rows), "each has a cause and a remedy"
    names = [row[0].strip("`") for row in rows]
    assert len(set(names)) == len(names)
    return {row[0].strip("`"): set(re.findall(r"`(\w+)`", row[1])) for row in rows}


def test_every_reason_is_told() -> None:
    told = _told_reasons()
    assert set(told) == {reason.value for reason in Reason}
    assert {code for codes in told.values() for code in codes} <= set(Code.__members__)


def test_reasons_have_the_codes_of_the_contract() -> None:
    contract = (ROOT / "proto" / "blockdex" / "v1" / "indexer.proto").read_text(encoding="utf-8")
    words = re.sub(r"\s*//\s*", " ", contract)
    pairs = re.findall(r"\b([A-Z_]{5,}) \(([A-Z_]+(?:, [A-Z_]+)*)\)", words)
    assert len(pairs) > 20
    told = _told_reasons()
    for code, reasons in pairs:
        for reason in reasons.split(", "):
            assert code in told[reason], f"{reason} comes with {code}"


def test_every_rpc_is_told() -> None:
    service = pb.DESCRIPTOR.services_by_name["IndexerService"]
    assert re.findall(r"^\| `(\w+)` \| (?:unary|bidirectional) \|", _page("protocol.md"), re.MULTILINE) == [
        method.name for method in service.methods
    ]


def test_every_setting_is_told() -> None:
    expected = [
        [
            f"`--{name.replace('_', '-')} {metavar}`",
            "" if default is None else f"`{default}`",
            description,
        ]
        for name, metavar, default, description in config._described()
    ]
    told = re.findall(r"^\| (`--.*?`) \| (`.*?`)? ?\| (.*) \|$", _page("settings.md"), re.MULTILINE)
    assert [list(row) for row in told] == expected


def test_the_pages_agree_on_when_a_server_splits() -> None:
    assert f"On {bootstrap._CORES} cores or more, with more than one frontend" in _page("operations.md")
    (row,) = [row for row in _rows("settings.md") if row[0] == "`--processes HOW`"]
    assert f"auto: split on {bootstrap._CORES} cores or more" in row[2]


def test_the_file_of_settings_is_one(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", _page("settings.md"), re.DOTALL)
    path = tmp_path / "blockdex.toml"
    path.write_text(example, encoding="utf-8")
    settings = config.load_settings(["--config", str(path)])
    assert settings.cache_bytes == 64 * 2**30


def test_every_alert_is_told() -> None:
    alerts = re.findall(r"- alert: (\w+)", (ROOT / "deploy" / "prometheus" / "alerts.yml").read_text("utf-8"))
    assert alerts
    assert re.findall(r"^### (Blockdex\w+)$", _page("operations.md"), re.MULTILINE) == alerts


def test_every_event_of_the_log_is_told() -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "service" / "blockdex").rglob("*.py"))
    levelled = re.findall(r"log_event\(\s*logger,\s*logging\.(\w+),\s*\"([^\"]+)\"", source)
    faults = re.findall(r"log_fault\(\s*logger,\s*\"([^\"]+)\"|logger\.exception\(\"([^\"]+)\"", source)
    calls = re.findall(r"(?<!def )log_(?:event|fault)\(|logger\.(?:exception|info|warning|critical)\(", source)
    assert len(levelled) + len(faults) == len(calls)
    logged = {(event, level.lower()) for level, event in levelled} | {("".join(names), "error") for names in faults}
    section = _page("operations.md").partition("## Logs")[2]
    assert set(re.findall(r"^\| `([^`]+)` \| (\w+) \|", section, re.MULTILINE)) == logged


def test_every_target_is_told() -> None:
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    told = re.findall(r"^\| `make ([a-z-]+)` \|", _page("contributing.md"), re.MULTILINE)
    assert sorted(told) == sorted(set(targets) - {"help"})


@pytest.mark.parametrize("num_layers", [57, 58])
@pytest.mark.parametrize("key_dtype", ["bf16", "fp8_e4m3"])
def test_the_sizes(num_layers: int, key_dtype: KeyDtype) -> None:
    spec = IndexSpec(num_layers=num_layers, key_dtype=key_dtype)
    tokens = 2**30 // spec.bytes_per_page * spec.block_size
    (row,) = [row for row in _rows("sizing.md") if row[0].startswith(f"{num_layers} (") and row[1:2] == [key_dtype]]
    assert row[2:] == [f"{spec.bytes_per_token:,}", f"{spec.bytes_per_page:,}", f"{tokens:,}"]


def test_what_it_saves() -> None:
    spec, ranks = IndexSpec(), 8
    of_token = spec.bytes_per_token
    read = 8 * 8192 * of_token
    told = _page("index.md").partition("## What it saves")[2].partition("## What it costs")[0]
    rows = re.findall(r"^\| (.+) \| (.+) \| (.+) \|$", told, re.MULTILINE)
    assert [row[1:] for row in rows] == [
        (f"{ranks * of_token:,} bytes", f"{of_token:,} bytes"),
        (f"{ranks * of_token / 1e3:.1f} GB", f"{of_token / 1e3:.1f} GB"),
        (f"{ranks * read / 1e9:.2f} GB", f"{read / 1e9:.2f} GB"),
    ]


def test_what_it_costs() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "colocated-h200.json").read_text(encoding="utf-8"))
    by_way = result["parts"]["python (MPS)"]
    kernels = by_way["kernels_us"]
    expected = [(kernels, kernels * result["layers"] / 1000)]
    expected += [(by_way[way]["call_p50_us"], by_way[way]["step_p50_ms"]) for way in ("ring", "stream", "unary")]
    told = _page("index.md").partition("## What it costs")[2]
    rows = re.findall(r"^\| (.+) \| (.+) us \| (.+) ms \|$", told, re.MULTILINE)
    assert [row[1:] for row in rows] == [(f"{call:.0f}", f"{layers:.1f}") for call, layers in expected]


def test_what_a_token_costs_and_when_it_pays() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "colocated-h200.json").read_text(encoding="utf-8"))
    python, channel = result["parts"]["python (MPS)"], result["parts"]["channel (MPS)"]
    ways = (channel["alone"], channel["channel"], python["ring"], python["stream"], python["unary"])
    kernels, *_ = steps = [way["step_p50_ms"] for way in ways]
    gained = 60 * 2 * 128 * 2 / IndexSpec().bytes_per_token
    expected = [(f"{step:.1f}", f"{step - kernels:.1f}", f"{(step - kernels) * gained:.1f}") for step in steps]
    told = _page("should-i-use-this.md").partition("## What a token costs")[2]
    assert re.findall(r"^\| .+ \| (.+) ms \| (.+) ms \| (.+) ms \|$", told, re.MULTILINE) == expected


def test_what_memory_it_frees() -> None:
    told = _page("should-i-use-this.md").partition("## What memory it frees")[2]
    rows = re.findall(r"^\| ([\d,]+) \| (.+) GB \| (.+) GB \| (.+) GB \|$", told, re.MULTILINE)
    assert len(rows) == 3
    for tokens, *sizes in rows:
        held = int(tokens.replace(",", "")) * IndexSpec().bytes_per_token / 1e9
        assert sizes == [f"{held * ranks:.1f}" for ranks in (1, 4, 8)]


def test_the_plan_is_what_the_calculator_prints(capsys: pytest.CaptureFixture[str]) -> None:
    ((words, printed),) = re.findall(r"\$ blockdex (plan .*)\n```\n+```text\n(.*?)```", _page("sizing.md"), re.DOTALL)
    assert main(words.split()) == 0
    assert capsys.readouterr().out == printed


def test_the_flags_of_the_calculator_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    flags = set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE))
    told = {flag for row in _rows("sizing.md") for flag in re.findall(r"--[a-z-]+", row[0])}
    assert told == flags


def test_a_result_becomes_a_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = client.Row(64, 8192, "stream", 82_000, 4_096, 12.345, 23.456, 1.234, 2.345, 9.876, 1.111)
    facts = environment("numpy")
    result = {**facts, "rows": [dataclasses.asdict(measured)]}
    for name in ("client", "client-16-cores", "clients"):
        (tmp_path / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")
    row = {"sequences": 8, "queries": 1, "tokens": 8192, "key_dtype": "fp8_e4m3", "ours_ms": 2.0}
    row |= {"bare_ms": 3.0, "best_order_ms": 2.5, "from_bf16_ms": 5.0}
    result = {**facts, "rows": [row | {"ratios": {"bare": 1.5, "best_order": 1.25, "from_bf16": 2.5}}]}
    (tmp_path / "cpu_kernels.json").write_text(json.dumps(result), encoding="utf-8")
    figure = {"name": "decode, bf16", "measured": 1_234.5678, "unit": "us", "target": 1_000.0, "at_least": False}
    result = facts | {"rows": [figure | {"basis": "graph", "reached": 0.81}]}
    result["machine"] = facts["machine"] | {"gpu": {"name": "NVIDIA H200", "driver": "580.1"}}
    (tmp_path / "kernels-h200.json").write_text(json.dumps(result), encoding="utf-8")
    row = {"server": "split", "transport": "unary", "p50_ms": 1.234, "p99_ms": 2.345, "ratio_to_single": 0.876}
    (tmp_path / "ring.json").write_text(json.dumps(facts | {"rows": [row]}), encoding="utf-8")
    (tmp_path / "client.png").touch()
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    made = tables.measured()
    assert made.count("| 64 | 8,192 | stream | 12.35 | 23.46 | 1.23 | 2.35 | 9.88 | 1.11 |\n") == 2
    assert "| 8 | 1 | 8,192 | fp8_e4m3 | 2.00 | 3.00 (1.50) | 2.50 (1.25) | 5.00 (2.50) |\n" in made
    assert "| split | unary | 1.23 | 2.35 | 0.88 |\n" in made
    assert "**NVIDIA H200, driver 580.1**" in made
    assert "| decode, bf16 | 1,234.57 us | <= 1,000 us | 0.81 | graph |\n" in made
    assert "plots/client.png" in made and "plots/cpu_kernels.png" not in made
    assert str(facts["commit"]) in made


def test_every_plot_of_the_page_is_a_result() -> None:
    plots = re.findall(r"\(plots/(.*?)\)", _page("performance.md"))
    assert plots == [path.name for name in tables.SECTIONS for path in tables.results(name, "png")]
    for plot in plots:
        assert (DOCS / "plots" / plot).resolve() == ROOT / "benchmarks" / "results" / plot


def test_the_measured_figures_are_those_of_the_results() -> None:
    page = _page("performance.md")
    assert tables.with_results(page) == page, "make docs brings them in"
