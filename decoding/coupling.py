"""The choice rule: which token stands at a position, given logits, sampling parameters and a seed.

Knows nothing of drafts. Draft and full model use this rule with the same noise, so a draft is kept exactly
when it equals the full model's choice, and the same seed gives the same text whatever was speculated
(drafter-invariant coupling: Daliri, Musco, Suresh, arXiv 2408.07978).

Shapes: N tokens, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from decoding.host_choice import choose_on_host
from decoding.kernel_devices import takes_kernels
from decoding.logits import Sampling, process
from decoding.messages import SamplingParams
from decoding.noise import gumbel_noise


def choose(logits_NV: Tensor, sampling: Sampling, positions_N: Tensor) -> Tensor:
    """The token that stands at each position: argmax(processed / temperature + noise), int64 [N].

    `positions_N` are those of the chosen tokens themselves. Rows with temperature 0 take the argmax of
    their logits; ties go to the lowest id. Neither argument is changed.
    """
    if not sampling.any_sampled:
        return logits_NV.argmax(-1)
    if takes_kernels(logits_NV):
        return _choose_by_kernels(logits_NV, sampling, positions_N)
    if sampling.is_filtered and sampling.on_host:
        return choose_on_host(logits_NV, sampling, positions_N)
    return _choose_among_all(logits_NV, sampling, positions_N)


def _choose_by_kernels(logits_NV: Tensor, sampling: Sampling, positions_N: Tensor) -> Tensor:
    from decoding import sampling_triton

    scores_NV = process(logits_NV, sampling) if sampling.is_filtered else None
    return sampling_triton.choose(logits_NV, scores_NV, sampling, positions_N)


def _choose_among_all(logits_NV: Tensor, sampling: Sampling, positions_N: Tensor) -> Tensor:
    scores_NV = process(logits_NV, sampling)
    noise_NV = gumbel_noise(sampling.keys_2N, positions_N, logits_NV.shape[-1], dtype=scores_NV.dtype)
    if not sampling.all_sampled:
        noise_NV *= (sampling.temperatures_N > 0)[:, None]
    return scores_NV.add_(noise_NV).argmax(-1)


def warm_up(embedding_VD: Tensor) -> None:
    """Compile what choosing among this model's logits needs, so that no step waits for it."""
    if takes_kernels(embedding_VD):
        from decoding import sampling_triton

        sampling = Sampling.of([SamplingParams(top_k=1, top_p=0.5)], [0], embedding_VD.device)
        sampling_triton.warm_up(sampling, vocab_size=len(embedding_VD), dtype=embedding_VD.dtype)
