"""One pass of the full model over everything a step must compute, from where each token stands.

Known tokens enter at layer 0, drafted positions at their row's exit layer with the hidden state that drafting
left there, so that no layer runs twice on a token.

Shapes: B rows, N tokens of a leg, M positions that choose, Q choices of a row, D model width, V vocabulary,
T cache positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from decoding.attention import Attention
from decoding.edited_logits import Before, apply_edits
from decoding.logprobs import token_logprobs
from decoding.messages import TokenLogprob
from decoding.model import LlamaDecoder
from decoding.plan import Plan, PromptScoring
from decoding.ragged import Ints
from decoding.route import Route

_SCORED_AT_ONCE: Final = 64
"""Prompt positions whose logits are held together: a long prompt's would fill the memory."""

Logprobs = Mapping[int, tuple[TokenLogprob, ...]]
"""By row, of those that want them."""


@dataclass(frozen=True, slots=True)
class Verified:
    """The full model's choice after each of a row's 0 … γ drafts, int64 [B, Q], anything where a row has none;
    log-probabilities of the choices and of prompts; for each surveyed exit layer whether its choice is the row's
    first one, bool [B].
    """

    choices_BQ: Tensor
    logprobs: Logprobs
    prompt_logprobs: Logprobs
    agreed: Sequence[Tensor] = ()


class Verifier:
    """Runs the full model over fed tokens and drafts, and chooses at every position that may emit."""

    def __init__(self, model: LlamaDecoder, attention: Attention) -> None:
        self._model = model
        self._attention = attention

    def verify(
        self, plan: Plan, route: Route, slots_BT: Ints, ids_N: Tensor, exits_MD: Tensor | None
    ) -> Verified:
        """Choose. `ids_N` are the fed ids, then those of drafts that were made; `exits_MD` are the exit hiddens of
        those by early exit.

        Stores keys and values of all fed tokens and drafts in all layers.
        """
        *passed, hidden_ND = self._run(plan, route, slots_BT, ids_N, exits_MD)
        prompt_logprobs = {
            row: self._prompt_logprobs(hidden_ND[int(route.places.firsts_B[row]) :], wanted.prompt)
            for row, wanted in enumerate(plan.wanted)
            if wanted is not None and wanted.prompt is not None
        }
        if route.choosing_M is not None:
            if len(route.choosing_M) == 0:
                return Verified(ids_N.new_zeros(route.choices_BQ.shape), {}, prompt_logprobs)
            *passed, hidden_ND = (each_ND[route.choosing_M] for each_ND in (*passed, hidden_ND))
        logits_MV, chosen_M = self._choose(plan, route, hidden_ND, ids_N)
        firsts_B = route.choices_BQ[:, 0]
        return Verified(
            choices_BQ=chosen_M[route.choices_BQ],
            logprobs=self._choice_logprobs(plan, route, logits_MV, chosen_M),
            prompt_logprobs=prompt_logprobs,
            agreed=[(self._choose(plan, route, each, ids_N)[1] == chosen_M)[firsts_B] for each in passed],
        )

    def _choose(self, plan: Plan, route: Route, hidden_MD: Tensor, ids_N: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [M, V] of hidden states after any layer, and the tokens [M] that stand there by them."""
        computed_B = torch.from_numpy(plan.num_computed_B).to(hidden_MD.device, non_blocking=True)
        logits_MV = self._model.logits(hidden_MD)
        chosen_M = self._model.choose(
            self._edited(plan, route, logits_MV, ids_N),
            plan.sampling.take(route.rows_M),
            computed_B[route.rows_M] + route.ahead_M,
        )
        return logits_MV, chosen_M

    def _run(
        self, plan: Plan, route: Route, slots_BT: Ints, ids_N: Tensor, exits_MD: Tensor | None
    ) -> list[Tensor]:
        """Hidden states [N, D] of every fed token and draft, in row order: after surveyed layers, and the last."""
        entering, *later = route.verify_legs
        are_all_fed = len(ids_N) == len(plan.fed_N)
        hidden_ND = self._model.embed(ids_N if are_all_fed else ids_N[entering.join_N])
        for leg in (entering, *later):
            if leg is not entering:
                assert exits_MD is not None
                hidden_ND = torch.cat((hidden_ND, exits_MD))[leg.join_N]
            queries = self._attention.queries(leg.arrangement, slots_BT, plan.num_computed_B)
            first, passed = leg.first, []
            for last in (*plan.surveyed, leg.last):
                hidden_ND = self._model.run_layers(hidden_ND, first, last, queries)
                passed.append(hidden_ND)
                first = last
        return passed

    @staticmethod
    def _edited(plan: Plan, route: Route, logits_MV: Tensor, ids_N: Tensor) -> Tensor:
        """Logits edited behind each choice's known ids and the drafts before it."""
        if not any(plan.edited):
            return logits_MV
        # Log-probabilities are of logits as they were.
        if any(wanted is not None and wanted.num_top is not None for wanted in plan.wanted):
            logits_MV = logits_MV.clone()
        places = route.places
        drafts_MK = ids_N[route.drafts_BK[route.rows_M]]
        return apply_edits(logits_MV, plan.edited, Before(places.rows_M, places.num_drafts_M, drafts_MK))

    @staticmethod
    def _choice_logprobs(plan: Plan, route: Route, logits_MV: Tensor, chosen_M: Tensor) -> Logprobs:
        found = {}
        for row, wanted in enumerate(plan.wanted):
            if wanted is not None and wanted.num_top is not None:
                own = torch.from_numpy(np.flatnonzero(route.places.rows_M == row)).to(chosen_M.device)
                found[row] = tuple(token_logprobs(logits_MV[own], chosen_M[own], num_top=wanted.num_top))
        return found

    def _prompt_logprobs(self, hidden_ND: Tensor, wanted: PromptScoring) -> tuple[TokenLogprob, ...]:
        targets = torch.from_numpy(wanted.targets).to(hidden_ND.device)
        found: list[TokenLogprob] = []
        for start in range(0, len(targets), _SCORED_AT_ONCE):
            ids = targets[start : start + _SCORED_AT_ONCE]
            first = wanted.first + start
            logits_NV = self._model.logits(hidden_ND[first : first + len(ids)])
            found += token_logprobs(logits_NV, ids, num_top=wanted.num_top)
        return tuple(found)
