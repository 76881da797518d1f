"""A separate draft model changes no token, follows whatever is computed, and is kept wherever it agrees."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace as replace_fields

from config.errors import SettingsError
from config.settings import EngineSettings
from decoding.capacity import plan_capacity
from decoding.draft_checkpoint import Checkpoints
from decoding.engine import Engine
from decoding.messages import Decoded, Drafter, Generate, LogitEdits, SamplingParams
from tests.mixes import NUM_LAYERS, VOCAB, Lab, check_mixes, load_engines, one_request
from tests.oracle import NaiveDecoder
from tests.tiny import make_checkpoint, write_tokenizer


class RedirectingEngine(Engine):
    """Has a draft model draft for every second request, whatever drafter it asks for."""

    def submit(self, request: Generate) -> None:
        is_redirected = request.sequence_id % 2 == 0
        super().submit(replace_fields(request, drafter=Drafter.MODEL) if is_redirected else request)


@dataclass
class DraftLab(Lab):
    """A lab whose engines have a draft model."""

    model_draft_length: int | None = 3

    def fresh_engine(self, *, redirects: bool = True, **limits) -> Engine:
        made = super().fresh_engine(**limits)
        if not redirects:
            return made
        return RedirectingEngine(made.ready, made.runtime, made._scheduler, clock=lambda: 0.0)


def make_draft_lab(folder: Path, draft_folder: Path) -> DraftLab:
    make_checkpoint(folder, num_layers=NUM_LAYERS, vocab=VOCAB, dtype=torch.float64)
    engines = load_engines(folder, draft_model=str(draft_folder), exit_layer=2, draft_length=2)
    return DraftLab(engines, NaiveDecoder(folder))


@pytest.fixture(scope="module")
def pair_lab(tmp_path_factory: pytest.TempPathFactory) -> DraftLab:
    """The draft model is another one, of other width and heads, that agrees now and then."""
    draft_folder = tmp_path_factory.mktemp("draft")
    make_checkpoint(draft_folder, num_layers=2, hidden=16, heads=2, kv_heads=1, vocab=VOCAB, seed=3)
    return make_draft_lab(tmp_path_factory.mktemp("full"), draft_folder)


@pytest.fixture(scope="module")
def self_lab(tmp_path_factory: pytest.TempPathFactory) -> DraftLab:
    """The model drafts for itself, with a cache apart."""
    folder = tmp_path_factory.mktemp("itself")
    return make_draft_lab(folder, folder)


def test_random_mixes_with_a_draft_model_equal_naive_decoding(pair_lab: DraftLab) -> None:
    check_mixes(pair_lab, range(300, 312))


def mixed_requests(rng: np.random.Generator, num_rows: int) -> list[Generate]:
    """Rows of all drafters, long and short prompts, greedy and sampled, some with edits."""
    drafters = [Drafter.MODEL, Drafter.EARLY_EXIT, Drafter.MODEL, Drafter.LOOKUP, Drafter.MODEL, Drafter.NONE]
    edits = LogitEdits(presence_penalty=1.5, repetition_penalty=1.2, bad_words=[[5, 9], [11]])
    return [
        Generate(
            sequence_id=row,
            prompt_ids=rng.integers(0, VOCAB, size=int(rng.integers(1, 70))).tolist(),
            max_new_tokens=int(rng.integers(20, 60)),
            sampling=SamplingParams(
                temperature=[0.0, 1.2, 0.7][row % 3],
                top_k=[0, 0, 12][row % 3],
                edits=edits if row % 4 == 0 else None,
            ),
            seed=row,
            stop_token_ids=[],
            exit_layer=int(rng.integers(1, NUM_LAYERS)),
            draft_length=[1, 4, 7, None][row % 4],
            drafter=drafters[row % len(drafters)],
        )
        for row in range(num_rows)
    ]


def follow_up(request: Generate, answer: list[int], *, sequence_id: int) -> Generate:
    """A request that begins with all that another has said, and has the draft model draft for it."""
    return replace_fields(
        request,
        sequence_id=sequence_id,
        prompt_ids=[*request.prompt_ids, *answer],
        drafter=Drafter.MODEL,
        max_new_tokens=16,
        draft_length=5,
    )


@pytest.mark.parametrize(("block_size", "budget", "num_blocks"), [(4, 9, 60), (4, 32, 120), (16, 512, 128)])
def test_a_model_that_drafts_for_itself_has_every_draft_kept(
    self_lab: DraftLab, block_size: int, budget: int, num_blocks: int
) -> None:
    """Across chunks of prompts, prefixes that any drafter's rows left behind, preemption and mixed rows."""
    engine = self_lab.fresh_engine(
        block_size=block_size, num_blocks=num_blocks, max_num_seqs=8, budget=budget, redirects=False
    )
    requests = mixed_requests(np.random.default_rng(budget), 12)
    events = engine.generate(requests)
    answers = {i: [t for event in own for t in event.token_ids] for i, own in events.items()}
    follow_ups = [follow_up(r, answers[r.sequence_id], sequence_id=100 + r.sequence_id) for r in requests]
    for request in reversed(follow_ups):
        events |= engine.generate([request])
    for request in [*requests, *follow_ups]:
        got = [t for event in events[request.sequence_id] for t in event.token_ids]
        assert got == self_lab.oracle.decode(request, guess=got)
    fates = {drafter: np.zeros(2, dtype=int) for drafter in Drafter}
    for event in (event for own in events.values() for event in own):
        fates[event.drafter] += event.drafted, event.kept
    drafted, kept = fates[Drafter.MODEL]
    assert kept == drafted > 100
    assert fates[Drafter.EARLY_EXIT][0] > 0
    assert fates[Drafter.LOOKUP][0] > 0
    assert sum(events[request.sequence_id][0].num_cached_tokens or 0 for request in follow_ups) > 40
    load = engine.report().load
    assert (load.num_preemptions_total > 0) == (block_size == 4)
    assert load.num_used_blocks == 0


def test_a_last_draft_that_was_never_fed_is_not_taken_for_computed(
    self_lab: DraftLab,
) -> None:
    """With every length of answer, so that the last kept draft falls on a block's end."""
    engine = self_lab.fresh_engine(block_size=4, num_blocks=512, max_num_seqs=8, budget=64, redirects=False)
    everything: list[Decoded] = []
    for row in range(24):
        first = one_request(
            sequence_id=row,
            prompt_ids=[row + 1, 40, 3],
            max_new_tokens=6 + row,
            sampling=SamplingParams(temperature=0.9),
            drafter=[Drafter.MODEL, Drafter.EARLY_EXIT][row % 2],
            draft_length=1 + row % 5,
        )
        answer = [t for event in engine.generate([first])[row] for t in event.token_ids]
        later = follow_up(first, answer, sequence_id=100 + row)
        events = engine.generate([later])[100 + row]
        got = [t for event in events for t in event.token_ids]
        assert got == self_lab.oracle.decode(later, guess=got)
        everything += events
    assert sum(event.num_cached_tokens or 0 for event in everything) > 24
    assert sum(event.drafted for event in everything) > 100
    assert all(event.kept == event.drafted for event in everything)


def test_a_draft_model_takes_one_pass_for_each_draft_and_none_more(self_lab: DraftLab) -> None:
    engine = self_lab.fresh_engine(
        block_size=16, num_blocks=128, max_num_seqs=16, budget=512, redirects=False
    )
    for row in range(5):
        engine.submit(one_request(sequence_id=row, drafter=Drafter.MODEL, draft_length=3))
    engine.step()
    drafter = engine.runtime.draft_model
    assert drafter is not None
    for _ in range(3):
        before = drafter.num_layer_calls, engine.runtime.model.num_layer_calls
        engine.step()
        assert drafter.num_layer_calls - before[0] == 3 * NUM_LAYERS
        assert engine.runtime.model.num_layer_calls - before[1] == NUM_LAYERS


def test_draft_models_of_other_vocabularies_are_refused_in_one_line(tmp_path: Path) -> None:
    full = make_checkpoint(tmp_path / "full", vocab=61)
    smaller = make_checkpoint(tmp_path / "smaller", vocab=60)
    other = make_checkpoint(tmp_path / "other", vocab=61)
    write_tokenizer(other, 61)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"0"', '"#"').replace('"1"', '"0"'))
    for folder, words in ((smaller, "60 tokens, that of the model 61"), (other, "has id")):
        with pytest.raises(SettingsError) as caught:
            Engine.load(EngineSettings(model=str(full), draft_model=str(folder)))
        assert str(caught.value).startswith(f"draft_model {folder}: its ")
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_draft_model_drafts_within_its_own_context_and_no_further(tmp_path: Path) -> None:
    full, draft = make_checkpoint(tmp_path / "full"), make_checkpoint(tmp_path / "draft")
    config = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 24}))
    engine = Engine.load(
        EngineSettings(model=str(full), draft_model=str(draft), dtype="float64", device="cpu", num_threads=1)
    )
    asked = one_request(drafter=Drafter.MODEL, max_new_tokens=40, draft_length=5)
    events = engine.generate([asked])[0]
    num_known, drafted = len(asked.prompt_ids), []
    for event in events:
        drafted.append((num_known, event.drafted))
        num_known += len(event.token_ids)
    # The first step computes the prompt; the last draft of each step is never fed.
    assert all(count == min(5, max(0, 24 - known + 1)) for known, count in drafted[1:])
    assert {0, 1, 5} == {count for _, count in drafted[1:]}
    assert [i for event in events for i in event.token_ids] == NaiveDecoder(full).decode(asked)


def test_the_cache_of_a_draft_model_takes_its_part_of_the_memory(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "full", vocab=61)
    deeper = make_checkpoint(tmp_path / "deeper", vocab=61, num_layers=12)
    # More rows than the memory has room for.
    settings = EngineSettings(model=str(folder), draft_model=str(deeper), max_num_seqs=4096, block_size=1)

    def num_blocks(settings: EngineSettings) -> int:
        return plan_capacity(
            settings, Checkpoints.open(settings), torch.float32, torch.device("cpu")
        ).num_blocks

    assert num_blocks(settings.model_copy(update={"draft_model": None})) // num_blocks(settings) == 4
