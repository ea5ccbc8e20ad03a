"""What clients do, held against a model that takes nothing amiss but mistakes."""

from __future__ import annotations

import itertools

import pytest

from blockdex.loadtest.scripts import Numbers, script_of
from blockdex.loadtest.settings import SCENARIOS
from blockdex.loadtest.steps import SequenceStep, Step, TokenStep
from support.load_plans import info, plan


class Model:
    """Lengths by layer of what is open; fails where a server would refuse."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.lengths: dict[int, list[int]] = {}
        self.peak = 0

    def take(self, step: Step) -> None:
        if isinstance(step, TokenStep):
            self._tokens(step)
        elif step.operation == "open":
            assert step.sequence not in self.lengths
            self.lengths[step.sequence] = [0] * self.layers
        elif step.operation == "fork":
            assert step.sequence not in self.lengths
            self.lengths[step.sequence] = [min(length, step.length) for length in self.lengths[step.parent]]
        elif step.operation == "truncate":
            self.lengths[step.sequence] = [min(length, step.length) for length in self.lengths[step.sequence]]
        else:
            del self.lengths[step.sequence]
        self.peak = max(self.peak, len(self.lengths))

    def _tokens(self, step: TokenStep) -> None:
        assert len({span.sequence.id for span in step.spans}) == len(step.spans)
        for span in step.spans:
            layers, run = self.lengths[span.sequence.id], span.run
            if step.rpc == "SelectBlocks":
                assert run.start + run.length <= layers[step.layer]
            else:
                assert run.start <= layers[step.layer]
                layers[step.layer] = run.start + run.length


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("draft_tokens", [0, 3])
def test_no_script_asks_for_what_a_server_refuses(scenario: str, draft_tokens: int) -> None:
    made = plan(scenario, info(400), draft_tokens=draft_tokens, chunk=100)
    for client, shape in enumerate(made.shapes):
        model = Model(made.bounds.layers)
        script = script_of(shape, Numbers(1, client, 0), made.bounds)
        for step in itertools.chain(script.set_up(), itertools.islice(script.steps(), 2000)):
            model.take(step)
            for span in step.spans if isinstance(step, TokenStep) else ():
                assert span.run.start + span.run.length <= shape.longest
            if isinstance(step, TokenStep):
                assert len(step.spans) <= made.bounds.max_spans
        assert model.peak <= len(shape.held)


def test_scenarios_do_what_they_are_for() -> None:
    expected = {
        "decode-fleet": {"decode"},
        "prefill-storm": {"fork", "prefill", "close"},
        "forks": {"fork", "decode", "truncate", "close"},
        "churn": {"open", "append", "select", "decode", "close"},
    }
    for scenario, operations in expected.items():
        made = plan(scenario, info(400), clients=1)
        script = script_of(made.shapes[0], Numbers(1, 0, 0), made.bounds)
        assert all(script.set_up())
        assert {step.operation for step in itertools.islice(script.steps(), 3000)} == operations


def test_every_layer_gets_every_step() -> None:
    made = plan("decode-fleet", info(400), clients=1)
    script = script_of(made.shapes[0], Numbers(1, 0, 0), made.bounds)
    assert all(script.set_up())
    steps = list(itertools.islice(script.steps(), 4))
    assert [step.layer for step in steps if isinstance(step, TokenStep)] == [0, 1, 0, 1]


def test_sequence_ids_are_nobody_elses() -> None:
    ids = {next(Numbers(run, client, 0).ids) for run in (0, 1, 2**24 - 1) for client in (0, 1, 4095)}
    assert len(ids) == 9
    assert all(0 < number < 2**64 for number in ids)


def test_steps_name_their_rpc() -> None:
    assert SequenceStep("truncate", 1, length=2).rpc == "TruncateSequence"
