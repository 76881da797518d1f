"""Drafts by early exit in one call of compiled code, where nothing of them needs more than that.

Knows which plans compiled code drafts for; knows nothing of how it does.
"""

from __future__ import annotations

from torch import Tensor

from decoding.attention import Attention
from decoding.compiled import CompiledDecoder
from decoding.draft_head import DraftHead
from decoding.drafting import Drafts, EarlyExitDrafter
from decoding.model import LlamaDecoder
from decoding.plan import Plan
from decoding.ragged import Ints
from decoding.route import Route


class CompiledDrafter(EarlyExitDrafter):
    """Drafts step by step only for rows that leave at different exit layers or edit logits."""

    def __init__(self, model: CompiledDecoder, attention: Attention) -> None:
        super().__init__(model, attention)
        self._compiled = model

    def draft(self, plan: Plan, route: Route, slots_BT: Ints, last_ids_B: Tensor) -> Drafts:
        """Draft for every row with a draft length; `last_ids_B` are the rows' committed, uncomputed tokens."""
        if any(plan.edited) or any(s.order_P is not None for s in route.draft_steps):
            return super().draft(plan, route, slots_BT, last_ids_B)
        ids_M, exits_MD = self._compiled.draft(
            route.draft_steps[0].legs[-1].last,
            plan.draft_lengths_B,
            last_ids_B,
            slots_BT,
            plan.num_computed_B,
            plan.sampling,
        )
        return Drafts(ids_M=ids_M, exits_MD=exits_MD)


def make_drafter(model: LlamaDecoder, attention: Attention, head: DraftHead | None) -> EarlyExitDrafter:
    """The fastest that this model, and a draft head if there is one, allow."""
    if isinstance(model, CompiledDecoder) and head is None:
        return CompiledDrafter(model, attention)
    return EarlyExitDrafter(model, attention, head)
