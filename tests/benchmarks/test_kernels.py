"""The kernel benchmark, run for real on the CPU kernels beside a stand-in for its peer, and the arithmetic it tells."""

from __future__ import annotations

import json
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import kernel_figures, kernels
from benchmarks.gpu_timing import time_calls
from benchmarks.kernel_checks import flips, rows_apart
from benchmarks.kernel_inputs import LAYER, LAYERS, batches
from benchmarks.kernel_shapes import FULL, Shape
from benchmarks.kernel_versions import Blockdex, Version
from benchmarks.peers import Vllm, load_vllm
from blockdex_kernels.reference import SelectionMismatchError
from support.built_site import ROOT

CPU = torch.device("cpu")
PAGES = 40
SHAPES = {"decode": Shape(1, 1900, 3, (1500, 2300)), "prefill": Shape(1, 2300, 150, (2300,))}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like an unpacked vLLM wheel, with the stand-in in it."""
    folder = tmp_path_factory.mktemp("wheel")
    kernels_file = folder / "vllm" / "models" / "minimax_m3" / "common" / "ops" / "index_topk.py"
    kernels_file.parent.mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "support" / "vllm_stand_in.py", kernels_file)
    (folder / "vllm" / "_version.py").write_text("version = '0.0.1'\n", encoding="utf-8")
    (folder / "vllm" / "utils").mkdir()
    round_up = "def round_up(x, y):\n    return -(-x // y) * y\n"
    (folder / "vllm" / "utils" / "math_utils.py").write_text(round_up, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def versions(wheel: Path) -> dict[str, Version]:
    return {
        "bf16": Blockdex("cpu", "bf16", PAGES),
        "fp8_e4m3": Blockdex("cpu", "fp8_e4m3", PAGES),
        "vllm": Vllm(wheel, CPU, PAGES),
    }


def test_a_quick_run(wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"--device cpu --quick --replays 1 --peer vllm={wheel} --output {tmp_path}"
    kernels.main(words.split())
    result = json.loads((tmp_path / "quick-kernels-cpu.json").read_text(encoding="utf-8"))
    assert result["peer"] == "vLLM 0.0.1, Triton kernels, bf16"
    assert result["timing"] == dict.fromkeys(("roofline", "prefill", "decode"), "host"), "the others need stages"
    assert result["commit"] and result["date"] and result["versions"].keys() >= {"python", "torch", "triton"}
    assert min(result["roofline"][rate] for rate in ("copy", "read", "bf16")) > 1e8
    assert len(result["decode"]) == 6 and len(result["prefill"]) == 1
    for row in result["prefill"] + result["decode"]:
        assert list(row["us"]) == ["bf16", "fp8_e4m3", "vllm"]
        assert all(0 < least <= row["us"][name] <= most for name, (least, most) in row["range_us"].items())
        assert row["rows_apart"] <= row["queries"] * row["sequences"] * 4 // 100
        assert ("flips" in row) == (row["sequences"] in {1, 8})
    assert result["rows"] == [], "a few small shapes are no figures"
    assert (tmp_path / "quick-kernels-cpu.png").read_bytes().startswith(b"\x89PNG")
    assert "8 x 1 at 1,000" in capsys.readouterr().out


def test_parts_and_caches_can_be_left_out(tmp_path: Path) -> None:
    words = f"--device cpu --quick --replays 1 --parts decode --caches bf16 --output {tmp_path}"
    kernels.main(words.split())
    result = json.loads((tmp_path / "quick-kernels-cpu.json").read_text(encoding="utf-8"))
    assert "prefill" not in result and "roofline" not in result
    assert all(list(row["us"]) == ["bf16"] for row in result["decode"])


@pytest.mark.parametrize("words", ["--parts decode,encode", "--peer sglang=/tmp", "--peer vllm", "--caches fp4"])
def test_refused_arguments(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kernels.main(words.split())
    assert "must be" in capsys.readouterr().err


def test_the_peer_leaves_nothing_behind(wheel: Path) -> None:
    loaded, version = load_vllm(wheel)
    assert version == "0.0.1" and loaded.round_up(17, 16) == 32
    assert not [name for name in sys.modules if name == "vllm" or name.startswith("vllm.")]


def test_a_folder_without_the_peer(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="vllm"):
        load_vllm(tmp_path)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("name", ["bf16", "fp8_e4m3", "vllm"])
def test_what_is_timed_selects_as_the_reference_does(versions: dict[str, Version], name: str, phase: str) -> None:
    batch = batches(SHAPES[phase], PAGES, CPU, 0, 1)[1]
    answer = getattr(versions[name], phase)(batch)
    assert flips(versions[name], answer, batch) == 0
    if name == "vllm":
        assert rows_apart(answer, getattr(versions["bf16"], phase)(batch)) == 0


def test_a_wrong_answer_is_not_timed(versions: dict[str, Version]) -> None:
    batch = batches(SHAPES["decode"], PAGES, CPU, 0, 1)[0]
    right = versions["bf16"].decode(batch)
    wrong = right.clone()
    missing = sorted(set(range(2300 // 128)) - set(right[-1, 2].tolist()))
    wrong[-1, 2, 0] = missing[0]
    assert rows_apart(right, wrong) == 1 and rows_apart(right, right.flip(2)) == 0
    with pytest.raises(SelectionMismatchError, match="8 of 24 rows"):
        rows_apart(right[:, :, 1:], right[:, :, :-1].where(torch.arange(6)[:, None, None] > 3, right[:, :, 1:]))
    for name in ("bf16", "fp8_e4m3"):
        with pytest.raises(SelectionMismatchError):
            flips(versions[name], wrong, batch)


def test_versions_hold_the_same_keys(versions: dict[str, Version]) -> None:
    assert torch.equal(versions["bf16"].pages, versions["vllm"].pages)
    ours = versions["bf16"]
    assert isinstance(ours, Blockdex)
    assert ours.backend.pages.shape[1] == LAYERS and torch.equal(ours.pages, ours.backend.pages[:, LAYER])
    assert abs(float(ours.pages.float().std()) - 1) < 0.01


def test_batches_go_on_through_the_pages() -> None:
    shape = Shape(1, 400, 2, (300, 500))
    made = batches(shape, 30, CPU, rotated_bytes=400, touched_bytes=100)
    assert len(made) == 4
    tables = [batch.spans.page_table for batch in made]
    used = [page for table in tables for page in (*table[0, :3].tolist(), *table[1, :4].tolist())]
    assert sorted(set(used)) == sorted(used), "28 of 30 pages, none twice"
    assert made[0].spans.starts.tolist() == [298, 498] and made[0].spans.lengths.tolist() == [2, 2]
    assert made[0].ends.tolist() == [300, 500] and made[0].offsets.tolist() == [0, 2, 4]
    assert not torch.equal(made[0].queries, made[1].queries)


def test_a_call_takes_its_part_of_a_replay() -> None:
    naps = {"short": [partial(time.sleep, 0.002)] * 10, "long": [partial(time.sleep, 0.02)] * 2}
    timings = time_calls(naps, "host", 3)
    assert 2_000 <= timings["short"].least_us <= timings["short"].median_us <= timings["short"].most_us
    assert timings["short"].least_us < 20_000 <= timings["long"].least_us


def test_what_a_shape_asks_of_a_chip() -> None:
    shape = Shape(1, 200, 3, (130, 256))
    # Positions 127, 128, 129 and 253, 254, 255: blocks before 0, 1, 1 and 1, 1, 1; visible blocks one more each.
    assert shape.blocks == 2 + 2
    assert shape.operations() == 2 * 128 * 128 * 4 * 5
    assert shape.score_bytes() == 4 * 4 * 11
    assert shape.key_bytes(2) == 386 * 128 * 2
    assert shape.touched_bytes() == 6 * 4 * 128 * 2 + 386 * 128 + 4 * 4 * 11


def test_the_grid_is_the_published_one() -> None:
    one_query = FULL.decode[:28]
    assert sum(shape.weight for shape in one_query) == 10_000 and len(FULL.decode) == 2 * 28
    # The byte floor of the grid at 4.5 TB/s is 117 us.
    mean_bytes = sum(shape.weight * shape.key_bytes(2) for shape in one_query) / 10_000
    assert round(mean_bytes / 4.5e6) == 117
    assert len(FULL.prefill) == 16 and sum(shape.weight for shape in FULL.prefill) == 10_434
    assert all(length >= shape.queries for shape in (*FULL.decode, *FULL.prefill) for length in shape.lengths)


def _result() -> dict[str, Any]:
    """Two shapes of each part; times that are easy to reckon with."""
    few = {"sequences": 1, "queries": 171, "tokens": 55_339, "weight": 3}
    many = {"sequences": 1, "queries": 16_384, "tokens": 84_480, "weight": 1}
    one = {"sequences": 8, "queries": 1, "tokens": 1_000, "weight": 1}
    two = {"sequences": 128, "queries": 1, "tokens": 100_000, "weight": 1}
    return {
        "roofline": {"read": 4e12},
        "timing": {"decode": "graph"},
        "prefill": [
            few | {"us": {"bf16": 100.0, "fp8_e4m3": 50.0, "vllm": 200.0}},
            many | {"us": {"bf16": 300.0, "fp8_e4m3": 250.0, "vllm": 600.0}},
        ],
        "scoring": [
            few | {"us": {"bf16": 50.0, "vllm": 90.0}, "tflops": {"bf16": 100.0, "vllm": 10.0}},
            many | {"us": {"bf16": 2_000.0, "vllm": 4_000.0}, "tflops": {"bf16": 640.0, "vllm": 320.0}},
        ],
        "topk": [
            few | {"score_bytes": 4_000_000, "us": {"bf16": 50.0, "vllm": 80.0}},
            many | {"score_bytes": 160_000_000, "us": {"bf16": 100.0, "vllm": 800.0}},
        ],
        "decode": [
            one | {"key_bytes": {"bf16": 2_048_000}, "us": {"bf16": 5.0, "vllm": 10.0}},
            two | {"key_bytes": {"bf16": 3_276_800_000}, "us": {"bf16": 835.0, "vllm": 1_000.0}},
        ],
    }


def test_figures() -> None:
    made = {row["name"]: row for row in kernel_figures.figures(_result())}
    measured = {name: row["measured"] for name, row in made.items()}
    assert measured == pytest.approx(
        {
            "prefill, bf16, faster than the peer": 2.0,  # 300 over 150
            "prefill, fp8_e4m3, faster than the peer": 3.0,  # 300 over 100
            "decode, 1 query, bf16, faster than the peer": 505 / 420,
            "decode, 1 query, bf16, part of the byte floor": 100 * (0.512 + 819.2) / 840,
            "decode, 8 sequences at 1,000, bf16": 5.0,
            "decode, 128 at 100,000, bf16, part of the read rate": 100 * 819.2 / 835,
            "scoring alone, 16,384 queries at 84,480, bf16": 640.0,
            "top-k alone, over reading the scores once, worst": 100 / 40,  # the other's are read in 1 us
        }
    )
    assert made["prefill, bf16, faster than the peer"]["reached"] == pytest.approx(2 / 2.4)
    assert made["decode, 8 sequences at 1,000, bf16"]["reached"] == pytest.approx(6 / 5)
    assert kernel_figures.cells(made["decode, 8 sequences at 1,000, bf16"])[1:4] == ("5.00 us", "<= 6 us", "1.20")


def test_no_figure_of_what_was_not_measured() -> None:
    result = _result()
    del result["roofline"], result["decode"]
    for row in result["prefill"]:
        del row["us"]["vllm"]
    assert [row["unit"] for row in kernel_figures.figures(result)] == ["TFLOP/s"]
