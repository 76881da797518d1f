"""Steps in one call of compiled code, where nothing of them needs more than that.

Knows which plans compiled code runs and what it is told of them; knows nothing of how it computes.

Shapes: B rows, M drafts of all rows, Q the most tokens a row may get.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import compress
from operator import add
from typing import Final

import numpy as np

from decoding import compiled_structs as structs
from decoding.compiled import CompiledDecoder
from decoding.compiled_rows import (
    UNSTOPPED,
    MadeDrafts,
    PlacedColumns,
    PlacedConfidence,
    PlacedRows,
    address,
)
from decoding.cycle import Cycle
from decoding.logits import Sampling
from decoding.plan import Plan, Result, Stops

_KEPT_COLUMNS: Final = 8


class CompiledCycle:
    """Runs most plans in compiled code, and leaves others to a cycle that goes part by part: rows that edit
    logits or want more than tokens, drafts at several exit layers.
    """

    def __init__(self, cycle: Cycle, model: CompiledDecoder) -> None:
        self.by_parts = cycle
        self._model = model
        self._columns: OrderedDict[int, PlacedColumns] = OrderedDict()
        self._confidence = UNSTOPPED

    def run(self, plan: Plan) -> Result:
        """Compute the plan's tokens; every row that chooses gets at least one new token."""
        lengths = plan.draft_lengths_B.tolist()
        exit_layers = set(compress(plan.exit_layers_B.tolist(), lengths))
        if _needs_more(plan) or len(exit_layers) > 1:
            return self.by_parts.run(plan)
        return self._run(plan, lengths, max(exit_layers, default=0))

    def _run(self, plan: Plan, lengths: list[int], exit_layer: int) -> Result:
        looked_up = plan.num_looked_up_B.tolist()
        most_chosen = 1 + max(map(add, lengths, looked_up))
        made = MadeDrafts(
            exit_layer,
            plan.draft_lengths_B,
            plan.fed_N[plan.num_fed_B.cumsum() - 1],
            np.empty(sum(lengths), dtype=np.int64),
            None if plan.stops is None else plan.stops.least_B,
        )
        num_chosen_B = np.empty(len(lengths), dtype=np.int64)
        chosen_BQ = np.empty((len(lengths), most_chosen), dtype=np.int64)
        seconds = np.empty(2)
        surveyed_S = np.array(plan.surveyed, dtype=np.int64)
        grades_SB = np.empty((len(surveyed_S), len(lengths)), dtype=np.int64)
        agreed_SB = np.zeros(grades_SB.shape, dtype=np.bool_)
        given = plan.fed_N, plan.num_fed_B, plan.num_looked_up_B, plan.chooses_B, surveyed_S
        found = num_chosen_B, chosen_BQ, grades_SB, agreed_SB, seconds
        self._model.run_step(
            PlacedRows(self.by_parts.slots(plan.blocks_BW), plan.num_computed_B, self._placed(plan.sampling)),
            self._chances(plan.stops),
            made,
            structs.Step(most_chosen, len(surveyed_S), *map(address, (*given, *found))),
        )
        draft_s, verify_s = seconds.tolist()
        chosen = zip(chosen_BQ.tolist(), num_chosen_B.tolist(), strict=True)
        return Result(
            chosen=tuple(tuple(tokens[:count]) for tokens, count in chosen),
            reported=(None,) * len(lengths),
            draft_s=draft_s,
            verify_s=verify_s,
            agreed=agreed_SB.tolist(),
            surveyed_grades=grades_SB.tolist(),
            grades=_of_rows(made.grades_M.tolist(), made.num_made_B.tolist()) if exit_layer else (),
        )

    def _placed(self, sampling: Sampling) -> PlacedColumns:
        """They stay the same while the batch does, and come back when its order does."""
        # Those that are kept hold on to their sampling columns: no others have their number.
        known = self._columns.pop(id(sampling), None) or PlacedColumns(sampling)
        self._columns[id(sampling)] = known
        if len(self._columns) > _KEPT_COLUMNS:
            self._columns.popitem(last=False)
        return known

    def _chances(self, stops: Stops | None) -> PlacedConfidence:
        """They stay the same for many steps."""
        if stops is None:
            return UNSTOPPED
        if self._confidence.chances_2G is not stops.chances_2G:
            self._confidence = PlacedConfidence(stops.chances_2G)
        return self._confidence


def _needs_more(plan: Plan) -> bool:
    return (
        any(plan.edited) or any(plan.wanted) or bool(plan.model_lengths_B.any()) or plan.following is not None
    )


def _of_rows(values: list[int], counts: list[int]) -> tuple[tuple[int, ...], ...]:
    """Row by row what lies step after step."""
    left, rows = iter(values), [list[int]() for _ in counts]
    for ahead in range(max(counts)):
        for row, count in zip(rows, counts, strict=True):
            if count > ahead:
                row.append(next(left))
    return tuple(map(tuple, rows))
