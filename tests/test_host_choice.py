"""Choosing in NumPy, among the tokens that may win, gives what choosing among all of them in torch gives."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from decoding.host_choice import _LOWEST_SCORE, choose_on_host
from decoding.logits import Sampling, process
from decoding.messages import SamplingParams
from decoding.noise import gumbel_noise, gumbel_noise_of, seed_keys

CPU = torch.device("cpu")


def chosen_among_all(logits_NV: Tensor, sampling: Sampling, positions_N: Tensor) -> Tensor:
    scores_NV = process(logits_NV, sampling)
    noise_NV = gumbel_noise(sampling.keys_2N, positions_N, logits_NV.shape[-1], dtype=scores_NV.dtype)
    return (scores_NV + noise_NV * (sampling.temperatures_N > 0)[:, None]).argmax(-1)


def drawn_params(rng: random.Random) -> SamplingParams:
    """Greedy, or with any filters or none."""
    return SamplingParams(
        temperature=rng.choice([0.0, 1e-320, 0.3, 0.8, 1.5]),
        top_k=rng.choice([0, 0, 0, 1, 5, 64, 5000]),
        top_p=rng.choice([1.0, 1e-300, 0.1, 0.5, 0.95, 0.999]),
        min_p=rng.choice([0.0, 0.0, 0.001, 0.2, 1.0]),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_ties", [False, True])
def test_the_choice_is_that_among_all_tokens(dtype: torch.dtype, has_ties: bool) -> None:
    """600 random batches, tokens forbidden and ties among them. Sums of what top-p keeps are added up in another
    order: near equality is left out by drawing no masses that could meet it.
    """
    rng = random.Random(4)
    generator = torch.Generator().manual_seed(4)
    for _ in range(600):
        size = rng.choice([1, 3, 8]), rng.choice([1, 20, 64, 65, 1000])
        scale = rng.choice([0.1, 1, 4, 8, 100])
        logits_NV = torch.randn(size, dtype=torch.float64, generator=generator) * scale
        logits_NV = ((logits_NV * 2).round() / 2 if has_ties else logits_NV).to(dtype)
        is_forbidden_NV = torch.rand(size, generator=generator) < rng.choice([0, 0.3])
        is_forbidden_NV[:, rng.randrange(size[1])] = False
        logits_NV = logits_NV.masked_fill(is_forbidden_NV, -torch.inf)
        params = [drawn_params(rng) for _ in range(size[0])]
        # As of more rows, some of which are not here: what any of them needs is known, not who.
        others = [drawn_params(rng) for _ in range(3)]
        sampling = Sampling.of([*params, *others], [rng.randrange(1 << 62) for _ in range(size[0] + 3)], CPU)
        sampling = sampling.first(size[0])
        positions_N = torch.tensor([rng.randrange(1000) for _ in params])
        before_NV = logits_NV.clone()
        chosen_N = choose_on_host(logits_NV, sampling, positions_N)
        assert torch.equal(chosen_N, chosen_among_all(logits_NV, sampling, positions_N)), params
        assert torch.equal(logits_NV, before_NV)


def test_what_noise_favours_is_passed_over_where_top_p_drops_it() -> None:
    """Rows pass over different numbers of tokens before one that stays."""
    num_rows = 64
    logits_NV = torch.zeros(num_rows, 50, dtype=torch.float64)
    logits_NV[:, :2] = 0.5
    logits_NV[::2, 2:6] = 0.25
    sampling = Sampling.of(
        [SamplingParams(temperature=1.0, top_p=0.06)] * num_rows, list(range(num_rows)), CPU
    )
    positions_N = torch.arange(num_rows)
    favoured_N = logits_NV + gumbel_noise(sampling.keys_2N, positions_N, 50, dtype=torch.float64)
    assert (favoured_N.argmax(-1) > 1).sum() > num_rows / 2
    chosen_N = choose_on_host(logits_NV, sampling, positions_N)
    assert (chosen_N <= 1).all()
    assert torch.equal(chosen_N, favoured_N[:, :2].argmax(-1))


@pytest.mark.parametrize(
    "params", [SamplingParams(top_p=0.9), SamplingParams(top_k=3), SamplingParams(min_p=0.1)]
)
def test_logits_that_are_no_numbers_give_a_token_and_disturb_no_other_row(params: SamplingParams) -> None:
    logits_NV = torch.randn(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sampling, positions_N = Sampling.of([params] * 3, [1, 2, 3], CPU), torch.arange(3)
    undisturbed_N = choose_on_host(logits_NV, sampling, positions_N)
    logits_NV[1] = torch.nan
    chosen_N = choose_on_host(logits_NV, sampling, positions_N)
    assert 0 <= chosen_N[1] < 40
    assert torch.equal(chosen_N[::2], undisturbed_N[::2])


def test_the_lowest_score_that_may_win_is_below_what_noise_can_raise() -> None:
    """The highest noise there is, on the token that is worst off, against the lowest on the best one."""
    bits = np.array([0, -1, (1 << 31) - 1, -(1 << 31)], dtype=np.int32)
    for dtype in (np.float32, np.float64):
        u = bits.astype(dtype) * dtype(2.0**-32) + dtype(2.0**-33)
        u += u < 0
        u = np.minimum(u, 1 - np.finfo(dtype).eps / 2)
        noise = -np.log(-np.log1p(-u))
        assert _LOWEST_SCORE + noise.max() < noise.min()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_of_some_ids_is_the_noise(dtype: torch.dtype) -> None:
    """To two units in the last place of the larger of it and 1: near 0 logarithms cancel."""
    keys_2N, positions_N = seed_keys([3, 1 << 62, 12345678901]), torch.tensor([0, 7, 1 << 20])
    all_NV = gumbel_noise(keys_2N, positions_N, 50_000, dtype=dtype).numpy()
    generator = np.random.default_rng(1)
    rows_M, ids_M = generator.integers(0, 3, 60_000), generator.integers(0, 50_000, 60_000)
    found_M = gumbel_noise_of(ids_M, rows_M, keys_2N.numpy(), positions_N.numpy(), dtype=all_NV.dtype)
    expected_M = all_NV[rows_M, ids_M]
    assert found_M.dtype == expected_M.dtype
    unit = np.finfo(found_M.dtype).eps
    assert (np.abs(found_M - expected_M) <= 2 * unit * np.maximum(np.abs(expected_M), 1)).all()
