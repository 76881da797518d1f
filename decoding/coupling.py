"""The choice rule: which token stands at a position, given logits, sampling parameters and a seed.

Knows nothing of drafts. Draft and full model use this rule with the same noise, so a draft is kept exactly
when it equals the full model's choice, and the same seed gives the same text whatever was speculated
(drafter-invariant coupling: Daliri, Musco, Suresh, arXiv 2408.07978).

Shapes: N tokens, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from decoding.logits import Sampling, process
from decoding.noise import gumbel_noise


def choose(logits_NV: Tensor, sampling: Sampling, positions_N: Tensor) -> Tensor:
    """The token that stands at each position: argmax(processed / temperature + noise), int64 [N].

    `positions_N` are those of the chosen tokens themselves. Rows with temperature 0 take the argmax of
    their logits; ties go to the lowest id. Neither argument is changed.
    """
    if not sampling.any_sampled:
        return logits_NV.argmax(-1)
    scores_NV = process(logits_NV, sampling)
    noise_NV = gumbel_noise(sampling.keys_2N, positions_N, logits_NV.shape[-1], dtype=scores_NV.dtype)
    if not sampling.all_sampled:
        noise_NV *= (sampling.temperatures_N > 0)[:, None]
    return scores_NV.add_(noise_NV).argmax(-1)
