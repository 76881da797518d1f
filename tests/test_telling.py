"""What choices rest on is told at most once a second, and shown until a new worker knows better."""

from __future__ import annotations

from config.settings import EngineSettings
from decoding.choice import FixedChoice
from decoding.messages import Load, StepReport
from decoding.reports import Beliefs
from decoding.telling import BeliefTeller
from server.metrics import Metrics, exposition
from tests.machines import NUM_LAYERS, costs, linear
from tests.scripted_engine import scripted_ready
from tests.test_controller import controller, record


def told() -> Beliefs:
    return controller(costs(linear), record(lambda layer: 0.5)).beliefs()


def test_beliefs_are_told_once_a_second_and_by_those_who_choose_alone() -> None:
    now_s = 10.0
    teller = BeliefTeller(controller(costs(linear), record(lambda layer: 0.5)), lambda: now_s)
    assert teller.due() is not None
    now_s = 10.9
    assert teller.due() is None
    now_s = 11.0
    assert teller.due() is not None
    assert BeliefTeller(FixedChoice(exit_layer=1, draft_length=2), lambda: 0.0).due() is None
    assert BeliefTeller(None, lambda: 0.0).due() is None


def test_beliefs_are_what_was_seen_and_measured() -> None:
    beliefs = told()
    assert [layer.exit_layer for layer in beliefs.exit_layers] == list(range(1, NUM_LAYERS))
    assert all(0.4 < layer.acceptance[0] < 0.6 for layer in beliefs.exit_layers)
    steps = costs(linear)
    assert beliefs.plain_step_ms == [round(1e3 * steps.plain_s(rows), 4) for rows in beliefs.num_rows]


def test_a_new_worker_has_beliefs_of_its_own() -> None:
    metrics = Metrics(model_name="m")
    ready = scripted_ready(EngineSettings(), "{}")
    metrics.worker_ready(ready)
    assert "layerskip_expected_acceptance{" not in exposition([metrics]).decode()
    metrics.step(StepReport([], Load(), beliefs=told()))
    metrics.step(StepReport([], Load()))
    other = Metrics(model_name="other")
    shown = exposition([metrics, other]).decode()
    assert 'layerskip_expected_acceptance{exit_layer="3",model_name="m"}' in shown
    assert 'model_name="other"} 0.5' not in shown
    metrics.worker_ready(ready)
    assert metrics.beliefs is None
