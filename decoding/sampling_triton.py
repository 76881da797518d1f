"""The choice rule and the keep rule by Triton kernels: noise is not stored, nothing is sorted, no host waits.

Knows rows of scores; knows nothing of drafts being made or why a row is there. Where `takes_kernels` says so,
`coupling`, `logits` and `acceptance` come here.

Shapes: N rows, V vocabulary, P parts of a row, B rows, K drafts, Q verified positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from decoding import sampling_kernels

if TYPE_CHECKING:
    from decoding.logits import Sampling

# Sizes are fixed, never chosen by a timing or by what stands beside a row.

_PART: Final = 4096
"""Ids of a row that one program scores: enough programs for a device even with one row."""

_WIDTH: Final = 1024
"""Ids that it scores at once."""

_WIDE: Final = 4096
_MANY_WARPS: Final = 16
"""The same where one program reads a whole row."""


_DRAFTS: Final = 64
"""Drafts that the keep rule looks at together: one kernel serves every draft length that may be asked for."""


def choose(logits_NV: Tensor, scores_NV: Tensor | None, sampling: Sampling, positions_N: Tensor) -> Tensor:
    """As `coupling.choose`, int64 [N]. `scores_NV`, float32, are what filters have left of the logits; None where
    there are no filters, so that temperatures act here.
    """
    rows_NV = _rows(logits_NV if scores_NV is None else scores_NV)
    num_rows, vocab_size = rows_NV.shape
    num_parts = -(-vocab_size // _PART)
    best_NP = rows_NV.new_empty((num_rows, num_parts), dtype=torch.float32)
    best_ids_NP = rows_NV.new_empty((num_rows, num_parts), dtype=torch.int32)
    chosen_N = rows_NV.new_empty((num_rows,), dtype=torch.int64)
    with torch.cuda.device(rows_NV.get_device()):
        sampling_kernels.choose_in_part[num_rows, num_parts](
            best_NP,
            best_ids_NP,
            rows_NV,
            # Scores are measured from the row's best; of processed ones it is not read.
            rows_NV.amax(-1) if scores_NV is None else rows_NV,
            sampling.temperatures_N,
            sampling.keys_2N,
            positions_N,
            vocab_size,
            rows_NV.stride(0),
            sampling.keys_2N.stride(0),
            num_parts,
            IS_PROCESSED=scores_NV is not None,
            PART=_PART,
            WIDTH=_WIDTH,
            enable_fp_fusion=False,
        )
        sampling_kernels.choose_among_parts[num_rows,](
            chosen_N, best_NP, best_ids_NP, num_parts, PARTS=_power_of_two(num_parts)
        )
    return chosen_N


def truncate(scores_NV: Tensor, sampling: Sampling) -> None:
    """Drop what the rows' top-k and then top-p leave out of scores whose best is 0, in float32."""
    assert scores_NV.dtype == torch.float32
    assert scores_NV.stride(1) == 1
    with torch.cuda.device(scores_NV.get_device()):
        sampling_kernels.truncate[len(scores_NV),](
            scores_NV,
            sampling.top_ks_N,
            sampling.top_ps_N,
            scores_NV.shape[1],
            scores_NV.stride(0),
            WIDTH=_WIDE,
            num_warps=_MANY_WARPS,
        )


def num_kept(drafts_BK: Tensor, choices_BQ: Tensor, draft_lengths_B: Tensor) -> Tensor:
    """As `acceptance.num_kept`, int64 [B]."""
    num_rows, num_drafts = drafts_BK.shape
    drafts_BK, choices_BQ = _rows(drafts_BK), _rows(choices_BQ)
    kept_B = choices_BQ.new_empty((num_rows,), dtype=torch.int64)
    with torch.cuda.device(drafts_BK.get_device()):
        sampling_kernels.keep[num_rows,](
            kept_B,
            drafts_BK,
            choices_BQ,
            draft_lengths_B,
            num_drafts,
            drafts_BK.stride(0),
            choices_BQ.stride(0),
            DRAFTS=max(_DRAFTS, _power_of_two(num_drafts)),
        )
    return kept_B


def warm_up(sampling: Sampling, *, vocab_size: int, dtype: torch.dtype) -> None:
    """Compile what steps need, so that none waits for it, for logits of this kind. `sampling` is of one row."""
    device = sampling.temperatures_N.device
    logits_NV = torch.zeros(1, vocab_size, dtype=dtype, device=device)
    scores_NV = logits_NV.float()
    ids_B1 = torch.zeros(1, 1, dtype=torch.int64, device=device)
    truncate(scores_NV, sampling)
    for scores in (None, scores_NV):
        choose(logits_NV, scores, sampling, ids_B1[0])
    num_kept(ids_B1, ids_B1, ids_B1[0])


def _rows(table: Tensor) -> Tensor:
    """A table whose rows lie in one piece each; it may be a view of a wider one."""
    return table if table.stride(-1) == 1 else table.contiguous()


def _power_of_two(number: int) -> int:
    """The least power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()
