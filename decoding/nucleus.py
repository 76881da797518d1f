"""The choice rule on a CPU where filters leave few tokens: noise for those alone.

Knows logits and filters; gives the tokens that `process` and noise for all of them would give. In NumPy, whose
operators on arrays as small as these cost a fraction of torch's.

Shapes: N tokens, V vocabulary, W best of them.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decoding.logits import Sampling
from decoding.noise import gumbel_noise_of
from decoding.ragged import Ints

Floats = NDArray[np.floating]
Bools = NDArray[np.bool_]

_NUM_BEST: Final = 64
"""What filters usually leave of a trained model's vocabulary is among so many; looking at more costs more."""


def choose_among_best(logits_NV: Tensor, sampling: Sampling, positions_N: Tensor) -> tuple[Ints, Bools]:
    """The token that stands at each position, and whether all that filters leave was among the best: where not,
    the first means nothing. Needs `all_narrow`.
    """
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    best_NW, ids_NW = (each.numpy() for each in logits_NV.topk(min(_NUM_BEST, logits_NV.shape[-1])))
    temperatures_N1 = sampling.temperatures_N.numpy()[:, None]
    is_greedy_N1 = temperatures_N1 <= 0
    divisors_N1 = np.where(is_greedy_N1, 1, temperatures_N1).astype(best_NW.dtype)
    np.maximum(divisors_N1, np.finfo(best_NW.dtype).tiny, out=divisors_N1)
    scores_NW = (best_NW - best_NW[:, :1]) / divisors_N1
    total_N1 = np.exp((logits_NV.numpy() - best_NW[:, :1]) / divisors_N1).sum(-1, keepdims=True)
    cut_N1, is_found_N1 = _cut(scores_NW, total_N1, sampling)
    noise_NW = gumbel_noise_of(ids_NW, sampling.keys_2N.numpy(), positions_N.numpy(), dtype=scores_NW.dtype)
    if not sampling.all_sampled:
        noise_NW *= ~is_greedy_N1
        cut_N1[is_greedy_N1] = 0
        is_found_N1 |= is_greedy_N1
    # Equal scores are kept or dropped together: the last that was looked at must be below what is kept.
    is_found_N1 &= (scores_NW[:, -1:] < cut_N1) | (scores_NW.shape[-1] == logits_NV.shape[-1])
    noise_NW += np.where(scores_NW < cut_N1, -np.inf, scores_NW)
    is_chosen_NW = noise_NW == noise_NW.max(-1, keepdims=True)
    return np.where(is_chosen_NW, ids_NW, logits_NV.shape[-1]).min(-1), is_found_N1[:, 0]


def _cut(scores_NW: Floats, total_N1: Floats, sampling: Sampling) -> tuple[Floats, Bools]:
    """The lowest score that top-k and top-p keep of each row, [N, 1], and whether it is among the best.

    `total_N1` is the sum of what all scores are the logarithms of.
    """
    width = scores_NW.shape[-1]
    weights_NW = np.exp(scores_NW)
    if sampling.any_top_k:
        top_ks_N1 = sampling.top_ks_N.numpy()[:, None]
        has_top_k_N1 = top_ks_N1 > 0
        weights_NW *= ~has_top_k_N1 | (np.arange(width) < top_ks_N1)
        total_N1 = np.where(has_top_k_N1, weights_NW.sum(-1, keepdims=True), total_N1)
    mass_before_NW = weights_NW.cumsum(-1) - weights_NW
    top_ps_N1 = sampling.top_ps_N.numpy()[:, None]
    top_mass_N1 = np.where(top_ps_N1 < 1, top_ps_N1.astype(scores_NW.dtype) * total_N1, np.inf)
    # The best token always stays, also where a tiny top_p has become 0 in this dtype.
    num_kept_N1 = np.maximum((mass_before_NW < top_mass_N1).sum(-1, keepdims=True), 1)
    is_found_N1 = num_kept_N1 < width
    if sampling.any_top_k:
        num_kept_N1 = np.where(has_top_k_N1, np.minimum(num_kept_N1, top_ks_N1), num_kept_N1)
        is_found_N1 = np.where(has_top_k_N1, top_ks_N1 <= width, is_found_N1)
    return np.take_along_axis(scores_NW, num_kept_N1 - 1, axis=-1), is_found_N1
