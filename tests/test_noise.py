"""The seeded noise is what its contract says, bit for bit, and looks like noise."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch

from decoding.noise import gumbel_noise, noise_bits, seed_keys
from tests.oracle import noise_word

FIVE_SIGMA = 5.0
LARGEST_SEED = 2**63 - 1

SEEDS = [0, 1, 2**31, 2**32 - 1, 2**32, 2**62, 0x0123456789ABCDEF, LARGEST_SEED]
POSITIONS = [0, 1, 2, 4095, 131_071, 2**31 - 1]

GOLDEN_WORDS = {
    (0, 0, 0): 0x42727A18,
    (0, 0, 1): 0xCA165BF0,
    (1, 0, 0): 0xF2344039,
    (0, 1, 0): 0x6E4C6D76,
    (2**32, 7, 42): 0x12A45988,
    (0x0123456789ABCDEF, 1000, 31_999): 0xF23D1223,
    (LARGEST_SEED, 2**31 - 1, 127_999): 0x0C0156FD,
}
"""(seed, position, token id) to noise bits, version 1: a change alters every seeded answer."""


def words(seeds: list[int], positions: list[int], vocab_size: int) -> np.ndarray:
    """Unsigned noise bits [N, V] for pairs of seed and position."""
    bits_NV = noise_bits(seed_keys(seeds), torch.tensor(positions), vocab_size)
    assert bits_NV.dtype == torch.int32
    return bits_NV.numpy().view(np.uint32)


def exact_gumbel(word: int) -> float:
    """−ln(−ln(1 − u)) at u = (x + ½)·2⁻³², in fifty digits."""
    u = Decimal(2 * word + 1) / Decimal(2**33)
    with localcontext(prec=50):
        return float(-((-((1 - u).ln())).ln()))


def test_golden_words_are_pinned() -> None:
    for (seed, position, token_id), word in GOLDEN_WORDS.items():
        assert noise_word(seed, position, token_id) == word
        assert words([seed], [position], token_id + 1)[0, token_id] == word


def test_bits_equal_the_published_definition() -> None:
    pairs = [(seed, position) for seed in SEEDS for position in POSITIONS]
    got = words([seed for seed, _ in pairs], [position for _, position in pairs], 50)
    expected = [[noise_word(seed, position, token_id) for token_id in range(50)] for seed, position in pairs]
    assert got.tolist() == expected


def test_a_row_of_bits_depends_on_neither_its_batch_nor_the_vocabulary() -> None:
    together = words([5, 6, 7], [10, 11, 12], 300)
    assert np.array_equal(words([6], [11], 300)[0], together[1])
    assert np.array_equal(words([7], [12], 40)[0], together[2, :40])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gumbel_noise_is_exact_within_two_units_in_the_last_place(dtype: torch.dtype) -> None:
    """Beside what one rounding of u does: none in float64, which holds u exactly.

    Units of the noise or of 1, whichever is larger: near 0 it is the inner logarithm's rounding that shows.
    """
    seeds, positions = [3, 0x0123456789ABCDEF], [17, 40_000]
    noise_NV = gumbel_noise(seed_keys(seeds), torch.tensor(positions), 1500, dtype=dtype)
    assert noise_NV.dtype == dtype
    words_NV = words(seeds, positions, 1500)
    expected = np.array([[exact_gumbel(int(word)) for word in row] for row in words_NV])
    eps = torch.finfo(dtype).eps
    unit = eps * np.maximum(1, 2 ** np.floor(np.log2(np.abs(expected))))
    u = (words_NV + 0.5) * 2.0**-32
    steepness = 1 / ((1 - u) * -np.log1p(-u))
    rounded_u = eps * u * steepness if dtype == torch.float32 else 0.0
    assert (np.abs(noise_NV.double().numpy() - expected) <= 2 * unit + rounded_u).all()


def test_noise_of_the_two_dtypes_agrees_where_choices_are_decided() -> None:
    """Above 0 lie the noises that win an argmax; float32 must not have a coarser tail there."""
    noise64, noise32 = (
        gumbel_noise(seed_keys([9, 10]), torch.tensor([0, 5]), 100_000, dtype=dtype).double()
        for dtype in (torch.float64, torch.float32)
    )
    upper = noise64 > 0
    assert (noise64 - noise32)[upper].abs().max() < 1e-6
    assert noise32.isfinite().all()


def test_the_largest_word_gives_finite_noise() -> None:
    """In float32 its u rounds to 1, whose logarithm would be infinite."""
    bits = words([0], [0], 1 << 20)[0]
    extremes = np.sort(bits)[[0, -1]]
    assert extremes[0] < 2**16
    assert extremes[1] > 2**32 - 2**16
    noise = gumbel_noise(seed_keys([0]), torch.tensor([0]), 1 << 20, dtype=torch.float32)
    assert noise.isfinite().all()
    assert noise.max() > 11


def largest_deviation(flips: np.ndarray) -> float:
    """How many sigma the share of flipped output bits strays from a half, at worst over the 32 bits."""
    trials = flips.size
    counts = [int(((flips >> bit) & 1).sum()) for bit in range(32)]
    return max(abs(count - trials / 2) for count in counts) / math.sqrt(trials / 4)


def test_each_input_bit_flips_every_output_bit_half_of_the_time() -> None:
    """1,500 random inputs for each bit of seed and position, 32,768 for each bit of the id; five sigma."""
    rng = np.random.default_rng(11)
    seeds = rng.integers(0, LARGEST_SEED, size=1500).tolist()
    positions = rng.integers(0, 2**17, size=1500).tolist()
    plain = words(seeds, positions, 1)
    for bit in range(63):
        assert largest_deviation(plain ^ words([s ^ (1 << bit) for s in seeds], positions, 1)) < FIVE_SIGMA
    for bit in range(17):
        assert largest_deviation(plain ^ words(seeds, [t ^ (1 << bit) for t in positions], 1)) < FIVE_SIGMA
    row = words([12], [34], 1 << 15)[0]
    ids = np.arange(1 << 15)
    for bit in range(15):
        assert largest_deviation(row ^ row[ids ^ (1 << bit)]) < FIVE_SIGMA


def test_noise_of_neighbours_is_uncorrelated() -> None:
    """Next seed, next position, next id: correlation of 200,000 pairs within five sigma of 0."""
    row = [0, 1000, 2000]
    for neighbour in ([1, 1000, 2000], [0, 1001, 2000], [0, 1000, 2001]):
        first, second = (
            gumbel_noise(seed_keys([s]), torch.tensor([t]), 200_000 + v, dtype=torch.float64)[0, v:]
            for s, t, v in (row, neighbour)
        )
        correlation = torch.corrcoef(torch.stack((first, second)))[0, 1].item()
        assert abs(correlation) * math.sqrt(200_000) < FIVE_SIGMA
