"""Which steps' times are learned from, and what they were.

Knows times and shapes of steps; chooses nothing.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from decoding.choice import StepOutcome
from decoding.step_costs import StepCosts

_FIRST_STEPS: Final = 64
_OBSERVED_STEPS: Final = 16
"""After the first steps, the times of one in so many are learned from: that takes time too."""

_OBSERVED_FIRST: Final = 16
"""Of an exit layer that is new, so many steps are all learned from."""

_NOT_THIS: Final = 8
_LOOKED_NOT_THIS: Final = 2
"""The host's time is learned so many steps later, of a step that drafts if that one did: learning, and choosing,
leave the next ones slower. Of looks at the other kind of step, which end soon, it is learned earlier.
"""


class Observer:
    """Keeps costs current. `has_weighed` is set where a choice took time of the step: then its host's time says
    nothing.
    """

    def __init__(self, costs: StepCosts) -> None:
        self._costs = costs
        self._num_outcomes = 0
        self._host_steps = {True: 0, False: 0}
        self._usually_drafts = False
        self._latest_step = 0
        self._latest_outcome = 0
        self._latest_layer = 0
        self._num_observed: Counter[int] = Counter()
        self.has_weighed = False

    @property
    def knows_little(self) -> bool:
        """Whether these are the first steps of all."""
        return self._num_outcomes <= _FIRST_STEPS

    def wants(self, exit_layer: int, step: int, *, drafts: bool, usually_drafts: bool) -> bool:
        """Now and then, and at once where drafts leave elsewhere than in the last step that was learned from, or
        where steps without drafts are among ones with them, or the other way round: those are few, and all that is
        chosen is held against them.
        """
        self._num_outcomes += 1
        self._usually_drafts = usually_drafts
        # The host's time of the next one is to be learned, too.
        is_elsewhere = drafts != usually_drafts and not self._host_steps[drafts]
        if drafts:
            is_elsewhere |= (
                exit_layer != self._latest_layer or self._num_observed[exit_layer] < _OBSERVED_FIRST
            )
        # Where requests leave nothing to choose, no step counts, and none is held against another.
        is_elsewhere &= step != self._latest_step
        num_since = max(step - self._latest_step, self._num_outcomes - self._latest_outcome)
        return is_elsewhere or self.knows_little or num_since >= _OBSERVED_STEPS

    def took(self, outcome: StepOutcome, step: int) -> None:
        """Learn what a step took."""
        self._latest_step, self._latest_outcome = step, self._num_outcomes
        drafts = any(outcome.draft_lengths)
        if drafts:
            self._latest_layer = outcome.exit_layer
            self._num_observed[outcome.exit_layer] += 1
        self._costs.observe(
            outcome.exit_layer, outcome.draft_lengths, draft_s=outcome.draft_s, verify_s=outcome.verify_s
        )
        if not self._host_steps[drafts]:
            self._host_steps[drafts] = _NOT_THIS if drafts == self._usually_drafts else _LOOKED_NOT_THIS

    def host_took(self, num_rows: int, host_s: float, *, num_drafts: int) -> None:
        """Learn from a step behind one that was learned from: learning takes the host time, as weighing does."""
        if self.has_weighed:
            self.has_weighed = False
            return
        drafts = num_drafts > 0
        if not self._host_steps[drafts]:
            return
        self._host_steps[drafts] -= 1
        if not self._host_steps[drafts]:
            self._costs.observe_host(num_rows, host_s, num_drafts=num_drafts)
