"""Looking only at the best tokens gives what looking at all of them gives."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from decoding.logits import Sampling, process
from decoding.messages import SamplingParams
from decoding.noise import gumbel_noise, gumbel_noise_of, seed_keys
from decoding.nucleus import choose_among_best

CPU = torch.device("cpu")


def chosen_among_all(logits_NV: Tensor, sampling: Sampling, positions_N: Tensor) -> Tensor:
    scores_NV = process(logits_NV, sampling)
    noise_NV = gumbel_noise(sampling.keys_2N, positions_N, logits_NV.shape[-1], dtype=scores_NV.dtype)
    return (scores_NV + noise_NV * (sampling.temperatures_N > 0)[:, None]).argmax(-1)


def drawn_params(rng: random.Random) -> SamplingParams:
    """Greedy, or with a filter."""
    temperature = rng.choice([0.0, 0.3, 0.8, 1.5])
    top_k = rng.choice([0, 0, 1, 5, 50, 64, 65, 100])
    top_p = rng.choice([0.1, 0.5, 0.95, 0.999])
    return SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p if top_k == 0 else 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_ties", [False, True])
def test_the_choice_is_that_among_all_tokens(dtype: torch.dtype, has_ties: bool) -> None:
    """300 random batches; what was not found among the best must not be rare either."""
    rng = random.Random(4)
    generator = torch.Generator().manual_seed(4)
    num_found = num_rows = 0
    for _ in range(300):
        size = rng.choice([1, 3, 8]), rng.choice([20, 64, 65, 1000])
        scale = rng.choice([0.1, 1, 4, 8])
        logits_NV = torch.randn(size, dtype=torch.float64, generator=generator) * scale
        logits_NV = ((logits_NV * 2).round() / 2 if has_ties else logits_NV).to(dtype)
        params = [drawn_params(rng) for _ in range(size[0])]
        sampling = Sampling.of(params, [rng.randrange(1 << 62) for _ in params], CPU)
        assert sampling.all_narrow
        positions_N = torch.tensor([rng.randrange(1000) for _ in params])
        chosen_N, is_found_N = choose_among_best(logits_NV, sampling, positions_N)
        expected_N = chosen_among_all(logits_NV, sampling, positions_N).numpy()
        assert (chosen_N == expected_N)[is_found_N].all()
        num_found += int(is_found_N.sum())
        num_rows += size[0]
    assert 0.5 < num_found / num_rows < 0.95


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(top_p=0.9, min_p=0.1), SamplingParams(min_p=0.1)], ids=str
)
def test_rows_without_a_filter_or_with_min_p_are_not_narrow(params: SamplingParams) -> None:
    assert not Sampling.of([SamplingParams(temperature=0.0), params], [1, 2], CPU).all_narrow


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_of_some_ids_is_the_noise(dtype: torch.dtype) -> None:
    """To two units in the last place of the larger of it and 1: near 0 logarithms cancel."""
    keys_2N, positions_N = seed_keys([3, 1 << 62, 12345678901]), torch.tensor([0, 7, 1 << 20])
    all_NV = gumbel_noise(keys_2N, positions_N, 50_000, dtype=dtype).numpy()
    ids_NW = np.random.default_rng(1).integers(0, 50_000, (3, 20_000))
    found_NW = gumbel_noise_of(ids_NW, keys_2N.numpy(), positions_N.numpy(), dtype=all_NV.dtype)
    expected_NW = np.take_along_axis(all_NV, ids_NW, axis=1)
    assert found_NW.dtype == expected_NW.dtype
    unit = np.finfo(found_NW.dtype).eps
    assert (np.abs(found_NW - expected_NW) <= 2 * unit * np.maximum(np.abs(expected_NW), 1)).all()
