"""A separate small model that drafts for the full one: two-model speculation (arXiv 2211.17192), to compare with.

Knows plans and its own cache; knows nothing of which drafts will stand.

Shapes: B rows, P rows still drafting, N tokens, M drafts of all rows, D model width, T cache positions.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

from decoding.attention import Arrangement, Attention, context_classes
from decoding.edited_logits import Before, apply_edits
from decoding.model import LlamaDecoder
from decoding.plan import Plan
from decoding.ragged import Ints, Ragged

_MOST_ARRANGEMENTS: Final = 64


class DraftModel:
    """Follows every sequence, whoever drafts for it, and drafts for those that ask for it.

    Its cache has as many slots as the full model's, so that one block table serves both. One counting rule keeps
    it right: in each step it is first fed all known tokens that it lacks, in one pass for all rows. These are a
    prompt's chunk, what was kept of others' drafts, or its own last draft, which it was never fed. What it has
    computed is counted apart from what the full model has; a block is shared once both have computed it. Whatever
    its cache holds, it can only cost drafts, never change a token.
    """

    def __init__(self, model: LlamaDecoder, attention: Attention) -> None:
        self.model = model
        self._attention = attention
        self._arrangements: dict[tuple[bytes, bytes], Arrangement] = {}

    def draft(self, plan: Plan, slots_BT: Ints) -> Tensor:
        """Follow, then draft for the rows that ask for it: the ids [M], step after step, rows in order."""
        rows = np.flatnonzero(plan.model_lengths_B)
        hidden_PD = self.follow(plan, slots_BT)[self._on_device(rows)]
        ids: list[Tensor] = []
        # The same, of the rows that still draft.
        so_far: list[Tensor] = []
        for ahead in range(int(plan.model_lengths_B.max())):
            goes_on = plan.model_lengths_B[rows] > ahead
            if not goes_on.all():
                going_on = self._on_device(np.flatnonzero(goes_on))
                rows, so_far = rows[goes_on], [ids_P[going_on] for ids_P in so_far]
            if ahead:
                one_each = np.ones_like(rows)
                hidden_PD = self._run(so_far[-1], rows, one_each, slots_BT, plan.num_computed_B + ahead)
            ids.append(self._choose(plan, hidden_PD, rows, so_far))
            so_far.append(ids[-1])
        return torch.cat(ids)

    def follow(self, plan: Plan, slots_BT: Ints) -> Tensor:
        """Compute what is lacking of every row: hidden states [B, D] of the last known tokens."""
        following = plan.following
        assert following is not None
        fed_N, every_row = self._on_device(following.ids_N), np.arange(plan.num_rows)
        hidden_ND = self._run(fed_N, every_row, following.counts_B, slots_BT, following.starts_B)
        return hidden_ND[self._on_device(np.cumsum(following.counts_B) - 1)]

    def _run(self, ids_N: Tensor, rows: Ints, counts_P: Ints, slots_BT: Ints, starts_B: Ints) -> Tensor:
        """Hidden states after the last layer of so many tokens of each of `rows`."""
        starts_P = starts_B[rows]
        arrangement = self._arrange(counts_P, context_classes(starts_P + counts_P))
        queries = self._attention.queries(arrangement, slots_BT[rows], starts_P)
        return self.model.run_layers(self.model.embed(ids_N), 0, self.model.num_layers, queries)

    def _arrange(self, counts_P: Ints, classes_P: Ints) -> Arrangement:
        """Kept for the few shapes that come again and again while a batch decodes."""
        key = counts_P.tobytes(), classes_P.tobytes()
        if key not in self._arrangements:
            if len(self._arrangements) >= _MOST_ARRANGEMENTS:
                self._arrangements.clear()
            self._arrangements[key] = self._attention.arrange(Ragged.of(counts_P), classes_P)
        return self._arrangements[key]

    def _choose(self, plan: Plan, hidden_PD: Tensor, rows: Ints, so_far: list[Tensor]) -> Tensor:
        """By the full model's rule with the full model's noise: a draft is kept if both would choose it."""
        logits_PV = self.model.logits(hidden_PD)
        if any(plan.edited):
            before = Before.step(rows, so_far, self.model.device)
            logits_PV = apply_edits(logits_PV, plan.edited, before)
        positions_P = self._on_device(plan.num_computed_B[rows] + 1 + len(so_far))
        return self.model.choose(logits_PV, plan.sampling.take(self._on_device(rows)), positions_P)

    def _on_device(self, array: Ints) -> Tensor:
        return torch.from_numpy(array).to(self.model.device, non_blocking=True)
