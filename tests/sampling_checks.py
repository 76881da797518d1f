"""Triton's kernels of the choice and keep rules against torch in float64 and the noise's published definition: on
CUDA, or on a CPU where Triton interprets them.

`test_sampling_triton` runs this file in a process of its own: interpreting is chosen before Triton is imported.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from config.settings import EngineSettings
from decoding import sampling_kernels, sampling_triton
from decoding.acceptance import num_kept
from decoding.coupling import choose
from decoding.engine import Engine
from decoding.kernel_devices import takes_kernels
from decoding.logits import Sampling, process
from decoding.messages import Generate, SamplingParams
from decoding.noise import gumbel_noise, seed_keys
from tests.oracle import NaiveDecoder, noise_word
from tests.test_acceptance import kept_one_by_one
from tests.test_noise import GOLDEN_WORDS, POSITIONS, SEEDS
from tests.tiny import make_checkpoint
from tests.triton_checks import DEVICE, IS_INTERPRETED

# NumPy, which interprets, says so where scores are −∞ or no numbers, as they should be.
pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered:RuntimeWarning", "ignore:invalid value encountered:RuntimeWarning"
)

CPU = torch.device("cpu")
SHORT_DTYPES = [torch.float16] if IS_INTERPRETED else [torch.float16, torch.bfloat16]


@triton.jit
def write_words(out, keys, positions, num_rows, first_id, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    ids = first_id + tl.arange(0, WIDTH)
    words = sampling_kernels.noise_words(keys, num_rows, row, tl.load(positions + row), ids)
    tl.store(out + row * WIDTH + tl.arange(0, WIDTH), words.to(tl.int32, bitcast=True))


@triton.jit
def write_gumbel(out, words, WIDTH: tl.constexpr):
    place = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    tl.store(out + place, sampling_kernels.gumbel(tl.load(words + place).to(tl.uint32, bitcast=True)))


def words_of(seeds: list[int], positions: list[int], *, first_id: int = 0, width: int = 64) -> np.ndarray:
    """Unsigned noise bits, as the kernels compute them, for pairs of seed and position."""
    out = torch.empty(len(seeds), width, dtype=torch.int32, device=DEVICE)
    keys, places = seed_keys(seeds).to(DEVICE), torch.tensor(positions, device=DEVICE)
    write_words[len(seeds),](out, keys, places, len(seeds), first_id, WIDTH=width)
    return out.cpu().numpy().view(np.uint32)


def gumbel_of(words: np.ndarray) -> np.ndarray:
    """Noise of these words, a multiple of 1024 of them, as the kernels compute it."""
    given = torch.from_numpy(words.view(np.int32)).to(DEVICE)
    out = torch.empty(len(words), device=DEVICE)
    write_gumbel[len(words) // 1024,](out, given, WIDTH=1024, enable_fp_fusion=False)
    return out.double().cpu().numpy()


def test_golden_words_are_pinned() -> None:
    for (seed, position, token_id), word in GOLDEN_WORDS.items():
        assert words_of([seed], [position], first_id=token_id)[0, 0] == word


def test_bits_equal_the_published_definition() -> None:
    every = list(itertools.product(SEEDS, POSITIONS))
    for first_id, pairs in ((0, every), (131_000, every[::9])):
        seeds, positions = [seed for seed, _ in pairs], [position for _, position in pairs]
        ids = range(first_id, first_id + 16)
        expected = [[noise_word(seed, position, token_id) for token_id in ids] for seed, position in pairs]
        assert words_of(seeds, positions, first_id=first_id, width=16).tolist() == expected


def test_noise_is_exact_within_two_units_in_the_last_place() -> None:
    """Of u as float32 holds it: at both ends, around ½, where rounding 1 − u would show, and at random."""
    rng = np.random.default_rng(3)
    ends = [0, 1, 2, 255, 256, 2**24, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 257, 2**32 - 256, 2**32 - 1]
    turns = rng.integers(1_250_000_000, 1_290_000_000, size=16_384 - len(ends))
    words = np.concatenate((ends, turns, rng.integers(0, 2**32, size=16_384))).astype(np.uint32)
    u = (words.view(np.int32).astype(np.float32) * 2.0**-32 + np.float32(2.0**-33)).astype(np.float32)
    u = np.minimum(u + (u < 0), np.float32(1 - 2.0**-24)).astype(np.longdouble)
    expected = -np.log(-np.log1p(-u))
    unit = np.finfo(np.float32).eps * np.maximum(1, 2 ** np.floor(np.log2(np.abs(expected))))
    assert (np.abs(gumbel_of(words) - expected) <= 2 * unit).all()


def test_noise_is_torchs_within_two_units_in_the_last_place() -> None:
    words = words_of([9], [5], width=1024)[0]
    expected = gumbel_noise(seed_keys([9]), torch.tensor([5]), 1024, dtype=torch.float32)[0].double().numpy()
    eps = torch.finfo(torch.float32).eps
    assert (np.abs(gumbel_of(words) - expected) <= 2 * eps * np.maximum(1, np.abs(expected))).all()


def check_choice(logits_NV: Tensor, params: list[SamplingParams], *, first: int | None = None) -> list[int]:
    """The kernels' choices, which must be torch's in float64."""
    seeds, positions_N = [100 + row for row in range(len(params))], 7 + 3 * torch.arange(len(logits_NV))
    ours, reference = (Sampling.of(params, seeds, device) for device in (DEVICE, CPU))
    if first is not None:
        ours, reference = ours.first(first), reference.first(first)
    assert takes_kernels(logits_NV.to(DEVICE))
    chosen_N = choose(logits_NV.to(DEVICE), ours, positions_N.to(DEVICE))
    assert chosen_N.dtype == torch.int64
    assert chosen_N.tolist() == choose(logits_NV.double(), reference, positions_N).tolist()
    return chosen_N.tolist()


def random_logits(num_rows: int, vocab_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(vocab_size)
    return (3 * torch.randn(num_rows, vocab_size, generator=generator)).to(dtype)


TEMPERATURES = [SamplingParams(temperature=t) for t in (0.0, 0.7, 1.0, 1.9, 1e-320, 1e-38, 50.0, 0.0)]


@pytest.mark.parametrize("vocab_size", [1, 4096, 5000])
def test_choices_are_torchs(vocab_size: int) -> None:
    chosen = check_choice(random_logits(8, vocab_size), TEMPERATURES)
    greedy = random_logits(8, vocab_size).argmax(-1).tolist()
    assert [chosen[row] for row in (0, 4, 5, 7)] == [greedy[row] for row in (0, 4, 5, 7)]


@pytest.mark.parametrize("dtype", SHORT_DTYPES, ids=str)
def test_choices_of_short_dtypes_are_torchs(dtype: torch.dtype) -> None:
    check_choice(random_logits(4, 5000, dtype), TEMPERATURES[:4])


def test_columns_that_are_views_belong_to_their_rows() -> None:
    check_choice(random_logits(3, 700), TEMPERATURES[1:], first=3)
    check_choice(random_logits(1, 700).expand(4, -1), TEMPERATURES[:4])
    check_choice(random_logits(4, 900)[:, 100:], TEMPERATURES[:4])


def test_a_greedy_tie_goes_to_the_lowest_id_in_whatever_part() -> None:
    tied_NV = torch.zeros(2, 9000)
    tied_NV[:, [1500, 4095, 4096, 8999]] = 3.0
    assert check_choice(tied_NV, TEMPERATURES[:2])[0] == 1500


def test_tokens_at_minus_infinity_are_never_chosen() -> None:
    """Also by rows of which all is masked in some parts, or all but one token."""
    logits_NV = torch.full((4, 9000), -math.inf)
    logits_NV[:3, 8998] = -1e30
    logits_NV[1, :4096] = random_logits(1, 4096)
    params = [SamplingParams(temperature=t) for t in (1.0, 1.9, 0.0, 1.0)]
    assert check_choice(logits_NV, params)[::2] == [8998, 8998]


def test_rows_that_hold_no_numbers_choose_as_torch_does_and_trouble_no_other() -> None:
    logits_NV = random_logits(5, 5000)
    expected = check_choice(logits_NV, TEMPERATURES[:5])
    logits_NV[1, 77], logits_NV[2, [4500, 4700]] = math.nan, math.inf
    chosen = check_choice(logits_NV, TEMPERATURES[:5])
    assert [chosen[row] for row in (0, 3, 4)] == [expected[row] for row in (0, 3, 4)]


FILTERS = [
    SamplingParams(top_k=5),
    SamplingParams(top_p=0.9051),
    SamplingParams(temperature=1.4, top_k=40, top_p=0.7071, min_p=0.01),
    SamplingParams(top_k=10**9, top_p=1e-50),
    SamplingParams(temperature=0.0, top_k=3, top_p=0.2),
    SamplingParams(min_p=0.2),
]


def check_filters(logits_NV: Tensor, params: list[SamplingParams]) -> Tensor:
    """What the kernels leave, [N, V]: as torch has it in float64, scores as near as float32."""
    ours, reference = (Sampling.of(params, list(range(len(params))), device) for device in (DEVICE, CPU))
    scores_NV, expected_NV = process(logits_NV.to(DEVICE), ours).cpu(), process(logits_NV.double(), reference)
    assert torch.equal(scores_NV.isfinite(), expected_NV.isfinite())
    torch.testing.assert_close(scores_NV.double(), expected_NV, rtol=1e-5, atol=1e-5)
    return scores_NV.isfinite()


def test_filters_leave_what_torch_leaves() -> None:
    logits_NV = random_logits(6, 3500)
    logits_NV[:, 10:20] = -math.inf
    counts = check_filters(logits_NV, FILTERS).sum(-1)
    assert counts[0] == 5
    assert counts[3] == 1
    assert 5 < counts[1] < 3490
    check_filters(random_logits(1, 4500), FILTERS[2:3])


def test_equal_scores_are_kept_or_dropped_together() -> None:
    logits_NV = torch.tensor([0.4, 0.2, 0.2, 0.2]).log().expand(4, -1)
    params = [SamplingParams(top_k=2), *(SamplingParams(top_p=p) for p in (0.55, 0.35, 0.9))]
    assert check_filters(logits_NV, params).sum(-1).tolist() == [4, 4, 1, 4]
    # Top-p counts within the top-k, of which no more than two: 0.4 of 0.6 is more than 0.6.
    both = [SamplingParams(top_k=2, top_p=p) for p in (0.65, 0.7)]
    assert check_filters(logits_NV[:2], both).sum(-1).tolist() == [1, 4]


def kept(drafts_BK: Tensor, choices_BQ: Tensor, lengths_B: Tensor) -> list[int]:
    """By the kernel."""
    assert takes_kernels(choices_BQ.to(DEVICE))
    kept_B = num_kept(drafts_BK.to(DEVICE), choices_BQ.to(DEVICE), lengths_B.to(DEVICE))
    assert kept_B.dtype == torch.int64
    return kept_B.tolist()


def test_the_keep_rule_is_its_definition() -> None:
    """So few ids that drafts often agree, and agree again after a refusal."""
    rng = np.random.default_rng(5)
    for num_drafts in (0, 1, 2, 3, 8, 64):
        drafts = rng.integers(
            0, 3 if num_drafts < 8 else 1 + (rng.random((40, 1)) < 0.5), size=(40, num_drafts)
        )
        choices = rng.integers(0, 2, size=(40, num_drafts + 1))
        choices[:20, :-1] = np.where(rng.random((20, num_drafts)) < 0.9, drafts[:20], choices[:20, :-1])
        lengths = rng.integers(0, num_drafts + 1, size=40)
        rows = zip(drafts.tolist(), choices.tolist(), lengths.tolist(), strict=True)
        expected = [kept_one_by_one(*row) for row in rows]
        assert kept(*map(torch.from_numpy, (drafts, choices, lengths))) == expected


def test_the_keep_rule_is_not_misled() -> None:
    drafts_BK, lengths_B = torch.tensor([[1, 2, 3]] * 4), torch.tensor([3, 3, 3, 1])
    choices_BQ = torch.tensor([[2, 3, 4, 5], [0, 1, 2, 3], [1, 9, 3, 4], [1, 2, 3, 4]])
    assert kept(drafts_BK, choices_BQ, lengths_B) == [0, 0, 1, 1]
    wider = torch.cat((choices_BQ, choices_BQ), 1)
    assert kept(drafts_BK.t().contiguous().t(), wider[:, :4], lengths_B) == [0, 0, 1, 1]


def test_an_engine_samples_the_tokens_of_naive_decoding(tmp_path: Path) -> None:
    """Drafted and verified by the kernels in float32; the oracle decodes one row in float64."""
    folder = make_checkpoint(tmp_path, num_layers=3, hidden=16, heads=2, kv_heads=1, vocab=31)
    engine = Engine.load(
        EngineSettings(
            model=str(folder),
            dtype="float32",
            device=DEVICE.type,
            attention="gather",
            num_threads=1,
            num_blocks=16,
            block_size=4,
            max_model_len=48,
            exit_layer=2,
            draft_length=2,
        )
    )
    params = [SamplingParams(temperature=0.8), SamplingParams(temperature=0.0)]
    requests = [
        Generate(
            sequence_id=i,
            prompt_ids=list(range(1 + i, 5 + i)),
            max_new_tokens=5,
            sampling=each,
            seed=40 + i,
            stop_token_ids=[],
        )
        for i, each in enumerate(params)
    ]
    oracle, events = NaiveDecoder(folder), engine.generate(requests)
    for request in requests:
        tokens = [token for event in events[request.sequence_id] for token in event.token_ids]
        assert tokens == oracle.decode(request)
    flat = [event for own in events.values() for event in own]
    assert 0 < sum(event.kept for event in flat) < sum(event.drafted for event in flat)


@pytest.mark.skipif(IS_INTERPRETED, reason="only CUDA makes a host wait")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_no_host_waits(dtype: torch.dtype) -> None:
    """Float64 is torch's throughout."""
    params = [*TEMPERATURES, *FILTERS]
    sampling = Sampling.of(params, list(range(14)), DEVICE)
    logits_NV, positions_N = random_logits(14, 5000, dtype).to(DEVICE), torch.arange(14, device=DEVICE)
    drafts_BK, lengths_B = torch.zeros(14, 4, dtype=torch.int64, device=DEVICE), positions_N % 4
    for mode in ("default", "error"):  # The first call compiles.
        torch.cuda.set_sync_debug_mode(mode)
        try:
            chosen_N = choose(logits_NV, sampling, positions_N)
            num_kept(drafts_BK, chosen_N[:, None].expand(-1, 5), lengths_B)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_warming_up_compiles_for_logits_of_any_kind() -> None:
    sampling = Sampling.of([SamplingParams(top_k=3, top_p=0.5)], [0], DEVICE)
    for dtype in SHORT_DTYPES:
        sampling_triton.warm_up(sampling, vocab_size=31, dtype=dtype)
