"""The choice rule: which token stands at a position, given logits, sampling parameters and a seed.

Knows nothing of drafts. The noise is a public, versioned contract (version 1): draft and full model use it
alike, so a draft is kept exactly when it equals the full model's choice, and the same seed gives the same
text whatever was speculated (drafter-invariant coupling: Daliri, Musco, Suresh, arXiv 2408.07978).

Shapes: N tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from decoding.logits import Sampling, process

_FIRST_MULTIPLIER: Final = 0x2C1B3C6D
_SECOND_MULTIPLIER: Final = 0x297A2D39
_OTHER_STREAM: Final = 0x1E3779B9
_LOW_31_BITS: Final = 0x7FFFFFFF


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of 32-bit words, which torch shifts arithmetically."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words in which every input bit flips every output bit half of the time.

    Overwrites and returns `x` (int32; products wrap modulo 2³²).
    """
    x ^= _shift_right(x, 15)
    x *= _FIRST_MULTIPLIER
    x ^= _shift_right(x, 12)
    x *= _SECOND_MULTIPLIER
    x ^= _shift_right(x, 15)
    return x


def noise_bits(seeds_N: Tensor, positions_N: Tensor, vocab_size: int) -> Tensor:
    """32 random bits for each (seed, position, token id): int32 [N, V], a pure function of the three.

    `seeds_N` are 63-bit and `positions_N` absolute positions in the sequence, both int64.
    """
    low_N = (seeds_N & 0xFFFFFFFF).to(torch.int32)
    high_N = ((seeds_N >> 32) & _LOW_31_BITS).to(torch.int32)
    steps_N = positions_N.to(torch.int32)
    first_N = _mix(_mix(_mix(low_N.clone()) ^ high_N) + steps_N)
    second_N = _mix(_mix(_mix(high_N ^ _OTHER_STREAM) ^ low_N) + steps_N)
    ids_V = torch.arange(vocab_size, dtype=torch.int32, device=seeds_N.device)
    bits_NV = _mix(ids_V ^ first_N[:, None])
    bits_NV += second_N[:, None]
    return _mix(bits_NV)


def gumbel_noise(seeds_N: Tensor, positions_N: Tensor, vocab_size: int, *, dtype: torch.dtype) -> Tensor:
    """Standard Gumbel noise [N, V] in `dtype` (float32 or float64), from the 32 bits x of `noise_bits`.

    u = (x + ½)·2⁻³² and g = −log(−log1p(−u)), which resolves the upper tail, where maxima are decided, to
    2⁻³³. In float32 u may round to 1, hence the clamp.
    """
    u_NV = noise_bits(seeds_N, positions_N, vocab_size).to(dtype)
    # The words are signed: read as unsigned, the negative ones lie in the upper half.
    u_NV.mul_(2.0**-32).add_(2.0**-33)
    u_NV.add_((u_NV < 0).to(dtype))
    u_NV.clamp_(max=1 - torch.finfo(dtype).eps / 2)
    return u_NV.neg_().log1p_().neg_().log_().neg_()


def choose(logits_NV: Tensor, sampling: Sampling, positions_N: Tensor) -> Tensor:
    """The token that stands at each position: argmax(processed / temperature + noise), int64 [N].

    `positions_N` are those of the chosen tokens themselves. Rows with temperature 0 take the argmax of
    their logits; ties go to the lowest id. Neither argument is changed.
    """
    if not sampling.any_sampled:
        return logits_NV.argmax(-1)
    scores_NV = process(logits_NV, sampling)
    noise_NV = gumbel_noise(sampling.seeds_N, positions_N, logits_NV.shape[-1], dtype=scores_NV.dtype)
    if not sampling.all_sampled:
        noise_NV *= (sampling.temperatures_N > 0)[:, None]
    return scores_NV.add_(noise_NV).argmax(-1)
