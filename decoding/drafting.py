"""Proposes tokens with the first layers of the model, and keeps what verification starts from.

Knows routes and positions; knows nothing of which drafts will stand.

Shapes: B rows, P rows still drafting, M drafts of all rows, D model width, V vocabulary, T cache positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from decoding.attention import Attention
from decoding.draft_head import DraftHead
from decoding.edited_logits import Before, apply_edits
from decoding.model import LlamaDecoder
from decoding.plan import Plan
from decoding.ragged import Ints
from decoding.route import DraftStep, Route


@dataclass(frozen=True, slots=True)
class Drafts:
    """Proposed ids, and the exit hidden of every token that a draft step was fed, step after step.

    A step's id is the draft it made; its exit hidden is that of the token before: the committed one for the first
    step, then the drafts but the last.
    """

    ids_M: Tensor
    exits_MD: Tensor


class EarlyExitDrafter:
    """Runs layers 0 … E − 1 and the model's own head, once for each draft (LayerSkip, arXiv 2404.16710, §4.3)."""

    def __init__(self, model: LlamaDecoder, attention: Attention, head: DraftHead | None = None) -> None:
        self._model = model
        self._attention = attention
        self._head = head

    def draft(self, plan: Plan, route: Route, slots_BT: Ints, last_ids_B: Tensor) -> Drafts:
        """Draft for every row with a draft length; `last_ids_B` are the rows' committed, uncomputed tokens."""
        next_positions_B = torch.from_numpy(plan.num_computed_B + 1).to(last_ids_B.device, non_blocking=True)
        ids: list[Tensor] = []
        exits: list[Tensor] = []
        fed_P = last_ids_B
        for ahead, step in enumerate(route.draft_steps):
            num_rows = step.num_rows
            exits.append(self._run_to_exits(step, slots_BT, plan.num_computed_B + ahead, fed_P[:num_rows]))
            fed_P = self._choose(plan, exits[-1], ids, next_positions_B[:num_rows] + ahead)
            ids.append(fed_P)
        return Drafts(ids_M=torch.cat(ids), exits_MD=torch.cat(exits))

    def _choose(self, plan: Plan, exits_PD: Tensor, ids: list[Tensor], positions_P: Tensor) -> Tensor:
        """The next draft of each row; `ids` are those so far. Edits are of any token: they take the whole head."""
        num_rows = len(exits_PD)
        sampling = plan.sampling.first(num_rows)
        if self._head is not None and not any(plan.edited[:num_rows]):
            return self._head.choose(self._model.weights.final_norm(exits_PD), sampling, positions_P)
        logits_PV = self._model.logits(exits_PD)
        if any(plan.edited):
            before = Before.step(
                np.arange(num_rows), [step_P[:num_rows] for step_P in ids], self._model.device
            )
            logits_PV = apply_edits(logits_PV, plan.edited, before)
        return self._model.choose(logits_PV, sampling, positions_P)

    def _run_to_exits(self, step: DraftStep, slots_BT: Ints, positions_B: Ints, ids_P: Tensor) -> Tensor:
        """Exit hiddens [P, D] of one token for each row: together through the stack, each up to its exit."""
        hidden_PD = self._model.embed(ids_P if step.order_P is None else ids_P[step.order_P])
        left: list[Tensor] = []
        for leg in step.legs:
            queries = self._attention.queries(leg.arrangement, slots_BT[leg.rows], positions_B[leg.rows])
            hidden_PD = self._model.run_layers(hidden_PD, leg.first, leg.last, queries)
            left.append(hidden_PD[leg.num_going_on :])
            hidden_PD = hidden_PD[: leg.num_going_on]
        return left[0] if step.back_P is None else torch.cat(left[::-1])[step.back_P]
