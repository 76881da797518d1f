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
    """Proposed ids, and the exit hidden of every token that a draft step was fed, step after step.

    Entry `firsts_K[i] + b` of both belongs to row b's step i: the id is its draft i, the exit hidden that of
    position `num_computed_B[b] + i`, which holds the committed token for i = 0 and draft i − 1 after it.
    """

    ids_M: Tensor
    exits_MD: Tensor
    firsts_K: Ints

    def index(self, rows: Ints, steps: Ints) -> Ints:
        """Entries of these rows' steps, which must be below the rows' draft lengths."""
        return self.firsts_K[steps] + rows


class EarlyExitDrafter:
    """Runs layers 0 … E − 1 and the model's own head, once for each draft (LayerSkip, arXiv 2404.16710, §4.3)."""

    def __init__(self, model: LlamaDecoder, attention: GatherAttention) -> None:
        self._model = model
        self._attention = attention

    def draft(self, plan: Plan, slots_BT: Ints, last_ids_B: Tensor) -> Drafts:
        """Draft for every row with a draft length; `last_ids_B` are the rows' committed, uncomputed tokens."""
        # Rows come with falling draft lengths, so those that still draft are always the first P.
        num_drafting_K = (plan.draft_lengths_B > np.arange(plan.draft_lengths_B[0])[:, None]).sum(1)
        next_positions_B = torch.from_numpy(plan.num_computed_B + 1).to(last_ids_B.device)
        ids: list[Tensor] = []
        exits: list[Tensor] = []
        fed_P = last_ids_B
        for step, num_rows in enumerate(num_drafting_K.tolist()):
            exits.append(self._run_to_exits(plan, slots_BT, step, fed_P[:num_rows]))
            logits_PV = self._model.logits(exits[-1])
            fed_P = choose(logits_PV, plan.sampling.first(num_rows), next_positions_B[:num_rows] + step)
            ids.append(fed_P)
        return Drafts(
            ids_M=torch.cat(ids),
            exits_MD=torch.cat(exits),
            firsts_K=np.cumsum(num_drafting_K) - num_drafting_K,
        )

    def _run_to_exits(self, plan: Plan, slots_BT: Ints, step: int, ids_P: Tensor) -> Tensor:
        """Exit hiddens [P, D] of the first P rows' tokens: together through the stack, each up to its exit."""
        exit_layers_P = plan.exit_layers_B[: len(ids_P)]
        # Deeper exits first, so that the rows that go on at a boundary are the first ones too.
        order_P = np.argsort(-exit_layers_P, kind="stable")
        hidden_PD = self._model.embed(ids_P[self._on_device(order_P)])
        left: list[Tensor] = []
        first = 0
        for exit_layer in np.unique(exit_layers_P).tolist():
            rows = order_P[: len(hidden_PD)]
            queries = self._attention.queries(
                slots_BT[rows], plan.num_computed_B[rows] + step, np.ones_like(rows)
            )
            hidden_PD = self._model.run_layers(hidden_PD, first, exit_layer, queries)
            num_going_on = int((exit_layers_P > exit_layer).sum())
            left.append(hidden_PD[num_going_on:])
            hidden_PD = hidden_PD[:num_going_on]
            first = exit_layer
        return torch.cat(left[::-1])[self._on_device(np.argsort(order_P))]

    def _on_device(self, array: Ints) -> Tensor:
        return torch.from_numpy(array).to(self._model.device)
