"""One cycle of decoding rows by replaying recordings: which of them, in what order, and what they gave.

Knows plans and shapes; knows nothing of operations, which the recordings hold.

Shapes: B rows, Q tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from decoding.attention_standing import Standing
from decoding.draft_head import DraftHead
from decoding.graph_state import Choosing, GraphSizes, GraphState
from decoding.graph_steps import GraphSteps, Key, Verification, Walk
from decoding.graphs import Graphs
from decoding.model import LlamaDecoder
from decoding.plan import Plan, Result


@dataclass(frozen=True, slots=True)
class Padded:
    """A step's rows and tokens of each row, with padding."""

    num_rows: int
    num_columns: int

    @classmethod
    def of(cls, plan: Plan, sizes: GraphSizes) -> Padded | None:
        """What a plan is padded to; None if it does not fit the sizes so."""
        longest = int(plan.num_drafts_B.max())
        num_rows = min(rounded_up(plan.num_rows), sizes.num_rows)
        num_columns = min(1 + rounded_up(longest), sizes.num_columns, sizes.num_tokens // num_rows)
        fits = plan.num_rows <= num_rows and longest < num_columns
        return cls(num_rows, num_columns) if fits else None


def rounded_up(number: int) -> int:
    """0, or the least of 1, 2, 3, 4, 6, 8, 12, 16, 24, … that is not below `number`: at most half is added."""
    if number <= 2:
        return number
    power = 1 << (number - 1).bit_length()
    return power * 3 // 4 if number <= power * 3 // 4 else power


class RecordedCycle:
    """Runs plans whose rows all have one pending token, draft by early exit at one exit layer or not at all, and
    ask for nothing but tokens. Records what it needs when it first needs it.
    """

    def __init__(
        self,
        model: LlamaDecoder,
        *,
        sizes: GraphSizes,
        graphs: Graphs[Key],
        clock: Callable[[], float],
        draft_head: DraftHead | None = None,
    ) -> None:
        attention = model.attention
        assert isinstance(attention, Standing)
        embedding_VD = model.weights.embedding_VD
        self.sizes = sizes
        self.state = GraphState(
            sizes, width=embedding_VD.shape[1], dtype=embedding_VD.dtype, device=model.device
        )
        self.graphs = graphs
        self._steps = GraphSteps(model, attention, self.state, draft_head)
        self._draft_head = draft_head
        self._clock = clock

    @torch.inference_mode()
    def run(self, plan: Plan, padded: Padded) -> Result:
        """Compute the plan's tokens; `padded` is its own."""
        walks, verification = _keys(plan, padded)
        self._record([*dict.fromkeys(walks), verification])
        started, begun = self._clock(), self.graphs.mark()
        self.state.upload(plan, padded.num_rows)
        for walk in walks:
            self.graphs.replay(walk)
        drafted = self.graphs.mark()
        self.graphs.replay(verification)
        rows = self.state.download(plan.num_rows, padded.num_columns)
        chosen = tuple(tuple(choices[: kept + 1]) for kept, *choices in rows)
        if self._draft_head is not None:
            self._draft_head.see(np.array([*plan.fed_N.tolist(), *chain.from_iterable(chosen)]))
        # The host runs ahead of the device: only the device can tell when drafts were made.
        draft_s = drafted.seconds_since(begun)
        return Result(
            chosen=chosen,
            reported=(None,) * plan.num_rows,
            draft_s=draft_s,
            verify_s=self._clock() - started - draft_s,
        )

    def _record(self, keys: list[Key]) -> None:
        missing = self.graphs.missing(keys)
        if missing:
            # Recording works on what the state holds: nothing that matters, until the plan is uploaded.
            self.state.rest()
        for key in missing:
            self.graphs.record(key, self._steps.work(key))


def _keys(plan: Plan, padded: Padded) -> tuple[list[Walk], Verification]:
    """What to replay. Where some row drafts, every token that is known or drafted goes through the early layers, a
    column at a time; else all known tokens go through all layers at once.
    """
    choosing = Choosing.of(plan.sampling)
    num_made = int(plan.draft_lengths_B.max())
    if not num_made:
        return [], Verification(0, padded.num_rows, padded.num_columns, choosing)
    exit_layer = int(plan.exit_layers_B[0])
    drafting = Walk(exit_layer, padded.num_rows, choosing)
    following = Walk(exit_layer, padded.num_rows, None)
    num_following = 1 + int(plan.num_drafts_B.max()) - num_made
    walks = [drafting] * num_made + [following] * num_following
    return walks, Verification(exit_layer, padded.num_rows, padded.num_columns, choosing)
