"""The choice rule: its noise is the published one, and tokens come out by the full model's distribution.

Statistical bounds are five sigma of a normal: a chance of 5.7e-7 two-sided, 2.9e-7 one-sided. Seeds are
fixed, so a test that passes goes on passing. Each law has a negative control, which its bound must refuse.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from decoding.coupling import choose
from decoding.logits import Sampling
from decoding.messages import SamplingParams
from decoding.noise import gumbel_noise, seed_keys
from tests.oracle import processed

CPU = torch.device("cpu")
FIVE_SIGMA_CHANCE = 2.9e-7


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
