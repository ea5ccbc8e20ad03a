"""The switch of faults on purpose: what it can be told, and what it then does."""

from __future__ import annotations

import subprocess
import sys

import pytest

from blockdex.faults import VARIABLE, FaultsError, arm, strikes
from support.serving import SMALL, environment

PROGRAM = """
from blockdex.faults import arm, strikes
arm("launch=0.1,seed=7")
print([use for use in range(1000) if strikes("launch")], any(strikes("copy") for _ in range(1000)))
"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense=1", "'nonsense' is no seam; there are allocation, launch, copy, ring_write, socket, clock, and"),
        ("launch", "launch must be a number, got ''"),
        ("launch=often", "launch must be a number, got 'often'"),
        ("launch=1.5", "launch must be 0 to 1, got 1.5"),
    ],
)
def test_what_cannot_be_read_is_refused_and_switches_nothing_on(text: str, words: str) -> None:
    with pytest.raises(FaultsError, match=f"{VARIABLE}: {words}"):
        arm(text)
    assert not strikes("launch")


def test_a_seed_has_the_same_uses_fail_again_and_each_is_told() -> None:
    runs = [
        subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True) for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout
    failed, others = runs[0].stdout.rsplit(" ", 1)
    assert 50 < len(failed.split(",")) < 200
    assert others.strip() == "False"
    assert runs[0].stderr.count("BLOCKDEX_FAULTS: a fault of launch\n") == len(failed.split(","))


def test_a_server_that_is_told_nonsense_does_not_start() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "blockdex", "serve", *SMALL],
        env=environment(BLOCKDEX_FAULTS="launch=2"),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert "BLOCKDEX_FAULTS: launch must be 0 to 1, got 2" in done.stderr
