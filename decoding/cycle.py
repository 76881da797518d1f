"""Draft, verify, keep: one step of a batch on the device. Changes no sequence and no plan, only the KV cache.

Knows plans and results; knows nothing of sequences or why a row is in the batch.

Shapes: B rows, N tokens fed, W blocks, T cache positions, K drafts, Q choices of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from decoding.acceptance import num_kept_on_host
from decoding.attention import Attention
from decoding.compiled_drafting import make_drafter
from decoding.draft_head import DraftHead
from decoding.draft_model import DraftModel
from decoding.model import LlamaDecoder
from decoding.plan import Plan, Reported, Result
from decoding.ragged import Ints
from decoding.route import Route, Routes
from decoding.verification import Verified, Verifier

Chosen = tuple[tuple[int, ...], ...]


class Cycle:
    """Runs plans. Before a cycle each decoding row has one committed token whose KV is in no layer; after it,
    the same holds for the row's newest token. What rejected drafts stored is overwritten, never erased.
    """

    def __init__(
        self,
        model: LlamaDecoder,
        attention: Attention,
        *,
        block_size: int,
        clock: Callable[[], float],
        draft_model: DraftModel | None = None,
        draft_head: DraftHead | None = None,
    ) -> None:
        self._device = model.device
        self._routes = Routes(attention, num_layers=model.num_layers, device=model.device)
        self._drafter = make_drafter(model, attention, draft_head)
        self._see = model.see if draft_head is None else draft_head.see
        self._draft_model = draft_model
        self._verifier = Verifier(model, attention)
        self._offsets = np.arange(block_size, dtype=np.int64)
        self._clock = clock

    @torch.inference_mode()
    def run(self, plan: Plan) -> Result:
        """Compute the plan's tokens; every row that chooses gets at least one new token."""
        started = self._clock()
        route = self._routes.of(plan)
        slots_BT = self.slots(plan.blocks_BW)
        fed_N = torch.from_numpy(plan.fed_N).to(self._device, non_blocking=True)
        ids_N, exits_MD = fed_N, None
        if route.draft_steps:
            drafts = self._drafter.draft(plan, route, slots_BT, fed_N[route.last_fed_B])
            ids_N, exits_MD = torch.cat((fed_N, drafts.ids_M)), drafts.exits_MD
        has_foreign = bool(plan.model_lengths_B.any())
        if self._draft_model and has_foreign:
            ids_N = torch.cat((ids_N, self._draft_model.draft(plan, slots_BT)))
        drafted = self._clock()
        # Where nobody asks for its drafts this is no cost of drafting: it comes at any draft length.
        if self._draft_model and not has_foreign:
            self._draft_model.follow(plan, slots_BT)
        verified = self._verifier.verify(plan, route, slots_BT, ids_N, exits_MD)
        chosen = self._keep(plan, route, ids_N, verified.choices_BQ)
        if self._see is not None:
            self._see(np.array([*plan.fed_N.tolist(), *chain.from_iterable(chosen)]))
        reported = self._report(plan, route, ids_N, verified, chosen)
        verify_s = self._clock() - drafted
        return Result(
            chosen=chosen,
            reported=reported,
            draft_s=drafted - started,
            verify_s=verify_s,
            agreed=tuple(tuple(each_B.tolist()) for each_B in verified.agreed),
        )

    @staticmethod
    def _keep(plan: Plan, route: Route, ids_N: Tensor, choices_BQ: Tensor) -> Chosen:
        num_drafts_B = plan.num_drafts_B
        # The step's one copy from the device.
        both = torch.cat((ids_N[route.drafts_BK], choices_BQ), dim=1).cpu().numpy()
        drafts_BK, chosen_BQ = np.hsplit(both, [num_drafts_B.max()])
        kept_B = num_kept_on_host(drafts_BK, chosen_BQ, num_drafts_B)
        rows = zip(kept_B.tolist(), chosen_BQ.tolist(), plan.chooses_B.tolist(), strict=True)
        return tuple(tuple(choices[: kept + 1]) if chooses else () for kept, choices, chooses in rows)

    @staticmethod
    def _report(
        plan: Plan, route: Route, ids_N: Tensor, verified: Verified, chosen: Chosen
    ) -> tuple[Reported | None, ...]:
        if not any(plan.wanted):
            return (None,) * plan.num_rows
        # A copy of its own, which only steps with such rows pay for.
        ids = ids_N.tolist()
        places, num_drafts_B = route.places, plan.num_drafts_B
        reported: list[Reported | None] = []
        for row, (wanted, own) in enumerate(zip(plan.wanted, chosen, strict=True)):
            if wanted is None:
                reported.append(None)
                continue
            drafts = places.drafts_BK[row, : num_drafts_B[row]].tolist() if wanted.drafts else []
            reported.append(
                Reported(
                    logprobs=verified.logprobs.get(row, ())[: len(own)],
                    prompt_logprobs=verified.prompt_logprobs.get(row, ()),
                    drafted_ids=tuple(ids[index] for index in drafts),
                )
            )
        return tuple(reported)

    def slots(self, blocks_BW: Ints) -> Ints:
        """The cache slots of each row's positions, [B, T]."""
        return (blocks_BW[:, :, None] * len(self._offsets) + self._offsets).reshape(len(blocks_BW), -1)
