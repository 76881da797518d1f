"""Cycles whose decoding rows are replayed from recordings: the host queues a few of those, not every operation.

Knows which rows recordings can hold; what others ask is left to the eager cycle.

Shapes: B rows.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from decoding.draft_head import DraftHead
from decoding.graph_state import GraphSizes
from decoding.graph_steps import Key
from decoding.graphs import Graphs, Recorder
from decoding.logits import Sampling
from decoding.model import LlamaDecoder
from decoding.plan import Plan, Result
from decoding.recorded_cycle import Padded, RecordedCycle
from decoding.stepping import Runner

Rows = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Columns:
    """The sampling columns of some rows of a batch, and of the others."""

    whole: Sampling
    is_own_B: Rows
    own: Sampling
    others: Sampling


class GraphedCycle:
    """Runs plans as `Cycle` does, with the same tokens.

    Rows that decode run from recordings: those with one token pending, and with drafts by early exit at one common
    exit layer, or looked up, or none. All others run in the eager cycle, in a pass of their own.
    """

    def __init__(self, eager: Runner, recorded: RecordedCycle) -> None:
        self._eager = eager
        self._recorded = recorded
        self._columns: _Columns | None = None

    @classmethod
    def of(
        cls,
        eager: Runner,
        model: LlamaDecoder,
        recorder: Recorder,
        sizes: GraphSizes,
        draft_head: DraftHead | None = None,
    ) -> GraphedCycle:
        """Beside an eager cycle of the same model, whose attention must be a `Standing`."""
        graphs: Graphs[Key] = Graphs(recorder)
        return cls(
            eager,
            RecordedCycle(model, sizes=sizes, graphs=graphs, clock=time.perf_counter, draft_head=draft_head),
        )

    @property
    def recorded(self) -> RecordedCycle:
        """What runs rows that decode."""
        return self._recorded

    def run(self, plan: Plan) -> Result:
        """Compute the plan's tokens; every row that chooses gets at least one new token."""
        is_own_B = _recordable(plan)
        if plan.surveyed or not is_own_B.any():
            return self._eager.run(plan)
        if is_own_B.all():
            return self._run_own(plan)
        columns = self._split(plan, is_own_B)
        own = self._run_own(plan.part(is_own_B, columns.own))
        others = self._eager.run(plan.part(~is_own_B, columns.others))
        return _joined(is_own_B, own, others)

    def _run_own(self, plan: Plan) -> Result:
        padded = Padded.of(plan, self._recorded.sizes)
        return self._eager.run(plan) if padded is None else self._recorded.run(plan, padded)

    def _split(self, plan: Plan, is_own_B: Rows) -> _Columns:
        """Kept as long as the same rows stand beside the same others: then no columns are sent again."""
        kept = self._columns
        if kept is None or kept.whole is not plan.sampling or not np.array_equal(kept.is_own_B, is_own_B):
            own, others = (
                plan.sampling.take(torch.from_numpy(np.flatnonzero(rows)).to(plan.sampling.keys_2N.device))
                for rows in (is_own_B, ~is_own_B)
            )
            kept = self._columns = _Columns(plan.sampling, is_own_B, own, others)
        return kept


def _recordable(plan: Plan) -> Rows:
    """Which rows recordings can hold: none where some of those draft at different exit layers."""
    # A loop over rows on the host: what they ask beside tokens is no array.
    asks_for_more_B = np.array(
        [e is not None or w is not None for e, w in zip(plan.edited, plan.wanted, strict=True)]
    )
    has_one_pending_B = plan.num_fed_B - plan.num_looked_up_B == 1
    is_own_B: Rows = plan.chooses_B & has_one_pending_B & (plan.model_lengths_B == 0) & ~asks_for_more_B
    exits = np.unique(plan.exit_layers_B[is_own_B & (plan.draft_lengths_B > 0)])
    return is_own_B if len(exits) <= 1 else np.zeros_like(is_own_B)


def _joined(is_own_B: Rows, own: Result, others: Result) -> Result:
    """One result, in the order of the rows."""
    parts = {
        True: zip(own.chosen, own.reported, strict=True),
        False: zip(others.chosen, others.reported, strict=True),
    }
    rows = [next(parts[is_own]) for is_own in is_own_B.tolist()]
    return Result(
        chosen=tuple(chosen for chosen, _ in rows),
        reported=tuple(reported for _, reported in rows),
        draft_s=own.draft_s + others.draft_s,
        verify_s=own.verify_s + others.verify_s,
    )
