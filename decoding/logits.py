"""Logits processors: from the model's logits to the scores that the choice rule adds its noise to.

Knows nothing of seeds or drafts. Every filter keeps a set of tokens that depends on the logits alone.

Shapes: N tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decoding.kernel_devices import takes_kernels
from decoding.messages import SamplingParams
from decoding.noise import seed_keys

_FIRST_RANKED: Final = 256


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters of N tokens as columns, and what the whole batch can skip.

    `keys_2N` holds the seeds as the noise uses them; `top_ks_N` is int64 with 0 for off; the rest float64. Where
    they are `on_host`, NumPy may read them.
    """

    temperatures_N: Tensor
    top_ks_N: Tensor
    top_ps_N: Tensor
    min_ps_N: Tensor
    keys_2N: Tensor
    any_sampled: bool
    all_sampled: bool
    any_truncated: bool
    any_top_k: bool
    any_min_p: bool
    on_host: bool

    @classmethod
    def of(cls, params: list[SamplingParams], seeds: list[int], device: torch.device) -> Sampling:
        """Columns from one set of parameters and one seed for each row."""
        # A loop over rows on the host: it runs when the batch's composition changes, not every step. Where few
        # rows come and go that is often, and every call of an operator shows.
        table_N4 = np.array([(p.temperature, p.top_k, p.top_p, p.min_p) for p in params], dtype=np.float64)
        temperatures_N, top_ks_N, top_ps_N, min_ps_N = table_N4.T.copy()

        def placed(column_N: NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(column_N).to(device)

        sampled = [p for p in params if p.temperature > 0]
        return cls(
            temperatures_N=placed(temperatures_N),
            top_ks_N=placed(top_ks_N.astype(np.int64)),
            top_ps_N=placed(top_ps_N),
            min_ps_N=placed(min_ps_N),
            keys_2N=seed_keys(seeds).to(device),
            any_sampled=bool(sampled),
            all_sampled=len(sampled) == len(params),
            any_truncated=any(p.top_k > 0 or p.top_p < 1 for p in sampled),
            any_top_k=any(p.top_k > 0 for p in sampled),
            any_min_p=any(p.min_p > 0 for p in sampled),
            on_host=device.type == "cpu",
        )

    @property
    def is_filtered(self) -> bool:
        """Whether any filter drops tokens of any row."""
        return self.any_truncated or self.any_min_p

    def take(self, index_M: Tensor) -> Sampling:
        """The columns at `index_M` (int64, repeats allowed), in that order."""
        return self._at(index_M) if self.any_sampled else self

    def first(self, num_rows: int) -> Sampling:
        """The first columns, as views."""
        return self._at(slice(num_rows)) if self.any_sampled else self

    def _at(self, index: Tensor | slice) -> Sampling:
        return replace(
            self,
            temperatures_N=self.temperatures_N[index],
            top_ks_N=self.top_ks_N[index],
            top_ps_N=self.top_ps_N[index],
            min_ps_N=self.min_ps_N[index],
            keys_2N=self.keys_2N[:, index],
        )


def process(logits_NV: Tensor, sampling: Sampling) -> Tensor:
    """Scores [N, V] in float32 or float64: logits below the row's best, over temperature; dropped tokens at −∞.

    Filters act in this order: temperature, min-p, top-k, top-p, each on what the one before left. In rows with
    temperature 0 the best token stays the best. A new tensor; equal logits are kept or dropped together.
    """
    scores_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32), copy=True)
    # The best token at 0: however small the temperature, the others fall to −∞ at worst, and nothing overflows.
    scores_NV -= scores_NV.amax(-1, keepdim=True)
    temperatures_N = torch.where(sampling.temperatures_N > 0, sampling.temperatures_N, 1.0).to(scores_NV)
    scores_NV /= temperatures_N.clamp_(min=torch.finfo(scores_NV.dtype).tiny)[:, None]
    if sampling.any_min_p:
        _drop_improbable(scores_NV, sampling)
    if sampling.any_truncated:
        _truncate(scores_NV, sampling)
    return scores_NV


def _drop_improbable(scores_NV: Tensor, sampling: Sampling) -> None:
    """Drop tokens less probable than `min_p` times the most probable one."""
    floor_N1 = scores_NV.amax(-1, keepdim=True) + sampling.min_ps_N.log().to(scores_NV)[:, None]
    scores_NV.masked_fill_(scores_NV < floor_N1, -torch.inf)


def _truncate(scores_NV: Tensor, sampling: Sampling) -> None:
    """Keep the `top_k` best, then the fewest whose probabilities reach `top_p`."""
    if takes_kernels(scores_NV):
        from decoding import sampling_triton

        sampling_triton.truncate(scores_NV, sampling)
        return
    vocab_size = scores_NV.shape[-1]
    # Ranking a whole vocabulary costs more than a layer; on a CPU the cut is first sought among the best.
    width = min(_FIRST_RANKED, vocab_size) if scores_NV.device.type == "cpu" else vocab_size
    cut_N, is_found_N = _cut(scores_NV, sampling, width)
    if width < vocab_size and not bool(is_found_N.all()):
        left_M = (~is_found_N).nonzero()[:, 0]
        cut_N[left_M] = _cut(scores_NV[left_M], sampling.take(left_M), vocab_size)[0]
    scores_NV.masked_fill_(scores_NV < cut_N[:, None], -torch.inf)


def _cut(scores_NV: Tensor, sampling: Sampling, width: int) -> tuple[Tensor, Tensor]:
    """The lowest score [N] that each row keeps, and whether [N] it is among the `width` best: if not, the first
    means nothing.
    """
    is_whole = width == scores_NV.shape[-1]
    ranked_NW = _ranked(scores_NV) if is_whole else scores_NV.topk(width).values
    total_N = scores_NV.logsumexp(-1)
    top_ps_N = torch.where(sampling.top_ps_N < 1, sampling.top_ps_N, torch.inf).to(scores_NV)
    is_free_N = sampling.top_ps_N >= 1
    inside_NW = ranked_NW
    if sampling.any_top_k:
        has_top_k_N = sampling.top_ks_N > 0
        most_N = torch.where(has_top_k_N, sampling.top_ks_N, scores_NV.shape[-1])
        ranks_W = torch.arange(width, device=scores_NV.device)
        inside_NW = ranked_NW.masked_fill(ranks_W >= most_N[:, None], -torch.inf)
        total_N = torch.where(has_top_k_N, inside_NW.logsumexp(-1), total_N)
    probabilities_NW = (inside_NW - total_N[:, None]).exp_()
    mass_before_NW = probabilities_NW.cumsum(-1).sub_(probabilities_NW)
    # The best token always stays, also where a tiny top_p has become 0 in this dtype.
    num_kept_N = (mass_before_NW < top_ps_N[:, None]).sum(-1).clamp_(min=1)
    is_found_N = num_kept_N < width
    if sampling.any_top_k:
        num_kept_N = torch.minimum(num_kept_N, most_N)
        is_found_N = torch.where(has_top_k_N, sampling.top_ks_N <= width, is_found_N)
        is_free_N = is_free_N & ~has_top_k_N
    cut_N = ranked_NW.gather(-1, (num_kept_N - 1)[:, None])[:, 0].masked_fill(is_free_N, -torch.inf)
    return cut_N, is_found_N | is_free_N


def _ranked(scores_NV: Tensor) -> Tensor:
    """Scores of each row from best to worst."""
    if scores_NV.device.type == "cpu":
        # numpy sorts rows of this length several times faster than torch does.
        return torch.from_numpy(np.sort(scores_NV.numpy(), axis=-1)[:, ::-1].copy())
    return scores_NV.sort(-1, descending=True).values
