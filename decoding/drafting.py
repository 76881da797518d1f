"""Proposes tokens with the first layers of the model, and keeps what verification starts from.

Knows rows, exit layers and draft lengths; knows nothing of which drafts will stand.

Shapes: B rows, P rows still drafting, K drafts, D model width, T cache positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from decoding.attention import GatherAttention, Ints
from decoding.coupling import choose
from decoding.model import LlamaDecoder
from decoding.plan import Plan


@dataclass(frozen=True, slots=True)
class Drafts:
    """Proposed ids, and the exit hidden of every token that a draft step was fed.

    `exits_BKD[b, i]` belongs to position `num_computed_B[b] + i`: the committed token for i = 0, then the
    drafts but the last. Entries past a row's draft length mean nothing.
    """

    ids_BK: Tensor
    exits_BKD: Tensor


class EarlyExitDrafter:
    """Runs layers 0 … E − 1 and the model's own head, once for each draft (LayerSkip, arXiv 2404.16710, §4.3)."""

    def __init__(self, model: LlamaDecoder, attention: GatherAttention) -> None:
        self._model = model
        self._attention = attention

    def draft(self, plan: Plan, slots_BT: Ints, last_ids_B: Tensor) -> Drafts:
        """Draft for every row with a draft length; `last_ids_B` are the rows' committed, uncomputed tokens."""
        num_steps = int(plan.draft_lengths_B.max())
        # Deeper exits first, so that the rows that go on at a boundary are always a prefix.
        order_B = np.argsort(-plan.exit_layers_B, kind="stable")
        ids_BK = last_ids_B.new_zeros(plan.num_rows, num_steps)
        exits: list[Tensor] = []
        fed_B = last_ids_B
        for step in range(num_steps):
            rows_P = order_B[plan.draft_lengths_B[order_B] > step]
            rows = torch.from_numpy(rows_P).to(fed_B.device)
            exit_PD = self._run_to_exits(plan, slots_BT, rows_P, step, fed_B[rows])
            positions_P = torch.from_numpy(plan.num_computed_B[rows_P] + step + 1).to(fed_B.device)
            chosen_P = choose(self._model.logits(exit_PD), plan.sampling.take(rows), positions_P)
            ids_BK[rows, step] = chosen_P
            fed_B = ids_BK[:, step]
            exits.append(exit_PD.new_zeros(plan.num_rows, exit_PD.shape[-1]).index_copy_(0, rows, exit_PD))
        return Drafts(ids_BK=ids_BK, exits_BKD=torch.stack(exits, dim=1))

    def _run_to_exits(self, plan: Plan, slots_BT: Ints, rows_P: Ints, step: int, ids_P: Tensor) -> Tensor:
        """Exit hiddens [P, D] of one token for each row: together through the stack, each up to its exit."""
        exit_layers_P = plan.exit_layers_B[rows_P]
        hidden_PD = self._model.embed(ids_P)
        left: list[Tensor] = []
        first = 0
        for exit_layer in np.unique(exit_layers_P):
            rows = rows_P[: len(hidden_PD)]
            queries = self._attention.queries(
                slots_BT[rows], plan.num_computed_B[rows] + step, np.ones(len(rows), dtype=np.int64)
            )
            hidden_PD = self._model.run_layers(hidden_PD, first, int(exit_layer), queries)
            num_going_on = int((exit_layers_P > exit_layer).sum())
            left.append(hidden_PD[num_going_on:])
            hidden_PD = hidden_PD[:num_going_on]
            first = int(exit_layer)
        return torch.cat(left[::-1]) if len(left) > 1 else left[0]
