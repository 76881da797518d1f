"""Choices stand: until another promises clearly more, for numbers of rows that come again, and not for good."""

from __future__ import annotations

import numpy as np

from decoding.acceptance_record import AcceptanceRecord
from tests.machines import NUM_LAYERS, costs, linear, linear_with_gain
from tests.test_controller import LAYERS, LONGEST, controller, record, rows


def test_a_choice_stands_until_another_promises_clearly_more() -> None:
    step_costs, known = costs(linear_with_gain), record(lambda layer: 0.8)
    under_test = controller(step_costs, known)
    batch = rows(4)
    first = under_test.choose(batch)
    for _ in range(13):
        assert under_test.choose(batch) == first
    # Nobody decides anew for one row among many that came or left.
    assert under_test.choose([*batch[:3], *rows(1)]).draft_lengths == first.draft_lengths


class CountedRecord(AcceptanceRecord):
    """Tells how often something was weighed."""

    num_weighed = 0

    def refresh(self) -> None:
        self.num_weighed += 1
        super().refresh()


def test_choices_for_numbers_of_rows_that_come_again_are_not_made_again() -> None:
    known = CountedRecord(num_layers=NUM_LAYERS, max_draft_length=LONGEST, first={4: 0.7})
    under_test = controller(costs(linear_with_gain), known)
    chosen = {count: set() for count in (1, 2, 5)}
    for step in range(200):
        count = (1, 2, 5)[step % 3]
        chosen[count].add(under_test.choose(rows(count), among=(4,)).draft_lengths)
    assert known.num_weighed < 200 / 9
    assert len(chosen[1]) <= 2


def test_sets_of_exit_layers_that_were_asked_for_are_not_kept_for_good() -> None:
    under_test, rng = controller(costs(linear), record(lambda layer: 0.8)), np.random.default_rng(0)
    for _ in range(400):
        asked = rng.choice(LAYERS, size=3, replace=False)
        under_test.choose(rows(1), among=tuple(sorted(asked.tolist())))
    assert len(under_test._standing) == len(under_test._settled) == 64
