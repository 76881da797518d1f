"""Plans a step and runs it; where the device's memory runs out, a smaller one.

Knows plans and memory; knows nothing of what a step decodes. Running changes nothing but the KV cache, where what
was not committed is written again: a step that failed may be planned anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import torch

from decoding.plan import Plan, Result

_CAUTIOUS_STEPS: Final = 64
"""After so many steps that fitted, steps may grow again, to twice as many tokens."""


class Planner(Protocol):
    """What decides what a step computes."""

    def plan(self, most_tokens: int | None = None) -> Plan | None:
        """The next step, of so many tokens at most; None if there is nothing to do."""


class Runner(Protocol):
    """What computes a step."""

    def run(self, plan: Plan) -> Result:
        """Compute the plan's tokens. Raises torch.OutOfMemoryError."""


@dataclass(frozen=True, slots=True)
class Stepped:
    """A plan and what it came to: nothing if it did not fit the memory, and nor did a larger one before it."""

    plan: Plan
    result: Result | None


class Stepper:
    """Takes one step at a time. `num_out_of_memory` counts those for which memory ran out."""

    def __init__(self, planner: Planner, runner: Runner) -> None:
        self._planner = planner
        self._runner = runner
        self._most_tokens: int | None = None
        self._too_many_tokens = 0
        self._num_fitted = 0
        self.num_out_of_memory = 0

    def step(self) -> Stepped | None:
        """Plan and run, at most twice; None if there is nothing to do. A result must be committed."""
        stepped = self._attempt()
        return self._attempt() if stepped and stepped.result is None else stepped

    def _attempt(self) -> Stepped | None:
        plan = self._planner.plan(self._most_tokens)
        if plan is None:
            return None
        try:
            result = self._runner.run(plan)
        except torch.OutOfMemoryError:
            result = None
        if result is None:
            self._shrink(plan)
        else:
            self._grow()
        return Stepped(plan, result)

    def _shrink(self, plan: Plan) -> None:
        """Let the next steps hold half as many tokens, but one for each row, and give memory back."""
        self.num_out_of_memory += 1
        self._too_many_tokens = max(self._too_many_tokens, plan.num_tokens)
        self._most_tokens = max(plan.num_rows, plan.num_tokens // 2)
        self._num_fitted = 0
        # Not while the error is handled, which holds on to the failed step's tensors.
        torch.cuda.empty_cache()

    def _grow(self) -> None:
        if self._most_tokens is None:
            return
        self._num_fitted += 1
        if self._num_fitted == _CAUTIOUS_STEPS:
            self._num_fitted = 0
            self._most_tokens *= 2
        if self._most_tokens >= self._too_many_tokens:
            self._most_tokens, self._too_many_tokens = None, 0
