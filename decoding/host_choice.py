"""The choice rule on a CPU, in NumPy, whose operators on arrays as small as these cost a fraction of torch's.

Knows logits and filters; gives the tokens that `process` and noise for all of them would give. It ranks nothing:
the token that noise favours is asked whether filters leave it, and mostly they do.

Shapes: N tokens, V vocabulary, M pairs of row and id that are in the running, row by row.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decoding.logits import Sampling
from decoding.noise import gumbel_noise_of

Floats = NDArray[np.floating]
Bools = NDArray[np.bool_]

_LOWEST_SCORE: Final = -27.0
"""Noise lies between −3.2 and 22.9: a score so far below the best one's 0 never wins."""

_NOT_QUITE: Final = 0.99
"""Sums are rounded: a token is left out unasked only where it is out by more than that."""


# A temperature hardly above 0 takes scores to −∞.
@np.errstate(over="ignore")
def choose_on_host(logits_NV: Tensor, sampling: Sampling, positions_N: Tensor) -> Tensor:
    """The token that stands at each position, int64 [N], as `coupling.choose` says. All lie on the CPU."""
    logits = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)).numpy()
    num_rows, vocab_size = logits.shape
    is_greedy_N = sampling.temperatures_N.numpy() <= 0
    scores_NV = _scores(logits, sampling, is_greedy_N)
    least_N, most_mass_N = _bounds(scores_NV, sampling)
    least_N[is_greedy_N] = 0
    # Comparisons are such that a row of logits that are no numbers gets a token, too.
    rows_M, ids_M = np.divmod(np.flatnonzero(~(scores_NV < least_N[:, None])), vocab_size)
    firsts_N = np.searchsorted(rows_M, np.arange(num_rows))
    scores_M = scores_NV[rows_M, ids_M]
    noised_M = gumbel_noise_of(
        ids_M, rows_M, sampling.keys_2N.numpy(), positions_N.numpy(), dtype=scores_NV.dtype
    )
    if not sampling.all_sampled:
        noised_M *= ~is_greedy_N[rows_M]
    noised_M += scores_M
    weights_M = None if most_mass_N is None else np.exp(scores_M)
    while True:
        highest_N = np.maximum.reduceat(noised_M, firsts_N)
        is_highest_M = ~(noised_M < highest_N[rows_M])
        chosen_N = np.minimum.reduceat(np.where(is_highest_M, ids_M, vocab_size), firsts_N)
        if weights_M is None or most_mass_N is None:
            break
        reached_N = scores_NV[np.arange(num_rows), chosen_N]
        mass_above_N = np.add.reduceat(weights_M * (scores_M > reached_N[rows_M]), firsts_N)
        # The best token always stays, also where a tiny top_p has become 0 in this dtype.
        is_left_N = (mass_above_N < most_mass_N) | ~(reached_N < 0)
        if is_left_N.all():
            break
        noised_M[(scores_M <= reached_N[rows_M]) & ~is_left_N[rows_M]] = -np.inf
    return torch.from_numpy(chosen_N)


def _scores(logits_NV: Floats, sampling: Sampling, is_greedy_N: Bools) -> Floats:
    """Logits below the row's best over temperature; −∞ where min-p drops them."""
    divisors_N = np.where(is_greedy_N, 1, sampling.temperatures_N.numpy()).astype(logits_NV.dtype)
    np.maximum(divisors_N, np.finfo(logits_NV.dtype).tiny, out=divisors_N)
    scores_NV: Floats = logits_NV - logits_NV.max(-1, keepdims=True)
    scores_NV /= divisors_N[:, None]
    if sampling.any_min_p:
        floor_N = sampling.min_ps_N.log().numpy().astype(logits_NV.dtype)
        scores_NV[scores_NV < floor_N[:, None]] = -np.inf
    return scores_NV


def _bounds(scores_NV: Floats, sampling: Sampling) -> tuple[Floats, Floats | None]:
    """A score below which filters leave nothing that could win, and the mass above a token that drops it, if any:
    both [N].
    """
    num_rows, vocab_size = scores_NV.shape
    least_N = np.full(num_rows, _LOWEST_SCORE, scores_NV.dtype)
    if not sampling.any_truncated:
        return least_N, None
    total_N = np.exp(scores_NV).sum(-1)
    if sampling.any_top_k:
        total_N = _best_k(scores_NV, sampling, least_N, total_N)
    top_ps_N = sampling.top_ps_N.numpy()
    is_cut_N = top_ps_N < 1
    # All that weigh less than this weigh less together than what top-p leaves out.
    each_N = np.where(is_cut_N, (1 - top_ps_N) * (_NOT_QUITE / vocab_size), 1.0) * total_N
    np.maximum(least_N, np.log(each_N), out=least_N, where=is_cut_N)
    return least_N, np.where(is_cut_N, top_ps_N.astype(total_N.dtype) * total_N, np.inf)


def _best_k(scores_NV: Floats, sampling: Sampling, least_N: Floats, total_N: Floats) -> Floats:
    """Raise the least score of rows with top-k to that of their k-th best, and give the mass of those k."""
    width = scores_NV.shape[1]
    top_ks_N = np.minimum(sampling.top_ks_N.numpy(), width)
    ranked_NW = torch.from_numpy(scores_NV).topk(max(int(top_ks_N.max()), 1)).values.numpy()
    has_top_k_N = top_ks_N > 0
    last_N = ranked_NW[np.arange(len(top_ks_N)), top_ks_N - 1]
    np.maximum(least_N, last_N, out=least_N, where=has_top_k_N)
    is_in_NW = np.arange(ranked_NW.shape[1]) < top_ks_N[:, None]
    return np.where(has_top_k_N, (np.exp(ranked_NW) * is_in_NW).sum(-1), total_N)
