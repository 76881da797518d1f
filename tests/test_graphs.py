"""Steps that are recorded and replayed decode what eager ones do: with a stand-in for CUDA graphs, and on CUDA."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace as replace_fields

from config.settings import EngineSettings
from decoding import logits
from decoding.engine import Engine
from decoding.graph_steps import Key
from decoding.graphed_cycle import GraphedCycle
from decoding.graphs import Graphs, cuda_recorder
from decoding.messages import Drafter, SamplingParams
from decoding.model import LlamaDecoder
from decoding.recorded_cycle import RecordedCycle, rounded_up
from tests.graph_engines import (
    BLOCK_SIZE,
    MAX_LEN,
    NUM_BLOCKS,
    NUM_LAYERS,
    Doing,
    Freezing,
    Subject,
    fresh,
    load,
    plain_request,
    random_requests,
    replace_cycle,
    settings_of,
    taping,
    watch,
)
from tests.graph_tape import TapeRecorder
from tests.mixes import VOCAB
from tests.oracle import NaiveDecoder
from tests.tiny import make_checkpoint


@pytest.fixture(scope="module", autouse=True)
def _as_on_a_device() -> Iterator[None]:
    """On a CPU alone NumPy ranks scores, which no tape could hold."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logits, "_ranked", lambda scores_NV: scores_NV.sort(-1, descending=True).values)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    return make_checkpoint(folder, num_layers=NUM_LAYERS, vocab=VOCAB, dtype=torch.float64)


@pytest.fixture(scope="module")
def subject(folder: Path) -> Subject:
    return load(folder)


def test_random_mixes_equal_eager_and_naive_decoding(subject: Subject) -> None:
    happened: Counter[str] = Counter()
    for seed in range(6):
        few = NUM_BLOCKS if seed % 2 else MAX_LEN // BLOCK_SIZE
        budget = [16, 64][seed % 2]
        happened += subject.check(random_requests(seed, 10), seed, num_blocks=few, budget=budget)
    assert 0 < happened["kept"] < happened["drafted"]
    assert min(happened[kind] for kind in (Drafter.EARLY_EXIT, Drafter.LOOKUP, "preemptions")) > 0
    assert subject.recorder.num_replays > 3 * subject.cycle.recorded.graphs.num_recorded > 0


def test_drafts_among_few_tokens_change_no_token(folder: Path) -> None:
    """Which few depends on what was seen first, which rows in a pass of their own change."""
    subject = load(folder, draft_vocab_size=9)
    happened = subject.check(random_requests(20, 5), 20, drafts_alike=False)
    assert 0 < happened["kept"] < happened["drafted"]
    assert subject.recorder.num_replays > 0


def test_rows_that_end_with_the_context_are_padded_beyond_it(subject: Subject) -> None:
    """Ragged drafts up to the last position: what is padded lies behind the longest context, in no row's block."""
    rows = random_requests(30, 8)
    requests = [
        replace_fields(
            row,
            prompt_ids=(row.prompt_ids * MAX_LEN)[: MAX_LEN - 12],
            max_new_tokens=12,
            stop_token_ids=[],
            sampling=SamplingParams(temperature=0.0),
            exit_layer=None,
            logprobs=None,
        )
        for row in rows
    ]
    happened = subject.check(requests, 30)
    assert 0 < happened["kept"] < happened["drafted"]


def test_recordings_that_had_to_go_are_made_again(subject: Subject) -> None:
    recorder = taping()
    graphs: Graphs[Key] = Graphs(recorder, most=3)
    runtime = subject.loaded.runtime
    recorded = RecordedCycle(
        runtime.model, sizes=subject.cycle.recorded.sizes, graphs=graphs, clock=lambda: 0.0
    )
    watch(subject.loaded, recorded, recorder)
    cycle = GraphedCycle(subject.eager_cycle, recorded)
    other = replace(subject, loaded=replace_cycle(subject.loaded, cycle))
    assert other.check(random_requests(40, 4), 40)["kept"] > 0
    assert len(graphs) == 3 < graphs.num_recorded


def test_rows_that_draft_at_different_exit_layers_run_eagerly(subject: Subject) -> None:
    rows = [replace_fields(plain_request(row), exit_layer=1 + 2 * row, draft_length=2) for row in range(2)]
    subject.check(rows[:1], 50)
    before = subject.recorder.num_replays
    assert before > 0
    engine = fresh(subject.loaded, 50)
    for row in rows:
        engine.submit(row)
    # The prompts, then a step in which both draft.
    engine.step()
    events = engine.step().decoded
    assert [event.drafted for event in events] == [2, 2]
    assert subject.recorder.num_replays == before


@pytest.mark.parametrize("is_replayed", [False, True])
def test_a_position_frozen_at_the_recording_is_noticed(subject: Subject, is_replayed: bool) -> None:
    """The control of all that is above: a mistake that is none where work is done and not replayed."""
    model = subject.loaded.runtime.model
    attention = Freezing(model.attention)
    frozen = LlamaDecoder(model.weights, attention)
    recorder = TapeRecorder() if is_replayed else Doing()
    cycle = GraphedCycle.of(subject.eager_cycle, frozen, recorder, subject.cycle.recorded.sizes)
    engine = fresh(replace_cycle(subject.loaded, cycle), 60)
    request = replace_fields(plain_request(0), draft_length=0)
    engine.submit(request)
    got: list[int] = []
    while engine.has_work:
        attention.position = len(request.prompt_ids) + len(got) - 1
        got += [token_id for event in engine.step().decoded for token_id in event.token_ids]
    assert (got != subject.oracle.decode(request)) == is_replayed


def test_sizes_are_few_and_add_half_at_most() -> None:
    sizes = [rounded_up(number) for number in range(65)]
    assert sorted(set(sizes)) == [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert all(number <= size <= 1.5 * number for number, size in enumerate(sizes))


@pytest.mark.parametrize(
    ("device", "dtype", "changes"),
    [
        ("cpu", torch.float32, {}),
        ("cuda", torch.bfloat16, {"enforce_eager": True}),
        ("cuda", torch.bfloat16, {"attention": "gather"}),
        ("cuda", torch.bfloat16, {"draft_model": "other"}),
    ],
)
def test_where_steps_run_eagerly(device: str, dtype: torch.dtype, changes: dict[str, object]) -> None:
    settings = EngineSettings(**{"device": device} | changes)
    assert cuda_recorder(settings, torch.device(device), dtype) is None


@pytest.mark.gpu
def test_cuda_graphs_decode_as_eager_steps_do(folder: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    settings = settings_of(folder, device="cuda")
    eager = settings.model_copy(update={"enforce_eager": True})
    subject = Subject(Engine.load(settings), Engine.load(eager), NaiveDecoder(folder), TapeRecorder())
    happened: Counter[str] = Counter()
    for seed in range(70, 76):
        happened += subject.check(random_requests(seed, 10), seed)
    assert 0 < happened["kept"] < happened["drafted"]
    assert subject.cycle.recorded.graphs.num_recorded > 0
