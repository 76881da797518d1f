"""Choosers that change their minds: no text may depend on what they choose.

Knows what a chooser may choose; knows no tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from decoding.acceptance_record import AcceptanceRecord
from decoding.choice import Choice, DraftingRow, ExitLayers, FixedChoice, Seen, StepOutcome
from decoding.controller import Controller
from decoding.measured_costs import StepTime, fitted_costs
from decoding.step_costs import ROWS

NUM_LAYERS, LONGEST = 5, 8
"""Layers of the model that mixes run on, and the most drafts that are chosen."""


class RandomChooser(FixedChoice):
    """Chooses anything that is allowed."""

    def __init__(self, seed: int) -> None:
        super().__init__(exit_layer=1, draft_length=0)
        self._rng = np.random.default_rng(seed)
        self.num_steps_learned = 0
        self.num_surveys = 0

    def choose(
        self,
        rows: Sequence[DraftingRow],
        *,
        among: ExitLayers = (),
        num_others: int = 0,
        can_stop: bool = False,
    ) -> Choice:
        self.exit_layer = int(self._rng.choice(among or range(1, NUM_LAYERS)))
        if self._rng.random() < 0.2:
            surveyed = self._rng.choice(
                range(1, NUM_LAYERS), size=int(self._rng.integers(1, 4)), replace=False
            )
            return Choice(self.exit_layer, (0,) * len(rows), tuple(sorted(surveyed.tolist())))
        lengths = [int(self._rng.integers(0, min(row.limit, LONGEST) + 1)) for row in rows]
        return Choice(self.exit_layer, tuple(lengths))

    def lookup_length(self, num_rows: int, limit: int, *, num_matched: int, may_exit: bool) -> int:
        return int(self._rng.integers(0, min(limit, LONGEST) + 1))

    def surveyed(self, seen: Mapping[int, Sequence[Seen]]) -> None:
        self.num_surveys += 1
        assert len({len(of_rows) for of_rows in seen.values()}) == 1

    def observes(self, exit_layer: int, *, drafts: bool) -> bool:
        return True

    def took(self, outcome: StepOutcome) -> None:
        self.num_steps_learned += 1
        assert len(outcome.draft_lengths) > 0


class RestlessController(Controller):
    """The real controller on a machine whose times make no sense: drawn at the start, and anew at every step."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        first = int(self._rng.integers(1, NUM_LAYERS))
        record = AcceptanceRecord(
            num_layers=NUM_LAYERS,
            max_draft_length=LONGEST,
            first={first: float(self._rng.uniform(0.5, 0.95))},
        )
        super().__init__(
            fitted_costs(self._measured(first), num_layers=NUM_LAYERS),
            record,
            exit_layers=range(1, NUM_LAYERS),
            first_exit_layer=first,
            max_draft_length=LONGEST,
        )
        self.choices: set[Choice] = set()

    def choose(
        self,
        rows: Sequence[DraftingRow],
        *,
        among: ExitLayers = (),
        num_others: int = 0,
        can_stop: bool = False,
    ) -> Choice:
        chosen = super().choose(rows, among=among, num_others=num_others)
        assert len(chosen.draft_lengths) == len(rows)
        self.choices.add(chosen)
        return chosen

    def took(self, outcome: StepOutcome) -> None:
        super().took(replace(outcome, draft_s=self._seconds(), verify_s=self._seconds()))

    def host_took(self, num_rows: int, host_s: float, *, num_drafts: int) -> None:
        super().host_took(num_rows, self._seconds(), num_drafts=num_drafts)

    def _measured(self, exit_layer: int) -> list[StepTime]:
        return [
            StepTime(rows, exit_layer, length, 0.1 * self._seconds(), self._seconds())
            for rows in ROWS[:5]
            for length in (0, 1, 4, LONGEST)
        ]

    def _seconds(self) -> float:
        return float(self._rng.lognormal())
