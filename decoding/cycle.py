"""Draft, verify, keep: one step of a batch on the device. Changes nothing but the KV cache.

Knows plans and results; knows nothing of sequences or why a row is in the batch.

Shapes: B rows, N tokens fed, W blocks, T cache positions, K drafts, Q choices of a row.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from decoding.acceptance import num_kept
from decoding.attention import GatherAttention, Ints
from decoding.drafting import Drafts, EarlyExitDrafter
from decoding.model import LlamaDecoder
from decoding.plan import Plan, Result
from decoding.verification import Verifier


class Cycle:
    """Runs plans. Before a cycle each decoding row has one committed token whose KV is in no layer; after it,
    the same holds for the row's newest token. What rejected drafts stored is overwritten, never erased.
    """

    def __init__(
        self, model: LlamaDecoder, attention: GatherAttention, *, block_size: int, clock: Callable[[], float]
    ) -> None:
        self._device = model.device
        self._drafter = EarlyExitDrafter(model, attention)
        self._verifier = Verifier(model, attention)
        self._offsets = np.arange(block_size, dtype=np.int64)
        self._clock = clock

    @torch.inference_mode()
    def run(self, plan: Plan) -> Result:
        """Compute the plan's tokens; every row that chooses gets at least one new token."""
        started = self._clock()
        slots_BT = self._slots(plan.blocks_BW)
        fed_N = torch.from_numpy(plan.fed_N).to(self._device)
        drafts = self._draft(plan, slots_BT, fed_N)
        drafted = self._clock()
        choices_BQ = self._verifier.choices(plan, slots_BT, fed_N, drafts)
        chosen = self._keep(plan, drafts, choices_BQ)
        return Result(chosen=chosen, draft_s=drafted - started, verify_s=self._clock() - drafted)

    def _draft(self, plan: Plan, slots_BT: Ints, fed_N: Tensor) -> Drafts | None:
        if plan.draft_lengths_B[0] == 0:
            return None
        last_B = torch.from_numpy(np.cumsum(plan.num_fed_B) - 1).to(self._device)
        return self._drafter.draft(plan, slots_BT, fed_N[last_B])

    def _keep(self, plan: Plan, drafts: Drafts | None, choices_BQ: Tensor) -> tuple[tuple[int, ...], ...]:
        if drafts is None:
            kept_B = choices_BQ.new_zeros(plan.num_rows)
        else:
            draft_lengths_B = torch.from_numpy(plan.draft_lengths_B).to(self._device)
            kept_B = num_kept(self._padded(plan, drafts), choices_BQ, draft_lengths_B)
        # The step's one copy from the device.
        rows = torch.cat((kept_B[:, None], choices_BQ), dim=1).tolist()
        return tuple(
            tuple(choices[: kept + 1]) if chooses else ()
            for (kept, *choices), chooses in zip(rows, plan.chooses_B, strict=True)
        )

    def _padded(self, plan: Plan, drafts: Drafts) -> Tensor:
        """Drafts as [B, K]; anything stands past a row's draft length."""
        steps_K = np.arange(plan.draft_lengths_B[0])
        rows_B1 = np.arange(plan.num_rows)[:, None]
        index_BK = np.where(steps_K < plan.draft_lengths_B[:, None], drafts.index(rows_B1, steps_K), 0)
        return drafts.ids_M[torch.from_numpy(index_BK).to(self._device)]

    def _slots(self, blocks_BW: Ints) -> Ints:
        size = len(self._offsets)
        return (blocks_BW[:, :, None] * size + self._offsets).reshape(len(blocks_BW), -1)
