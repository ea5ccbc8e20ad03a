"""The demo in small on a real server, and that it notices wrong selections and wrong tokens."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import blockdex
from examples.transformers_engine.compare import Tally, flip_tolerance
from examples.transformers_engine.demo import Outcome
from examples.transformers_engine.requests import Request
from support.serving import Serving

ROOT = Path(__file__).parents[2]
SECONDS = 110

# 2,200 + 120 + 200 prompt tokens, 3 x 15 generated ones that went in again, 3 drafts; 3 layers of 4 heads.
COMPARED = (2_200 + 120 + 200 + 45 + 3) * 12

# In the 20th call, a decode step, one block of one row is not the one that was selected: the smallest lie there is.
ONE_WRONG_ROW = """
answer, calls = blockdex.Client.append_and_select, []
def lie(self, layer, **request):
    block_ids = answer(self, layer, **request)
    calls.append(layer)
    if len(calls) == 20:
        row = block_ids[0, 0]
        assert row[-1] > 15, row
        row[0] = next(block for block in range(16) if block not in row)
    return block_ids
blockdex.Client.append_and_select = lie
"""
# Nobody compares the selections, and every query reads its own block alone.
ONLY_LOCAL_BLOCKS = """
from examples.transformers_engine.compare import CheckedIndexer
CheckedIndexer._compare = lambda *arguments: None
answer = blockdex.Client.append_and_select
def lie(self, layer, **request):
    block_ids = answer(self, layer, **request)
    local = block_ids.amax(dim=2, keepdim=True)
    block_ids.fill_(-1)
    block_ids[..., :1] = local
    return block_ids
blockdex.Client.append_and_select = lie
"""


def run_demo(*flags: str, lie: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the demo in a process of its own, in small, on a client that may lie."""
    program = f"import sys, blockdex\n{lie}\nfrom examples.transformers_engine.__main__ import main\nsys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", program, "--small", *flags],
        cwd=ROOT,
        # One thread: tests may share their cores with other work.
        env=os.environ | {"COLUMNS": "120", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def figures(output: str) -> dict[str, str]:
    """The rows of the printed tables: the first cell and the last."""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in output.splitlines() if "│" in line]
    return {row[0]: row[-1] for row in rows}


def test_small_demo_starts_a_server_and_agrees() -> None:
    """Over the ring, as the server is on the same host."""
    finished = run_demo()
    assert finished.returncode == 0, finished.stderr
    table = figures(finished.stdout)
    assert [table[name] for name in table if re.match(r"[123](:|$)", name)] == ["16", "16", "16"]
    compared, equal, flips = (
        int(table[name].replace(",", "")) for name in ("selections compared", "equal", "flips within the bound")
    )
    assert compared == COMPARED
    assert equal + flips == compared
    # 3 + 1 + 1 chunks, 15 decode steps, one of them split for the drafts; 3 layers.
    assert table["calls"] == str((5 + 16) * 3)
    assert re.fullmatch(r"\d+\.\d ms, \d+\.\d ms", table["decode call, p50 and p99"])
    # The first takes 18 blocks, the last 2; of the forked one's 18, the first 16 are its parent's.
    assert table["pages used"].startswith("22 of ")
    assert table["pages used"].endswith(", 16 shared")


@pytest.mark.parametrize("transport", ["stream", pytest.param("unary", marks=pytest.mark.slow)])
def test_the_tokens_are_the_same_over_each_other_transport(server: Serving, transport: str) -> None:
    finished = run_demo("--address", server.grpc_address, "--transport", transport)
    assert finished.returncode == 0, finished.stderr
    table = figures(finished.stdout)
    assert [table[name] for name in table if re.match(r"[123](:|$)", name)] == ["16", "16", "16"]


def test_one_wrong_block_ends_the_demo(server: Serving) -> None:
    finished = run_demo("--address", server.grpc_address, lie=ONE_WRONG_ROW)
    assert finished.returncode == 1
    assert re.search(
        r"layer \d, sequence \d+, positions from \d+: query \d+, head 0: \[\d+\] in place of", finished.stderr
    )


def test_other_tokens_end_the_demo_with_a_failure(server: Serving) -> None:
    finished = run_demo("--address", server.grpc_address, lie=ONLY_LOCAL_BLOCKS)
    assert finished.returncode == 1, finished.stderr
    assert "16" not in [value for name, value in figures(finished.stdout).items() if re.match(r"[12]:", name)]


def test_server_of_another_indexer_is_refused(server: Serving) -> None:
    one_more = 'from examples.transformers_engine import model; model.LAYER_TYPES.append("minimax_m3_sparse")'
    finished = run_demo("--address", server.grpc_address, lie=one_more)
    assert finished.returncode == 1
    assert finished.stderr.startswith("SpecError: the server serves IndexSpec(num_layers=3, ")


def test_server_that_does_not_start_shows_its_log() -> None:
    finished = run_demo(lie="from examples.transformers_engine import server; server.START_SECONDS = 0")
    assert finished.returncode == 1
    assert finished.stderr.startswith("ServerError: the server does not serve")


@pytest.mark.slow
def test_fp8_selections_are_the_reference_s() -> None:
    finished = run_demo("--key-dtype", "fp8_e4m3")
    assert finished.returncode == 0, finished.stderr
    table = figures(finished.stdout)
    assert int(table["equal"].replace(",", "")) + int(table["flips within the bound"]) == COMPARED


def test_a_terminated_demo_takes_its_server_with_it() -> None:
    """The demo ends itself as soon as its server is up; the server's id is what it says last."""
    ended = """
from examples.transformers_engine import __main__ as demo
def terminate(*arguments, **options):
    import os, pathlib, signal
    print(pathlib.Path("/proc/self/task", str(os.getpid()), "children").read_text(), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
demo.run_demo = terminate
"""
    finished = run_demo(lie=ended)
    assert finished.returncode == 128 + 15, finished.stderr
    assert not Path("/proc", finished.stdout.strip()).exists()


def outcome_with(info: blockdex.Info, flips_at: int | None) -> Outcome:
    """A prompt of three tokens and four new ones, the third of which is another; a flip at some position, or none."""
    [request] = [Request(7, b"abc")]
    tally = Tally()
    for position in range(6):
        tally.flips_until[7, position] = int(flips_at is not None and position >= flips_at)
    return Outcome([request], {7: [1, 2, 3, 4]}, {7: [1, 2, 9, 4]}, tally, info, pages=1)


@pytest.mark.parametrize(("flips_at", "agrees"), [(None, False), (5, False), (4, True), (0, True)])
def test_only_a_flip_before_a_token_excuses_it(flips_at: int | None, agrees: bool, server: Serving) -> None:
    """The third new token is what comes after position 4, the second new token's."""
    with blockdex.Client(server.grpc_address) as client:
        assert outcome_with(client.info(), flips_at).agrees is agrees


def test_the_bound_is_that_of_the_server_s_kernels(server: Serving) -> None:
    with blockdex.Client(server.grpc_address) as client:
        info = client.info()
    assert flip_tolerance(info) == 2.0**-16
    for kernel in ("triton-sm_90-fp8", "fmha_sm100-fp8"):
        kernels = info.kernels | {"prefill": (kernel, "tested")}
        assert flip_tolerance(dataclasses.replace(info, kernels=kernels)) == 2.0**-8
