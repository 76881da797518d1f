"""Drafts among a part of the vocabulary: they change no token, follow what is seen and know their true ids."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from config.settings import EngineSettings
from decoding.coupling import choose
from decoding.draft_head import DraftHead
from decoding.engine import Engine
from decoding.logits import Sampling
from decoding.messages import SamplingParams
from tests.mixes import MAX_LEN, NUM_LAYERS, VOCAB, Lab, check_mixes, one_request
from tests.oracle import NaiveDecoder
from tests.tiny import make_checkpoint

NUM_DRAFTED, WIDTH = 9, 12


def drafting_among_few(folder: Path, *, block_size: int) -> Engine:
    settings = EngineSettings(
        model=str(folder),
        dtype="float64",
        device="cpu",
        num_threads=1,
        block_size=block_size,
        num_blocks=2048 // block_size,
        max_model_len=MAX_LEN,
        exit_layer=2,
        draft_length=2,
        draft_vocab_size=NUM_DRAFTED,
    )
    return Engine.load(settings)


@pytest.fixture(scope="module")
def few_lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("few")
    make_checkpoint(folder, num_layers=NUM_LAYERS, vocab=VOCAB, dtype=torch.float64)
    return Lab({size: drafting_among_few(folder, block_size=size) for size in (4, 16)}, NaiveDecoder(folder))


def test_random_mixes_equal_naive_decoding_though_drafts_are_among_few(few_lab: Lab) -> None:
    check_mixes(few_lab, range(500, 508))


@pytest.mark.parametrize("tied", [False, True])
def test_drafts_are_tokens_seen_lately(tmp_path: Path, tied: bool) -> None:
    folder = make_checkpoint(tmp_path, num_layers=NUM_LAYERS, vocab=VOCAB, dtype=torch.float64, tied=tied)
    engine = drafting_among_few(folder, block_size=16)
    asked = one_request(exit_layer=2, draft_length=3, max_new_tokens=60, traces_drafts=True)
    events = engine.generate([asked])[0]
    drafted = [each for event in events for each in event.drafted_ids]
    said = [each for event in events for each in event.token_ids]
    assert said == NaiveDecoder(folder).decode(asked)
    assert len(set(drafted)) > 1
    # Whatever runs left behind before, in the end all places are taken by what this one said.
    assert len(set(said)) > NUM_DRAFTED
    assert set(drafted[-9:]) <= {*asked.prompt_ids, *said}


@pytest.fixture
def rows_VD() -> torch.Tensor:
    return torch.randn(VOCAB, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_at_first_it_holds_the_lowest_ids_and_then_those_seen_last(rows_VD: torch.Tensor) -> None:
    head = DraftHead(rows_VD, NUM_DRAFTED)
    # The lowest id is the last of these to go.
    lately = OrderedDict.fromkeys(reversed(range(NUM_DRAFTED)))
    assert head.token_ids == lately.keys()
    for token_id in np.random.default_rng(5).zipf(1.3, size=400) % VOCAB:
        lately.pop(int(token_id), None)
        lately[int(token_id)] = None
        if len(lately) > NUM_DRAFTED:
            lately.popitem(last=False)
        head.see(np.array([token_id]))
        assert head.token_ids == lately.keys()
    head.see(np.arange(VOCAB))
    assert len(head.token_ids) == NUM_DRAFTED


@pytest.mark.parametrize(
    "kinds",
    [
        [SamplingParams(temperature=0.0)],
        [SamplingParams(temperature=1.3)],
        [SamplingParams(temperature=0.8, top_k=3), SamplingParams(temperature=0.0)],
        [SamplingParams(temperature=0.8, top_p=0.5), SamplingParams(temperature=1.0, min_p=0.2)],
    ],
)
def test_it_chooses_as_if_all_other_tokens_were_forbidden(
    rows_VD: torch.Tensor, kinds: list[SamplingParams]
) -> None:
    head = DraftHead(rows_VD, NUM_DRAFTED)
    head.see(np.array([50, 3, 41, 17, 60]))
    params = kinds * 40
    sampling = Sampling.of(params, list(range(len(params))), rows_VD.device)
    normed_PD = torch.randn(
        len(params), WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    positions_P = torch.arange(len(params))
    logits_PV = normed_PD @ rows_VD.T
    is_left_out_V = torch.tensor([token_id not in head.token_ids for token_id in range(VOCAB)])
    expected = choose(logits_PV.masked_fill(is_left_out_V, -torch.inf), sampling, positions_P)
    assert head.choose(normed_PD, sampling, positions_P).tolist() == expected.tolist()
    assert len(set(expected.tolist())) > 2


def test_a_part_as_large_as_the_vocabulary_is_the_whole_head(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, vocab=VOCAB)
    for size, has_own in ((VOCAB, False), (VOCAB - 1, True)):
        settings = EngineSettings(model=str(folder), device="cpu", num_threads=1, draft_vocab_size=size)
        assert (Engine.load(settings).runtime.cycle._see is not None) is has_own
