"""One pass of the full model over everything a step must compute, from where each token stands.

Known tokens enter at layer 0, drafted positions at their row's exit layer with the hidden state that drafting
left there, so that no layer runs twice on a token.

Shapes: B rows, N tokens of the pass, M positions that choose, K drafts, Q choices of a row, D model width,
T cache positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from decoding.attention import GatherAttention, Ints
from decoding.coupling import choose
from decoding.drafting import Drafts
from decoding.model import LlamaDecoder
from decoding.plan import Plan


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Ragged tokens in row order: row b has `counts_B[b]`, the first of them its `skipped_B[b]`-th."""

    counts_B: Ints
    skipped_B: Ints

    @property
    def rows_N(self) -> Ints:
        return np.repeat(np.arange(len(self.counts_B)), self.counts_B)

    @property
    def firsts_B(self) -> Ints:
        """Index in the ragged list of each row's first token."""
        return np.cumsum(self.counts_B) - self.counts_B

    @property
    def steps_N(self) -> Ints:
        """How many tokens of its row in this step come before each token."""
        rows_N = self.rows_N
        return np.arange(len(rows_N)) - (self.firsts_B - self.skipped_B)[rows_N]


class Verifier:
    """Runs the full model over fed tokens and drafts, and chooses at every position that may emit."""

    def __init__(self, model: LlamaDecoder, attention: GatherAttention) -> None:
        self._model = model
        self._attention = attention

    def choices(self, plan: Plan, slots_BT: Ints, fed_N: Tensor, drafts: Drafts | None) -> Tensor:
        """The full model's choice after each of a row's 0 … γ drafts: int64 [B, Q], 0 where a row has none.

        Stores keys and values of all fed tokens and drafts in all layers.
        """
        hidden_ND = self._run(plan, slots_BT, fed_N, drafts)
        whole = _Tokens(plan.num_fed_B + plan.draft_lengths_B, np.zeros_like(plan.num_fed_B))
        # A row chooses after its last known token and after each of its drafts.
        steps_N, rows_N = whole.steps_N, whole.rows_N
        chosen_M = np.flatnonzero(plan.chooses_B[rows_N] & (steps_N >= plan.num_fed_B[rows_N] - 1))
        rows_M, columns_M = rows_N[chosen_M], (steps_N - plan.num_fed_B[rows_N] + 1)[chosen_M]
        positions_M = plan.num_computed_B[rows_M] + steps_N[chosen_M] + 1
        if len(chosen_M) < len(hidden_ND):
            hidden_ND = hidden_ND[self._on_device(chosen_M)]
        choices_BQ = fed_N.new_zeros(plan.num_rows, int(plan.draft_lengths_B[0]) + 1)
        rows = self._on_device(rows_M)
        choices_BQ[rows, self._on_device(columns_M)] = choose(
            self._model.logits(hidden_ND), plan.sampling.take(rows), self._on_device(positions_M)
        )
        return choices_BQ

    def _run(self, plan: Plan, slots_BT: Ints, fed_N: Tensor, drafts: Drafts | None) -> Tensor:
        """Hidden states after the last layer of every fed token and draft, in row order."""
        is_drafting_B = plan.draft_lengths_B > 0
        joins = [int(e) for e in np.unique(plan.exit_layers_B[is_drafting_B])]
        standing = self._standing(plan, 0)
        hidden_ND = self._model.embed(self._entering_ids(plan, standing, fed_N, drafts))
        for first, last in zip([0, *joins], [*joins, self._model.num_layers], strict=True):
            if first > 0:
                assert drafts is not None
                joined = self._standing(plan, first)
                hidden_ND = self._join(standing, joined, hidden_ND, drafts)
                standing = joined
            queries = self._attention.queries(
                slots_BT, plan.num_computed_B + standing.skipped_B, standing.counts_B
            )
            hidden_ND = self._model.run_layers(hidden_ND, first, last, queries)
        return hidden_ND

    @staticmethod
    def _standing(plan: Plan, layer: int) -> _Tokens:
        """Which tokens run in `layer`: below its exit layer a drafting row still lacks only its last draft."""
        lacks_one_B = (plan.draft_lengths_B > 0) & (plan.exit_layers_B > layer)
        whole_B = plan.num_fed_B + plan.draft_lengths_B
        return _Tokens(
            counts_B=np.where(lacks_one_B, 1, whole_B), skipped_B=np.where(lacks_one_B, whole_B - 1, 0)
        )

    def _entering_ids(self, plan: Plan, entering: _Tokens, fed_N: Tensor, drafts: Drafts | None) -> Tensor:
        """Ids that enter layer 0: fed tokens, and each drafting row's last draft."""
        if drafts is None:
            return fed_N
        rows_N, steps_N = entering.rows_N, entering.steps_N
        is_draft_N = plan.draft_lengths_B[rows_N] > 0
        index_N = (np.cumsum(plan.num_fed_B) - plan.num_fed_B)[rows_N] + steps_N
        index_N[is_draft_N] = len(fed_N) + drafts.index(rows_N[is_draft_N], steps_N[is_draft_N] - 1)
        return torch.cat((fed_N, drafts.ids_M))[self._on_device(index_N)]

    def _join(self, before: _Tokens, after: _Tokens, hidden_ND: Tensor, drafts: Drafts) -> Tensor:
        """The tokens that run on, with the exit hiddens of the rows whose exit layer this is in their places."""
        rows_N, steps_N = after.rows_N, after.steps_N
        waits_N = steps_N < before.skipped_B[rows_N]
        index_N = (before.firsts_B - before.skipped_B)[rows_N] + steps_N
        index_N[waits_N] = len(hidden_ND) + drafts.index(rows_N[waits_N], steps_N[waits_N])
        return torch.cat((hidden_ND, drafts.exits_MD))[self._on_device(index_N)]

    def _on_device(self, array: Ints) -> Tensor:
        return torch.from_numpy(array).to(self._model.device)
