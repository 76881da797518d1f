"""The seeded noise of the choice rule: a public contract, version 1, the same on every device.

Knows seeds, positions and token ids; knows no logits.

Shapes: N tokens, V vocabulary.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decoding.ragged import Ints

_WORD: Final = 0xFFFFFFFF
_FIRST_MULTIPLIER: Final = 0x2C1B3C6D
_SECOND_MULTIPLIER: Final = 0x297A2D39
_OTHER_STREAM: Final = 0x1E3779B9


def seed_keys(seeds: list[int]) -> Tensor:
    """What the noise needs of each 63-bit seed: int32 [2, N], on the CPU."""
    words_2N = np.array([_words(seed) for seed in seeds], dtype=np.uint32).T
    return torch.from_numpy(np.ascontiguousarray(words_2N).view(np.int32))


@lru_cache(maxsize=4096)
def _words(seed: int) -> tuple[int, int]:
    low, high = seed & _WORD, seed >> 32
    return _seed_key(low, high), _seed_key(high ^ _OTHER_STREAM, low)


def noise_bits(keys_2N: Tensor, positions_N: Tensor, vocab_size: int) -> Tensor:
    """32 random bits for each (seed, position, token id): int32 [N, V], a pure function of the three.

    `positions_N` are absolute positions in the sequence. With s₀ and s₁ the low and high words of the seed,
    t the position and v the id, all modulo 2³²:
    bits = mix((mix(v) ^ mix(mix(mix(s₀) ^ s₁) + t)) + mix(mix(mix(s₁ ^ c) ^ s₀) + t)).
    """
    first_N, second_N = _mix(keys_2N + positions_N.to(torch.int32)).unbind(0)
    bits_NV = _mixed_ids(vocab_size, keys_2N.device) ^ first_N[:, None]
    bits_NV += second_N[:, None]
    return _mix(bits_NV)


def gumbel_noise(keys_2N: Tensor, positions_N: Tensor, vocab_size: int, *, dtype: torch.dtype) -> Tensor:
    """Standard Gumbel noise [N, V] in `dtype` (float32 or float64), from the 32 bits x of `noise_bits`.

    u = (x + ½)·2⁻³² and g = −log(−log1p(−u)), which resolves the upper tail, where maxima are decided, to
    2⁻³³. In float32 u may round to 1, hence the clamp.
    """
    u_NV = noise_bits(keys_2N, positions_N, vocab_size).to(dtype)
    # The words are signed: read as unsigned, the negative ones lie in the upper half.
    u_NV.mul_(2.0**-32).add_(2.0**-33)
    u_NV.add_(u_NV < 0)
    u_NV.clamp_(max=1 - torch.finfo(dtype).eps / 2)
    return u_NV.neg_().log1p_().neg_().log_().neg_()


def gumbel_noise_of(
    ids_M: Ints, rows_M: Ints, keys_2N: NDArray[np.int32], positions_N: Ints, *, dtype: np.dtype[np.floating]
) -> NDArray[np.floating]:
    """The same noise of these token ids of these rows alone, [M], in NumPy: for few ids on a CPU."""
    first_N, second_N = _mix_words(keys_2N.view(np.uint32) + positions_N.astype(np.uint32))
    bits_M = _mix_words(ids_M.astype(np.uint32))
    bits_M ^= first_N[rows_M]
    bits_M += second_N[rows_M]
    u_M = _mix_words(bits_M).view(np.int32).astype(dtype)
    u_M *= 2.0**-32
    u_M += 2.0**-33
    u_M += u_M < 0
    np.minimum(u_M, 1 - np.finfo(dtype).eps / 2, out=u_M)
    np.negative(u_M, out=u_M)
    np.log1p(u_M, out=u_M)
    np.negative(u_M, out=u_M)
    np.log(u_M, out=u_M)
    return np.negative(u_M, out=u_M)


def _mix_words(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """`_mix` of unsigned words, which NumPy shifts logically."""
    x ^= x >> np.uint32(15)
    x *= np.uint32(_FIRST_MULTIPLIER)
    x ^= x >> np.uint32(12)
    x *= np.uint32(_SECOND_MULTIPLIER)
    x ^= x >> np.uint32(15)
    return x


def _seed_key(word: int, other: int) -> int:
    return _mix_word(_mix_word(word) ^ other)


def _mix_word(x: int) -> int:
    """`_mix` of one unsigned word."""
    x ^= x >> 15
    x = (x * _FIRST_MULTIPLIER) & _WORD
    x ^= x >> 12
    x = (x * _SECOND_MULTIPLIER) & _WORD
    return x ^ (x >> 15)


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


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of 32-bit words, which torch shifts arithmetically."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


@lru_cache(maxsize=8)
def _mixed_ids(vocab_size: int, device: torch.device) -> Tensor:
    """The part of the noise that depends on the token id alone: int32 [V]."""
    return _mix(torch.arange(vocab_size, dtype=torch.int32, device=device))
