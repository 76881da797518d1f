"""The keep rule. Knows only drafts and choices.

Shapes: B rows, K drafts, Q = K + 1 verified positions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from decoding.kernel_devices import takes_kernels
from decoding.ragged import Ints


def num_kept(drafts_BK: Tensor, choices_BQ: Tensor, draft_lengths_B: Tensor) -> Tensor:
    """How many drafts of each row stand: the run of them, from the first, that the full model chose too.

    `choices_BQ[b, i]` is the full model's choice after i drafts of row b; a row's drafts past its draft
    length count for nothing. Returns int64 [B].
    """
    if takes_kernels(choices_BQ):
        from decoding import sampling_triton

        return sampling_triton.num_kept(drafts_BK, choices_BQ, draft_lengths_B)
    positions_K = torch.arange(drafts_BK.shape[1], device=drafts_BK.device)
    equal_BK = (drafts_BK == choices_BQ[:, : drafts_BK.shape[1]]) & (positions_K < draft_lengths_B[:, None])
    return equal_BK.cumprod(1).sum(1)


def num_kept_on_host(drafts_BK: Ints, choices_BQ: Ints, draft_lengths_B: Ints) -> Ints:
    """The same of numbers that have come to the host."""
    num_drafts = drafts_BK.shape[1]
    is_equal_BK = drafts_BK == choices_BQ[:, :num_drafts]
    is_equal_BK &= np.arange(num_drafts) < draft_lengths_B[:, None]
    kept_B: Ints = np.multiply.accumulate(is_equal_BK, axis=1, dtype=np.int64).sum(axis=1)
    return kept_B
