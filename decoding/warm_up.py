"""Measures what steps cost before the first request comes, on the cache that requests will use.

Knows schedulers and clocks; what it measures is of no sequence that anyone waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from config.settings import EngineSettings
from decoding.acceptance_record import AcceptanceRecord
from decoding.capacity import Capacity
from decoding.choice import DraftChooser, FixedChoice
from decoding.controller import Controller
from decoding.exits import Speculation
from decoding.measured_costs import StepTime, fitted_costs
from decoding.messages import Generate, SamplingParams
from decoding.scheduler import Scheduler
from decoding.step_costs import WIDTHS
from decoding.stepping import Runner

_REPEATS: Final = 3
_IN_ORDER: Final = (
    (1, (0, 1, 2, 4, 8)),
    (4, (0, 1, 4)),
    (16, (0, 1, 4)),
    (2, (0, 1, 4)),
    (8, (0, 1, 4)),
    (1, (0, 1, 2, 4)),
    (4, (0, 1, 2, 4)),
    (64, (0, 1)),
    (32, (0, 1, 4)),
    (1, (16,)),
    (4, (8, 16)),
    (128, (0, 1)),
)
"""Rows and draft lengths, what tells most first: time may run out. What is met most is measured twice, since much
else may have been going on the first time.
"""

_DEEP_ROWS: Final = (1, 4, 16)
_DEEP_LENGTHS: Final = (1, 4)
"""What is measured with drafts that leave at the deepest exit layer, too: it tells what depth costs."""

_CONTEXT_TOKENS: Final = 80
_OWN_TOKENS: Final = 4
"""Enough that attention has something to attend to. All rows share the blocks of their context, computed once."""

_LARGEST_SHARED: Final = 128
"""Larger blocks are not filled for this."""

_MOST_STEPS: Final = 16
_PROMPT_STEPS: Final = _MOST_STEPS - _REPEATS - 1
"""Steps after which every prompt is computed, so that no row ends before the last has begun to decode."""

_BUDGET_S: Final = 1.5
_RECORDED_BUDGET_S: Final = 15.0
"""What is not measured by then is guessed from what is, and learned from the first requests. Where steps are
recorded, most of that time goes there, and would have to be spent later.
"""


@dataclass(frozen=True, slots=True)
class Shape:
    """Steps of so many rows that draft alike."""

    num_rows: int
    exit_layer: int
    draft_length: int
    num_shared: int

    @property
    def num_tokens(self) -> int:
        """Tokens that a row may come to."""
        return self.num_shared + _OWN_TOKENS + self.num_new

    @property
    def num_new(self) -> int:
        """New tokens that a row asks for: more than its steps commit, so that it may draft in each."""
        return _MOST_STEPS + self.draft_length + 1

    def num_blocks(self, block_size: int) -> int:
        """Blocks that all rows take at most."""
        own = self.num_tokens - self.num_shared
        return self.num_shared // block_size + self.num_rows * -(-own // block_size)


MakeScheduler = Callable[[DraftChooser], Scheduler]


@dataclass(frozen=True, slots=True)
class Warmup:
    """What the engine may hold and draft, and with that who chooses its drafts."""

    settings: EngineSettings
    capacity: Capacity
    speculation: Speculation
    num_layers: int

    def chooser(
        self,
        cycle: Runner,
        make_scheduler: MakeScheduler,
        *,
        clock: Callable[[], float],
        can_stop: bool = False,
    ) -> DraftChooser:
        """A controller that knows what steps cost here, or no controller where there is nothing to choose.

        Where the cycle `can_stop`, rows may draft until they are unsure.
        """
        chosen = self.speculation
        is_fixed = None not in (chosen.exit_layer, chosen.draft_length) or not self.settings.max_draft_length
        measured = [] if is_fixed else list(self._measured(cycle, make_scheduler, clock))
        if not any(step.draft_length for step in measured):
            return FixedChoice(exit_layer=chosen.first_exit_layer, draft_length=chosen.first_draft_length)
        longest = min(self.settings.max_draft_length, WIDTHS[-1] - 1)
        return Controller(
            fitted_costs(measured, num_layers=self.num_layers),
            AcceptanceRecord(
                num_layers=self.num_layers,
                max_draft_length=longest,
                first=chosen.first_acceptances,
            ),
            exit_layers=chosen.allowed_exit_layers if chosen.exit_layer is None else (chosen.exit_layer,),
            first_exit_layer=chosen.first_exit_layer,
            max_draft_length=longest,
            can_stop=can_stop,
        )

    def _measured(
        self, cycle: Runner, make_scheduler: MakeScheduler, clock: Callable[[], float]
    ) -> Iterator[StepTime]:
        """Times of growing shapes until the budget is spent, but not before one row has drafted."""
        started = clock()
        budget_s = _RECORDED_BUDGET_S if self.capacity.num_padded else _BUDGET_S
        shapes = list(self._shapes())
        has_drafted = False
        # Where none fits that drafts, there is nothing to choose and nothing to be sure of.
        for shape in shapes if any(shape.draft_length for shape in shapes) else shapes[:1]:
            if has_drafted and clock() - started > budget_s:
                return
            yield _measure(cycle, make_scheduler, shape, clock)
            has_drafted |= shape.draft_length > 0

    def _shapes(self) -> Iterator[Shape]:
        """Shapes that fit, those that tell most first."""
        near = self.speculation.first_exit_layer
        longest = self.settings.max_draft_length
        size = self.capacity.block_size
        shared = -(-_CONTEXT_TOKENS // size) * size if size <= _LARGEST_SHARED else 0
        if shared + _OWN_TOKENS + 2 * _MOST_STEPS > self.capacity.max_model_len:
            shared = 0
        deepest = self.speculation.allowed_exit_layers[-1]
        for num_rows, lengths in _IN_ORDER:
            shapes = [Shape(num_rows, near, length, shared) for length in lengths if length <= longest]
            if deepest > near and num_rows in _DEEP_ROWS:
                shapes += [
                    Shape(num_rows, deepest, length, shared) for length in _DEEP_LENGTHS if length <= longest
                ]
            yield from filter(self._fits, shapes)

    def _fits(self, shape: Shape) -> bool:
        limits = self.settings
        spare = limits.max_num_batched_tokens - shape.num_rows + 1
        return (
            shape.num_rows <= limits.max_num_seqs
            and shape.num_shared + shape.num_rows * _OWN_TOKENS <= _PROMPT_STEPS * spare
            and shape.num_rows * (1 + shape.draft_length) <= limits.max_num_batched_tokens
            and shape.num_blocks(self.capacity.block_size) <= self.capacity.num_blocks
            and shape.num_tokens <= self.capacity.max_model_len
        )


def _measure(
    cycle: Runner, make_scheduler: MakeScheduler, shape: Shape, clock: Callable[[], float]
) -> StepTime:
    """The fastest of some steps: others were held up by something else."""
    scheduler = make_scheduler(FixedChoice(exit_layer=shape.exit_layer, draft_length=shape.draft_length))
    for row in range(shape.num_rows):
        scheduler.submit(_dummy(row, shape))
    times_s: list[tuple[float, float, float]] = []
    while len(times_s) <= _REPEATS:
        started = clock()
        plan = scheduler.plan()
        assert plan is not None
        result = cycle.run(plan)
        # Whatever was kept, each row goes on by one token, so that every step has the same shape.
        scheduler.commit(result.of_one_token())
        if plan.num_tokens == shape.num_rows * (1 + shape.draft_length):
            host_s = clock() - started - result.draft_s - result.verify_s
            times_s.append((result.draft_s, result.verify_s, host_s))
    scheduler.abort(range(shape.num_rows))
    draft_s, verify_s, host_s = map(min, zip(*times_s[1:], strict=True))
    return StepTime(shape.num_rows, shape.exit_layer, shape.draft_length, draft_s, verify_s, host_s)


def _dummy(row: int, shape: Shape) -> Generate:
    """A sequence that differs from others behind what all share."""
    own = [1 + row % 50, 1 + row // 50] + [0] * (_OWN_TOKENS - 2)
    return Generate(
        sequence_id=row,
        prompt_ids=[0] * shape.num_shared + own,
        max_new_tokens=shape.num_new,
        sampling=SamplingParams(temperature=0.0),
        seed=row,
        stop_token_ids=[],
    )
