"""Log-probabilities of tokens under the full model, as it stands: no edits, temperature or filters.

Knows logits and ids; knows nothing of what a token is chosen by.

Shapes: N tokens, V vocabulary, K most probable tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decoding.messages import TokenLogprob


def token_logprobs(logits_NV: Tensor, ids_N: Tensor, *, num_top: int) -> list[TokenLogprob]:
    """How probable each id was, its rank, and the `num_top` ≥ 0 most probable ids.

    Computed in float32 or float64. Copies to the host.
    """
    wide_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    logprobs_NV = wide_NV.log_softmax(-1)
    own_N1 = logprobs_NV.gather(-1, ids_N[:, None])
    ranks_N = (logprobs_NV > own_N1).sum(-1) + 1
    top = logprobs_NV.topk(min(num_top, logits_NV.shape[-1]), dim=-1)
    columns = zip(
        own_N1[:, 0].tolist(), ranks_N.tolist(), top.indices.tolist(), top.values.tolist(), strict=True
    )
    return [TokenLogprob(own, rank, ids, values) for own, rank, ids, values in columns]
