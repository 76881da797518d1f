"""Each filter, alone and combined, against one row at a time in numpy; batches change nothing."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from decoding.logits import Sampling, process
from decoding.messages import SamplingParams
from tests.oracle import processed

CPU = torch.device("cpu")


def process_rows(logits_NV: Tensor, params: list[SamplingParams]) -> Tensor:
    return process(logits_NV, Sampling.of(params, list(range(len(params))), CPU))


def kept_ids(logits: list[float], **filters: float) -> list[int]:
    """Ids that survive in a single row at temperature 1 (unless given)."""
    scores_NV = process_rows(torch.tensor([logits], dtype=torch.float64), [SamplingParams(**filters)])
    return scores_NV[0].isfinite().nonzero()[:, 0].tolist()


def logs(*probabilities: float) -> list[float]:
    return [math.log(p) for p in probabilities]


def assert_rows_equal_oracle(logits_NV: Tensor, params: list[SamplingParams]) -> None:
    scores_NV = process_rows(logits_NV, params)
    for row, row_params in enumerate(params):
        expected = processed(logits_NV[row].numpy(), row_params)
        context = f"row {row}: {row_params}"
        assert scores_NV[row].isfinite().tolist() == np.isfinite(expected).tolist(), context
        # Scores are measured from the row's best.
        below_best = expected - expected.max()
        np.testing.assert_allclose(scores_NV[row].numpy(), below_best, rtol=1e-12, atol=1e-9, err_msg=context)


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.05, 0.7, 1.0, 1.9]),
    top_k=st.sampled_from([0, 1, 2, 5, 11, 12, 13, 1000]),
    # No ratio of small counts, so that equal probabilities never add up to the bound but for rounding.
    top_p=st.sampled_from([1e-9, 0.3137, 0.7071, 0.9051, 0.9999, 1.0]),
    min_p=st.sampled_from([0.0, 1e-9, 0.0313, 0.3137, 1.0]),
)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.lists(PARAMS, min_size=1, max_size=6), st.integers(0, 2**32 - 1), st.booleans())
def test_every_row_of_a_mixed_batch_is_filtered_as_it_would_be_alone(
    params: list[SamplingParams], seed: int, ties: bool
) -> None:
    rng = np.random.default_rng(seed)
    shape = (len(params), 12)
    logits = rng.integers(-3, 3, size=shape) if ties else rng.normal(0, 2, size=shape)
    assert_rows_equal_oracle(torch.from_numpy(logits.astype(np.float64)), params)


@pytest.mark.parametrize("spread", [0.3, 3.0])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5])
@pytest.mark.parametrize("top_k", [0, 1, 255, 256, 257, 400, 699, 700, 701, 10**9])
def test_a_cut_deep_in_a_large_vocabulary_is_found(top_k: int, top_p: float, spread: float) -> None:
    logits_NV = spread * torch.randn(3, 700, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert_rows_equal_oracle(logits_NV, [SamplingParams(top_k=top_k, top_p=top_p)] * 3)


def test_other_rows_of_a_batch_do_not_move_a_rows_cut() -> None:
    """A row that needs the whole vocabulary ranked must not change what its neighbours keep."""
    generator = torch.Generator().manual_seed(4)
    logits_NV = torch.randn(1, 700, generator=generator, dtype=torch.float64).repeat(2, 1)
    flat = SamplingParams(temperature=1.9, top_p=0.999)
    for top_k, top_p in itertools.product([0, 40, 256, 300], [0.5, 0.95, 1.0]):
        params = SamplingParams(top_k=top_k, top_p=top_p)
        alone, beside = process_rows(logits_NV[:1], [params]), process_rows(logits_NV, [params, flat])
        assert torch.equal(alone[0].isfinite(), beside[0].isfinite()), params


def test_filters_act_in_the_order_temperature_min_p_top_k_top_p() -> None:
    """Each filter would keep something else if it saw what an earlier one has dropped or scaled."""
    # Temperature 2 turns odds of 16 : 4 : 1 into 4 : 2 : 1.
    odds = logs(16, 4, 1)
    assert kept_ids(odds, min_p=0.3) == [0]
    assert kept_ids(odds, min_p=0.3, temperature=2.0) == [0, 1]
    assert kept_ids(odds, top_p=0.6) == [0]
    assert kept_ids(odds, top_p=0.6, temperature=2.0) == [0, 1]
    # Top-p counts within the top-k: 0.4 of 0.7 reaches a half, 0.4 of 1 does not.
    shares = logs(0.4, 0.3, 0.2, 0.1)
    assert kept_ids(shares, top_p=0.5) == [0, 1]
    assert kept_ids(shares, top_p=0.5, top_k=2) == [0]
    # And within what min-p left.
    assert kept_ids(shares, top_p=0.5, min_p=0.6) == [0]


def test_equal_logits_are_kept_or_dropped_together() -> None:
    tied = logs(0.4, 0.2, 0.2, 0.2)
    assert kept_ids(tied, top_k=2) == [0, 1, 2, 3]
    assert kept_ids(tied, top_p=0.55) == [0, 1, 2, 3]
    assert kept_ids(tied, top_p=0.35) == [0]
    assert kept_ids([1.0] * 5, top_k=1) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("filters", [{"top_p": 1e-300}, {"top_p": 5e-324}, {"top_k": 1}, {"min_p": 1.0}])
def test_the_best_token_always_stays(filters: dict[str, float]) -> None:
    assert kept_ids([0.0, 3.0, 2.999], **filters) == [1]


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_k": 2**62}, {"top_p": 1.0}, {"min_p": 0.0}])
def test_filters_that_are_off_drop_nothing(filters: dict[str, float]) -> None:
    assert kept_ids([0.0, -50.0, 30.0], **filters) == [0, 1, 2]


def test_tokens_that_are_masked_already_stay_masked() -> None:
    masked = [1.0, -math.inf, 0.5, -math.inf]
    for filters in ({"top_k": 3}, {"top_p": 0.9999}, {"min_p": 1e-9}, {"top_k": 10, "top_p": 0.9999}):
        assert kept_ids(masked, **filters) == [0, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_are_at_least_float32_and_the_logits_are_left_alone(dtype: torch.dtype) -> None:
    logits_NV = torch.randn(2, 9, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)
    before = logits_NV.clone()
    scores_NV = process_rows(logits_NV, [SamplingParams(temperature=0.5, top_k=2, top_p=0.9, min_p=0.1)] * 2)
    assert scores_NV.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(logits_NV, before)


def test_greedy_rows_keep_their_logits_beside_sampled_ones() -> None:
    logits_NV = torch.randn(3, 9, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    hot = SamplingParams(temperature=3.0, top_k=2, top_p=0.5, min_p=0.5)
    scores_NV = process_rows(logits_NV, [hot, SamplingParams(temperature=0.0), hot])
    assert torch.equal(scores_NV[1], logits_NV[1] - logits_NV[1].max())


def test_taken_columns_are_those_of_their_rows() -> None:
    """Drafting and verification take each row's parameters for the positions they choose at."""
    params = [
        SamplingParams(temperature=0.5 + row, top_k=row, top_p=1 - row / 10, min_p=row / 10)
        for row in range(5)
    ]
    logits_NV = torch.randn(4, 30, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    index = [3, 0, 3, 4]
    taken = Sampling.of(params, [5, 6, 7, 8, 9], CPU).take(torch.tensor(index))
    direct = Sampling.of([params[i] for i in index], [5 + i for i in index], CPU)
    assert torch.equal(process(logits_NV, taken), process(logits_NV, direct))
    assert torch.equal(taken.keys_2N, direct.keys_2N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}, {"top_p": 1e-50}])
@pytest.mark.parametrize("temperature", [1e-320, 1e-38, 1e-10, 1.0])
def test_extreme_parameters_leave_the_best_token_standing(
    temperature: float, filters: dict[str, float], dtype: torch.dtype
) -> None:
    logits_NV = torch.zeros(2, 700, dtype=dtype)
    logits_NV[:, 77] = 17.0
    scores_NV = process_rows(logits_NV, [SamplingParams(temperature=temperature, **filters)] * 2)
    assert not scores_NV.isnan().any()
    assert scores_NV.argmax(-1).tolist() == [77, 77]
