"""A share of the answers compared with vLLM's kernels."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from blockdex_vllm.verification import Verifier
from engine import Engine, config_of


def _engine(model_dir: Path, share: float) -> Engine:
    Verifier.of.cache_clear()
    return Engine(config_of(model_dir, additional={"blockdex": {"verify": share}}))


def test_right_answers_are_counted(model_dir: Path) -> None:
    engine = _engine(model_dir, 1.0)
    sequences = [engine.open(650), engine.open(400)]
    engine.step([(sequences[0], 1), (sequences[1], 3)])
    verifier = Verifier.of(1.0)
    assert (verifier.calls, verifier.rows, verifier.wrong) == (2, 2 * 4 * 2, 0)
    assert verifier.differing == engine.flips == 0


def test_wrong_answers_are_counted_and_named(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The ids of one row are spoiled before they are compared: a decode's, a token's of a chunk, and one of padding."""
    engine = _engine(model_dir, 1.0)
    sequences = [engine.open(650), engine.open(400)]
    common = engine.common([(sequences[0], 1), (sequences[1], 3)])
    metadata = engine.builder.build(0, common)
    for layer in (0, 1):
        engine.write_keys(layer, [(sequences[0], 1), (sequences[1], 3)])
    queries = engine.queries(4)
    step = engine.forward(0, queries, metadata, beside_vllm=False)
    verifier, impl = Verifier(1.0), engine.layers[0].impl
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    for token, head in ((0, 1), (2, 0)):
        spoiled = step.ours.clone()
        spoiled[token, head, 0] = int(spoiled[token, head].max()) + 7
        verifier.check(spoiled, queries.view(4, 2, 128), impl._backend, metadata)
        assert f"token {token}, head {head}: not what vLLM's kernels select" in caplog.text
    assert (verifier.calls, verifier.differing, verifier.wrong) == (2, 2, 2)


def test_none_is_compared_unless_asked_for(model_dir: Path) -> None:
    engine = _engine(model_dir, 0.0)
    engine.step([(engine.open(200), 1)])
    assert Verifier.of(0.0).calls == 0


def test_a_share_of_the_calls_is_due() -> None:
    torch.manual_seed(0)
    verifier = Verifier(0.25)
    due = sum(verifier.is_due() for _ in range(4000))
    assert 800 < due < 1200
