"""The choice rule: its noise is the published one, and tokens come out by the full model's distribution.

Statistical bounds are five sigma of a normal: a chance of 5.7e-7 two-sided, 2.9e-7 one-sided. Seeds are
fixed, so a test that passes goes on passing. Each law has a negative control, which its bound must refuse.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from torch import Tensor

from decoding.coupling import choose
from decoding.logits import Sampling
from decoding.messages import SamplingParams
from decoding.noise import gumbel_noise, noise_bits, seed_keys
from tests.oracle import noise_word, processed

CPU = torch.device("cpu")
FIVE_SIGMA = 5.0
FIVE_SIGMA_CHANCE = 2.9e-7
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


def chance_of(counts_V: np.ndarray, expected_V: np.ndarray) -> float:
    """Probability of a chi-square at least this large; 0 if a token came that never may."""
    possible = expected_V > 0
    if counts_V[~possible].any():
        return 0.0
    chi_square = (((counts_V - expected_V) ** 2)[possible] / expected_V[possible]).sum()
    half_freedom = torch.tensor((possible.sum() - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half_freedom, torch.tensor(chi_square / 2, dtype=torch.float64)))


LOGITS = torch.tensor([2.0, 1.7, 1.1, 1.1, 0.4, 0.0, -0.3, -0.8, -1.5, -2.0, 1.4, 0.9], dtype=torch.float64)
NUM_DRAWS = 200_000


def law(params: SamplingParams, logits_V: Tensor = LOGITS) -> np.ndarray:
    """The distribution that `params` ask for: softmax over what the filters leave."""
    scores = processed(logits_V.numpy(), params)
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def draws(params: SamplingParams, seeds: list[int], positions_N: Tensor, dtype: torch.dtype) -> Tensor:
    """`choose` with one parameter set and the fixed logits at every position."""
    num_rows = len(seeds)
    sampling = Sampling.of([params] * num_rows, seeds, CPU)
    return choose(LOGITS.to(dtype).expand(num_rows, -1), sampling, positions_N)


def counts_along_a_sequence(params: SamplingParams, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """One seed, positions 0 … 199,999: what one endless request sees."""
    sampling = Sampling.of([params], [31], CPU).take(torch.zeros(NUM_DRAWS, dtype=torch.int64))
    chosen_N = choose(LOGITS.to(dtype).expand(NUM_DRAWS, -1), sampling, torch.arange(NUM_DRAWS))
    return np.bincount(chosen_N.numpy(), minlength=len(LOGITS))


def counts_across_requests(params: SamplingParams, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """Position 7 of 200,000 requests with consecutive seeds."""
    chosen_N = draws(params, list(range(NUM_DRAWS)), torch.full((NUM_DRAWS,), 7), dtype)
    return np.bincount(chosen_N.numpy(), minlength=len(LOGITS))


ALL_FILTERS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.6),
    SamplingParams(temperature=1.7),
    SamplingParams(top_k=4),
    SamplingParams(top_p=0.8),
    SamplingParams(min_p=0.25),
    SamplingParams(temperature=1.4, top_k=8, top_p=0.9, min_p=0.1),
]


@pytest.mark.parametrize("params", ALL_FILTERS, ids=str)
def test_tokens_of_a_sequence_follow_the_processed_distribution(params: SamplingParams) -> None:
    """200,000 rows, seed 31; chi-square below its five-sigma bound, and above it against a nearby law."""
    counts = counts_along_a_sequence(params)
    assert chance_of(counts, NUM_DRAWS * law(params)) > FIVE_SIGMA_CHANCE
    # The best logit moved by 0.1 moves its probability by a few hundredths at most, and is noticed.
    shifted = LOGITS.clone()
    shifted[0] += 0.1
    assert chance_of(counts, NUM_DRAWS * law(params, shifted)) < FIVE_SIGMA_CHANCE


@pytest.mark.parametrize("params", [ALL_FILTERS[0], ALL_FILTERS[-1]], ids=str)
def test_tokens_at_one_position_follow_the_processed_distribution_across_seeds(
    params: SamplingParams,
) -> None:
    """200,000 rows, seeds 0 … 199,999."""
    counts = counts_across_requests(params)
    assert chance_of(counts, NUM_DRAWS * law(params)) > FIVE_SIGMA_CHANCE
    assert chance_of(counts, NUM_DRAWS * law(SamplingParams(temperature=1.05))) < FIVE_SIGMA_CHANCE


def test_noise_of_another_temperature_breaks_the_law() -> None:
    """The control of the whole set-up: noise that is scaled by 5 % is not the choice rule."""
    positions_N = torch.arange(NUM_DRAWS)
    noise_NV = gumbel_noise(
        seed_keys([31]).expand(2, NUM_DRAWS), positions_N, len(LOGITS), dtype=torch.float64
    )
    for scale, follows in ((1.0, True), (1.05, False)):
        counts = np.bincount((LOGITS + scale * noise_NV).argmax(-1).numpy(), minlength=len(LOGITS))
        assert (chance_of(counts, NUM_DRAWS * law(SamplingParams())) > FIVE_SIGMA_CHANCE) is follows


def test_choices_at_neighbouring_positions_and_seeds_are_independent() -> None:
    """Pairs of tokens over 100,000 rows against the product of their laws; the same noise twice must fail."""
    params = SamplingParams(temperature=1.3)
    num_rows = NUM_DRAWS // 2
    positions_N = torch.arange(num_rows) % 500
    seeds = [2 * (row // 500) for row in range(num_rows)]
    here_N = draws(params, seeds, positions_N, torch.float32)
    others = {
        "next position": (draws(params, seeds, positions_N + 1, torch.float32), True),
        "next seed": (draws(params, [seed + 1 for seed in seeds], positions_N, torch.float32), True),
        "the same": (here_N, False),
    }
    expected = num_rows * np.outer(law(params), law(params)).reshape(-1)
    for name, (there_N, is_independent) in others.items():
        pairs = np.bincount((here_N * len(LOGITS) + there_N).numpy(), minlength=len(expected))
        assert (chance_of(pairs, expected) > FIVE_SIGMA_CHANCE) is is_independent, name


def mixed_rows(num_rows: int, dtype: torch.dtype) -> tuple[Tensor, list[SamplingParams], list[int], Tensor]:
    generator = torch.Generator().manual_seed(8)
    logits_NV = torch.randn(num_rows, 400, generator=generator, dtype=torch.float64).to(dtype)
    params = [
        SamplingParams(temperature=(0.0, 0.7, 1.2)[row % 3], top_k=(0, 0, 40, 7)[row % 4])
        for row in range(num_rows)
    ]
    return logits_NV, params, [1000 + row for row in range(num_rows)], torch.arange(num_rows) * 3 + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_chooses_the_same_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    logits_NV, params, seeds, positions_N = mixed_rows(48, dtype)
    together_N = choose(logits_NV, Sampling.of(params, seeds, CPU), positions_N)
    alone = [
        choose(logits_NV[[row]], Sampling.of([params[row]], [seeds[row]], CPU), positions_N[[row]]).item()
        for row in range(48)
    ]
    assert together_N.tolist() == alone


def test_greedy_rows_of_a_mixed_batch_take_their_argmax_whatever_their_filters() -> None:
    logits_NV, params, seeds, positions_N = mixed_rows(48, torch.float32)
    filtered = [
        SamplingParams(temperature=p.temperature, top_k=3, top_p=0.4, min_p=0.2) if p.temperature == 0 else p
        for p in params
    ]
    chosen_N = choose(logits_NV, Sampling.of(filtered, seeds, CPU), positions_N)
    is_greedy_N = torch.tensor([p.temperature == 0 for p in params])
    assert torch.equal(chosen_N[is_greedy_N], logits_NV[is_greedy_N].argmax(-1))
    assert not torch.equal(chosen_N[~is_greedy_N], logits_NV[~is_greedy_N].argmax(-1))


@pytest.mark.parametrize("neighbour", [SamplingParams(temperature=0.0), SamplingParams(temperature=1.0)])
def test_a_greedy_tie_goes_to_the_lowest_id(neighbour: SamplingParams) -> None:
    tied_NV = torch.tensor([[0.0, 3.0, 3.0, 1.0, 3.0]] * 2)
    for params in (
        [SamplingParams(temperature=0.0), neighbour],
        [neighbour, SamplingParams(temperature=0.0)],
    ):
        greedy_row = [p.temperature for p in params].index(0.0)
        assert choose(tied_NV, Sampling.of(params, [1, 2], CPU), torch.tensor([4, 5]))[greedy_row] == 1


def test_a_choice_changes_with_its_seed_and_its_position_only_through_the_noise() -> None:
    """The same seed and position give the same token; others often another."""
    params = SamplingParams(temperature=1.5)
    base = draws(params, [5] * 300, torch.arange(300), torch.float32)
    assert torch.equal(base, draws(params, [5] * 300, torch.arange(300), torch.float32))
    for other in (
        draws(params, [6] * 300, torch.arange(300), torch.float32),
        draws(params, [5] * 300, torch.arange(300) + 1, torch.float32),
    ):
        assert 100 < (base != other).sum() < 300


def test_choosing_leaves_its_arguments_alone() -> None:
    logits_NV, params, seeds, positions_N = mixed_rows(12, torch.float32)
    before = logits_NV.clone(), positions_N.clone()
    choose(logits_NV, Sampling.of(params, seeds, CPU), positions_N)
    assert torch.equal(logits_NV, before[0])
    assert torch.equal(positions_N, before[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_law_holds_whatever_dtype_the_logits_come_in(dtype: torch.dtype) -> None:
    """On the logits as that dtype holds them: noise in bfloat16 would tie constantly."""
    counts = counts_along_a_sequence(SamplingParams(), dtype)
    rounded = LOGITS.to(dtype).double()
    assert chance_of(counts, NUM_DRAWS * law(SamplingParams(), rounded)) > FIVE_SIGMA_CHANCE
