"""One pass of the full model over everything a step must compute, from where each token stands.

Known tokens enter at layer 0, drafted positions at their row's exit layer with the hidden state that drafting
left there, so that no layer runs twice on a token.

Shapes: B rows, N tokens of a leg, M positions that choose, Q choices of a row, D model width, T cache positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decoding.attention import GatherAttention
from decoding.coupling import choose
from decoding.drafting import Drafts
from decoding.model import LlamaDecoder
from decoding.plan import Plan
from decoding.ragged import Ints
from decoding.route import Route


class Verifier:
    """Runs the full model over fed tokens and drafts, and chooses at every position that may emit."""

    def __init__(self, model: LlamaDecoder, attention: GatherAttention) -> None:
        self._model = model
        self._attention = attention

    def choices(
        self, plan: Plan, route: Route, slots_BT: Ints, fed_N: Tensor, drafts: Drafts | None
    ) -> Tensor:
        """The full model's choice after each of a row's 0 … γ drafts: int64 [B, Q], anything where a row has none.

        Stores keys and values of all fed tokens and drafts in all layers.
        """
        hidden_ND = self._run(plan, route, slots_BT, fed_N, drafts)
        if route.choosing_M is not None:
            if len(route.choosing_M) == 0:
                return fed_N.new_zeros(route.choices_BQ.shape)
            hidden_ND = hidden_ND[route.choosing_M]
        computed_B = torch.from_numpy(plan.num_computed_B).to(hidden_ND.device)
        chosen_M = choose(
            self._model.logits(hidden_ND),
            plan.sampling.take(route.rows_M),
            computed_B[route.rows_M] + route.ahead_M,
        )
        return chosen_M[route.choices_BQ]

    def _run(self, plan: Plan, route: Route, slots_BT: Ints, fed_N: Tensor, drafts: Drafts | None) -> Tensor:
        """Hidden states after the last layer of every fed token and draft, in row order."""
        entering, *later = route.verify_legs
        ids_N = fed_N if drafts is None else torch.cat((fed_N, drafts.ids_M))[entering.join_N]
        hidden_ND = self._model.embed(ids_N)
        for leg in (entering, *later):
            if leg is not entering:
                assert drafts is not None
                hidden_ND = torch.cat((hidden_ND, drafts.exits_MD))[leg.join_N]
            queries = self._attention.queries(leg.arrangement, slots_BT, plan.num_computed_B)
            hidden_ND = self._model.run_layers(hidden_ND, leg.first, leg.last, queries)
        return hidden_ND
