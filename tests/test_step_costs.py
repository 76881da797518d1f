"""What steps cost is what was measured, and follows the machine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from decoding.measured_costs import StepTime, fitted_costs
from decoding.step_costs import ROWS, WIDTHS, DraftSeconds, StepCosts
from tests.machines import NUM_LAYERS, Seconds, costs, dear_steps, flat, linear, verify_s


def test_costs_follow_a_machine_that_slows_down() -> None:
    step_costs = costs(flat)
    before = step_costs.plain_s(1)
    for _ in range(200):
        draft_s = 3 * (0.5 + 4 * 1.002) * 2
        step_costs.observe(4, [2], draft_s=draft_s, verify_s=3 * verify_s(flat, 4, 1, 3))
    # Steps of three tokens took three times as long from the first on: that was their own cost, wrongly measured.
    assert step_costs.plain_s(1) < 1.2 * before
    for _ in range(200):
        step_costs.observe(4, [2], draft_s=2 * draft_s, verify_s=6 * verify_s(flat, 4, 1, 3))
    # Now what was well known takes twice as long: so does the machine, plain steps included.
    assert step_costs.plain_s(1) > 1.3 * before
    assert float(step_costs.verify_s(4, 1, np.array(3))) == pytest.approx(
        6 * verify_s(flat, 4, 1, 3), rel=0.1
    )


def test_what_depth_costs_is_learned_from_drafts_at_other_depths() -> None:
    """A draft at 12 takes less than one at 4 foretold; what one at 4 takes is known and stays."""
    step_costs, row = costs(flat), np.array([1])
    shallow_s = float(step_costs.draft_s(4, row)[0])
    deep_s = 0.6 * float(step_costs.draft_s(12, row)[0])
    verified_s = verify_s(flat, 4, 1, 3)
    for _ in range(30):
        step_costs.observe(4, [2], draft_s=2 * shallow_s, verify_s=verified_s)
    for _ in range(10):
        step_costs.observe(
            12, [2], draft_s=2 * deep_s, verify_s=float(step_costs.verify_s(12, 1, np.array(3)))
        )
    assert float(step_costs.draft_s(12, row)[0]) == pytest.approx(deep_s, rel=0.15)
    assert float(step_costs.draft_s(4, row)[0]) == pytest.approx(shallow_s, rel=0.1)
    assert deep_s > float(step_costs.draft_s(8, row)[0]) > shallow_s


def test_one_step_that_was_held_up_changes_little() -> None:
    step_costs = costs(flat)
    before = step_costs.plain_s(1)
    step_costs.observe(1, [0], draft_s=0.0, verify_s=1000 * before)
    assert step_costs.plain_s(1) < 1.2 * before


def test_steps_wider_than_any_that_is_kept_change_no_cost_of_verifying() -> None:
    step_costs = costs(linear)
    before = float(step_costs.verify_s(4, 1, np.array(WIDTHS[-1])))
    for _ in range(50):
        step_costs.observe(4, [64], draft_s=64 * 4.7, verify_s=verify_s(linear, 4, 1, 65))
    assert float(step_costs.verify_s(4, 1, np.array(WIDTHS[-1]))) == before


@pytest.mark.parametrize("seconds", [flat, linear, dear_steps])
def test_fitted_costs_agree_with_what_was_measured(seconds: Seconds) -> None:
    measured = [
        StepTime(
            num_rows,
            layer,
            length,
            length * (seconds(layer, num_rows, num_rows) + 0.5),
            verify_s(seconds, layer, num_rows, 1 + length),
        )
        for num_rows in ROWS[:6]
        for layer, length in [(4, 0), (4, 1), (4, 2), (4, 4)]
    ]
    fitted = fitted_costs(measured, num_layers=NUM_LAYERS)
    for step in measured:
        got = fitted.verify_s(
            step.exit_layer, step.num_rows, np.array(step.num_rows * (1 + step.draft_length))
        )
        assert float(got) == pytest.approx(step.verify_s, rel=0.15)
        if step.draft_length == 1:
            one = (
                fitted.start_s(step.num_rows) + fitted.draft_s(step.exit_layer, np.array([step.num_rows]))[0]
            )
            assert one == pytest.approx(step.draft_s, rel=1e-6)
    assert fitted.plain_s(256) > fitted.plain_s(32)


def test_one_measured_row_is_enough_to_begin_with() -> None:
    fitted = fitted_costs([StepTime(1, 3, 0, 0.0, 2.0), StepTime(1, 3, 1, 0.5, 2.2)], num_layers=NUM_LAYERS)
    assert fitted.plain_s(1) == pytest.approx(2.0)
    assert fitted.plain_s(8) == pytest.approx(4 * 2.2)
    assert float(fitted.verify_s(3, 1, np.array(2))) == pytest.approx(2.2)


def measured(
    num_rows: int, exit_layer: int, draft_length: int, *, host_s: tuple[float, float] = (0.0, 0.0)
) -> StepTime:
    """A machine on which drafting takes 1 to begin, each draft 0.4 and 0.1 a layer, and a pass 3 and 0.2 for each
    token and layer.
    """
    late = (1 + draft_length) * (NUM_LAYERS - exit_layer) + exit_layer
    return StepTime(
        num_rows,
        exit_layer,
        draft_length,
        draft_s=num_rows * (1.0 + draft_length * (0.4 + 0.1 * exit_layer)) if draft_length else 0.0,
        verify_s=3.0 + 0.2 * num_rows * late,
        host_s=num_rows * host_s[draft_length > 0],
    )


def test_what_drafting_takes_at_the_start_and_what_depth_takes_is_told_apart() -> None:
    shapes = [(rows, 4, length) for rows in (1, 4) for length in (0, 1, 4)] + [
        (1, 12, 1),
        (1, 12, 4),
        (4, 12, 4),
    ]
    fitted = fitted_costs([measured(*shape) for shape in shapes], num_layers=NUM_LAYERS)
    for rows in (1, 4):
        assert fitted.start_s(rows) == pytest.approx(rows * 1.0, rel=0.02)
        for layer in (1, 4, 9, 15):
            draft_s = float(fitted.draft_s(layer, np.array([rows]))[0])
            assert draft_s == pytest.approx(rows * (0.4 + 0.1 * layer), rel=0.02)
    for rows, layer in ((1, 2), (1, 8), (1, 15), (4, 12)):
        expected = measured(rows, layer, 4).verify_s
        assert float(fitted.verify_s(layer, rows, np.array(5 * rows))) == pytest.approx(expected, rel=0.03)


def test_a_slow_first_draft_does_not_make_depth_look_cheap() -> None:
    """As if another program had run just then: the start looks longer than it is."""
    held_up = replace(measured(1, 4, 1), draft_s=1.4 * measured(1, 4, 1).draft_s)
    others = [measured(1, layer, length) for layer, length in ((4, 0), (4, 4), (12, 1), (12, 4))]
    fitted = fitted_costs([held_up, *others], num_layers=NUM_LAYERS)
    near_s, deep_s = (float(fitted.draft_s(layer, np.array([1]))[0]) for layer in (4, 12))
    assert fitted.start_s(1) > 1.5
    assert deep_s - near_s == pytest.approx(0.1 * 8, rel=0.02)


def test_the_host_takes_longer_with_drafts() -> None:
    host_s = (0.5, 0.8)
    steps = [measured(rows, 4, length, host_s=host_s) for rows in (1, 4) for length in (0, 1, 4)]
    fitted = fitted_costs(steps, num_layers=NUM_LAYERS)
    assert [fitted.host_s(1, drafts=drafts) for drafts in (False, True)] == pytest.approx(host_s)
    one = np.array([1])
    before_s = float(fitted.draft_s(4, one)[0])
    for _ in range(1000):
        # Each draft takes it some time, too, which counts with drafting.
        for num_drafts in (1, 9):
            fitted.observe_host(1, 1.1 + 0.1 * num_drafts, num_drafts=num_drafts)
    assert fitted.host_s(1, drafts=True) == pytest.approx(1.1, rel=0.02)
    assert float(fitted.draft_s(4, one)[0]) - before_s == pytest.approx(0.1, rel=0.05)
    assert fitted.host_s(1, drafts=False) == 0.5


def test_what_a_draft_takes_the_host_is_measured_at_the_start() -> None:
    def step(num_rows: int, length: int) -> StepTime:
        host_s = 0.5 + (length > 0) * 0.3 + 0.02 * num_rows * length
        return replace(measured(num_rows, 4, length), host_s=host_s)

    with_host = fitted_costs([step(n, k) for n in (1, 4) for k in (0, 1, 4)], num_layers=NUM_LAYERS)
    without = fitted_costs([measured(n, 4, k) for n in (1, 4) for k in (0, 1, 4)], num_layers=NUM_LAYERS)
    assert [with_host.host_s(4, drafts=drafts) for drafts in (False, True)] == pytest.approx([0.5, 0.8])
    more_s = with_host.draft_s(4, np.array([4])) - without.draft_s(4, np.array([4]))
    assert float(more_s[0]) == pytest.approx(4 * 0.02)


def test_how_start_and_drafts_part_their_time_is_learned_from_short_drafts_and_long_ones() -> None:
    """At first it is thought that one draft takes no start at all."""
    fitted = fitted_costs(
        [StepTime(1, 4, 0, 0.0, 6.2), StepTime(1, 4, 1, 1.8, 8.6), StepTime(1, 4, 4, 7.2, 15.8)],
        num_layers=NUM_LAYERS,
    )
    for _ in range(300):
        for length in (1, 6):
            step = measured(1, 4, length)
            fitted.observe(4, [length], draft_s=step.draft_s, verify_s=step.verify_s)
    for length in (1, 3, 6):
        found_s = fitted.start_s(1) + length * float(fitted.draft_s(4, np.array([1]))[0])
        assert found_s == pytest.approx(measured(1, 4, length).draft_s, rel=0.1)


def test_what_depth_saves_a_pass_is_learned_from_passes_of_deep_drafts() -> None:
    """It was measured at one exit layer alone, and what a pass takes at its start was taken to be its layers'."""
    fitted = fitted_costs([measured(1, 4, length) for length in (0, 1, 2, 4)], num_layers=NUM_LAYERS)
    for _ in range(60):
        for layer in (4, 4, 4, 4, 13):
            step = measured(1, layer, 4)
            fitted.observe(layer, [4], draft_s=step.draft_s, verify_s=step.verify_s)
    for layer in (4, 13):
        found_s = float(fitted.verify_s(layer, 1, np.array(5)))
        assert found_s == pytest.approx(measured(1, layer, 4).verify_s, rel=0.05)


def wide_costs(per_layer_s: float) -> StepCosts:
    """One row; passes of 1, 2, 3 … tokens take 1, 1.5, 2 … where nothing is saved; drafts leave at layer 10."""
    widths = np.array(WIDTHS, dtype=np.float64)
    whole_RW = np.ones((len(ROWS), 1)) * (1 + 0.5 * (widths - 1))
    saved_RW = np.ones((len(ROWS), 1)) * (per_layer_s * (widths - 1))
    per_row = [np.full(len(ROWS), each) for each in (0.0, 0.1, 0.05)]
    return StepCosts(DraftSeconds(*per_row), whole_RW, saved_RW, exit_layer=10.0)


def test_a_pass_that_takes_less_than_one_without_drafts_does_not_make_wide_ones_cheap() -> None:
    """Without drafts times are taken in looks, in which steps are a little slower."""
    fitted, rng = wide_costs(0.03), np.random.default_rng(0)
    for step in range(4000):
        noise = rng.uniform(0.95, 1.05)
        if step % 8:
            fitted.observe(10, [1], draft_s=0.6, verify_s=0.97 * noise)
        else:
            fitted.observe(1, [0], draft_s=0.0, verify_s=noise)
    wide_s = [float(fitted.verify_s(10, 1, np.array(width))) for width in (2, 5, 9)]
    assert wide_s[0] == pytest.approx(1.0, rel=0.05)
    assert wide_s[1] > 1.3
    assert wide_s[2] > 1.8


def test_lines_that_were_tilted_below_nothing_come_back() -> None:
    fitted = wide_costs(0.03)
    for _ in range(60):
        for exit_layer, taken_s in ((10, 1.6), (5, 4.8)):
            fitted.observe(exit_layer, [8], draft_s=2.0, verify_s=taken_s)
    for _ in range(60):
        fitted.observe(15, [8], draft_s=2.0, verify_s=1.5)
    assert float(fitted.verify_s(15, 1, np.array(9))) == pytest.approx(1.5, rel=0.15)
    assert fitted.plain_s(1) == pytest.approx(1.0, rel=0.3)
