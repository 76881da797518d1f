"""What is worth knowing is looked at: soon where little is known, seldom once much is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from decoding.acceptance_record import AcceptanceRecord
from decoding.choice import Choice, Fate, Seen
from decoding.controller import Controller
from decoding.messages import Drafter
from tests.machines import NUM_LAYERS, costs, linear_with_gain
from tests.test_controller import LONGEST, controller, rows


@dataclass
class World:
    """Drafts are kept at a rate of their exit layer; a controller lives in it."""

    rates: Callable[[int], float]
    under_test: Controller = field(init=False)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(2))

    def __post_init__(self) -> None:
        known = AcceptanceRecord(num_layers=NUM_LAYERS, max_draft_length=LONGEST, first={4: 0.7})
        self.under_test = controller(costs(linear_with_gain), known)

    def live(self, num_steps: int, *, num_rows: int = 1) -> list[Choice]:
        """Choose, draft and verify; what was chosen."""
        return [self._step(num_rows) for _ in range(num_steps)]

    def _step(self, num_rows: int) -> Choice:
        batch = rows(num_rows)
        chosen = self.under_test.choose(batch)
        fates = [
            Fate(row.record, length, self._kept(chosen.exit_layer, length))
            for row, length in zip(batch, chosen.draft_lengths, strict=True)
            if length
        ]
        if fates:
            assert not chosen.surveyed
            self.under_test.drafted(chosen.exit_layer, Drafter.EARLY_EXIT, fates)
        if chosen.surveyed:
            self.under_test.surveyed(
                {layer: [Seen(self._kept(layer, 1) > 0) for _ in batch] for layer in chosen.surveyed}
            )
        return chosen

    def _kept(self, exit_layer: int, length: int) -> int:
        refused = np.flatnonzero(self.rng.random(length) > self.rates(exit_layer))
        return int(refused[0]) if len(refused) else length


def num_surveys(choices: list[Choice]) -> int:
    return sum(bool(choice.surveyed) for choice in choices)


def test_a_better_exit_layer_that_nobody_tried_is_found() -> None:
    for best in (2, 3, 6):
        world = World(lambda layer, best=best: 0.95 if layer >= best else 0.1)
        lived = world.live(3000)
        # Two layers more cost less than changing is worth.
        assert sum(best <= choice.exit_layer <= best + 2 for choice in lived[-1000:]) > 900
        assert num_surveys(lived) > 0


def test_surveys_become_rare_once_much_is_known() -> None:
    world = World(lambda layer: 0.8)
    first, _, late = world.live(500), world.live(4000), world.live(500)
    assert num_surveys(first) > 1.5 * num_surveys(late)


def test_what_is_far_ahead_of_none_is_held_against_none_more_seldom() -> None:
    def num_plain(rate: float) -> int:
        lived = World(lambda layer: rate).live(6000)[2000:]
        assert sum(any(choice.draft_lengths) for choice in lived) > 3900
        return sum(not any(choice.draft_lengths) and not choice.surveyed for choice in lived)

    far, near = num_plain(0.9), num_plain(0.45)
    assert 0 < 2 * far < near


def test_a_survey_takes_in_a_few_exit_layers_in_order() -> None:
    lived = World(lambda layer: 0.95 - 0.1 * layer).live(2000, num_rows=3)
    taken_in = {choice.surveyed for choice in lived if choice.surveyed}
    assert taken_in
    for surveyed in taken_in:
        assert 1 <= len(surveyed) <= 6
        assert list(surveyed) == sorted(set(surveyed))


def test_acceptance_that_rises_while_nobody_drafts_is_noticed() -> None:
    world = World(lambda layer: 0.02)
    given_up = world.live(3000)
    assert np.mean([any(choice.draft_lengths) for choice in given_up[-1000:]]) < 0.05
    world.rates = lambda layer: 0.95
    noticed = world.live(6000)
    assert np.mean([any(choice.draft_lengths) for choice in noticed[-1000:]]) > 0.9
