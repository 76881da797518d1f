"""What the host takes is learned of both kinds of step, looks among them, and is never believed to be negative."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from decoding.choice import Fate, StepOutcome
from decoding.controller import Controller
from decoding.lookup_lengths import LookupLengths
from decoding.messages import Drafter
from decoding.step_costs import DraftSeconds, HostSeconds, StepCosts
from tests.machines import costs, linear_with_gain
from tests.test_controller import LONGEST, controller, record, rows


@dataclass
class Machine:
    """Steps take what they are believed to at the start, but for the host; all drafts are kept."""

    under_test: Controller
    step_costs: StepCosts
    host_s: dict[bool, float]

    def live(self, num_steps: int) -> list[bool]:
        """Whether steps drafted."""
        return [self._step() for _ in range(num_steps)]

    def _step(self) -> bool:
        batch = rows(1)
        chosen = self.under_test.choose(batch)
        layer, (length,) = chosen.exit_layer, chosen.draft_lengths
        if length:
            fate = Fate(batch[0].record, length, length)
            self.under_test.drafted(layer, Drafter.EARLY_EXIT, [fate])
        if self.under_test.observes(layer, drafts=length > 0):
            start_s = self.step_costs.start_s(1) if length else 0.0
            draft_s = start_s + length * float(self.step_costs._computing_s(layer, np.array([1]))[0])
            verify_s = float(self.step_costs.verify_s(layer, 1, np.array(1 + length)))
            self.under_test.took(StepOutcome(layer, (length,), draft_s, verify_s))
        self.under_test.host_took(1, self.host_s[length > 0], num_drafts=length)
        return length > 0


def machine(believed_s: tuple[float, float], true_s: tuple[float, float]) -> Machine:
    """Host seconds without drafts and with them."""
    step_costs, world = costs(linear_with_gain), costs(linear_with_gain)
    step_costs._host_s_2R[:] = np.array(believed_s)[:, None]
    under_test = controller(step_costs, record(lambda layer: 0.9))
    return Machine(under_test, world, dict(zip((False, True), true_s, strict=True)))


def test_drafts_that_the_host_was_thought_to_be_slow_for_are_found_to_pay() -> None:
    lived = machine((0.5, 60.0), (0.5, 1.0)).live(20_000)
    assert not any(lived[:16])
    assert np.mean(lived[-500:]) > 0.9


def test_plain_steps_that_become_cheap_for_the_host_end_drafting() -> None:
    lived = machine((60.0, 60.0), (0.5, 60.0)).live(20_000)
    assert np.mean(lived[:200]) > 0.8
    assert np.mean(lived[-500:]) < 0.1


def test_the_host_never_takes_less_than_nothing() -> None:
    """One time of a draft serves small batches and large ones: large ones may take less than it says."""
    step_costs = costs(linear_with_gain)
    for _ in range(300):
        for num_drafts in (1, 8):
            step_costs.observe_host(1, 0.02 * num_drafts, num_drafts=num_drafts)
    for num_drafts in (256, 64):
        for _ in range(100):
            step_costs.observe_host(64, 0.5, num_drafts=num_drafts)
            assert step_costs.host_s(64, drafts=True) >= 0
            assert step_costs.host_draft_s >= 0


def test_depth_costs_something_however_steep_the_line_was() -> None:
    """Its head lies below 0, and drafts begin to leave where the line crosses 0."""
    table_RW = np.full((9, 9), 4.0)
    per_row = [np.full(9, each) for each in (0.0, -1.0, 0.5)]
    step_costs = StepCosts(DraftSeconds(*per_row), table_RW, np.zeros((9, 9)), exit_layer=4.0)
    for _ in range(100):
        step_costs.observe(2, [1], draft_s=0.2, verify_s=4.0)
    for _ in range(60):
        step_costs.observe(15, [1], draft_s=6.5, verify_s=4.0)
    assert float(step_costs.draft_s(15, np.array([1]))[0]) == pytest.approx(6.5, rel=0.3)


def test_looked_up_drafts_count_what_the_host_takes_for_each() -> None:
    per_row = [np.full(9, 0.1)] * 3
    table_RW = 1.0 + 0.01 * np.outer(np.ones(9), np.arange(9))
    lengths = [
        LookupLengths(
            StepCosts(DraftSeconds(*per_row), table_RW, 0 * table_RW, HostSeconds(np.zeros((2, 9)), draft_s))
        ).length(1, LONGEST, 5)
        for draft_s in (0.0, 0.5)
    ]
    assert lengths[0] > lengths[1]


@pytest.mark.parametrize("drafts", [False, True])
def test_where_requests_leave_nothing_to_choose_times_are_learned_now_and_then(drafts: bool) -> None:
    under_test, wanted = controller(costs(linear_with_gain), record(lambda layer: 0.9)), []
    for _ in range(3000):
        wanted.append(under_test.observes(4, drafts=drafts))
        if wanted[-1]:
            under_test.took(StepOutcome(4, (2 * drafts,), 1.0 * drafts, 10.0))
        under_test.host_took(1, 0.1, num_drafts=2 * drafts)
    assert 1000 / 20 < sum(wanted[2000:]) < 1000 / 10
