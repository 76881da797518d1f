"""Benchmarks of the engine alone on tiny checkpoints: what they compare, count and print, not how fast it was."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from benchmarks import concurrency
from benchmarks.closed_loop import AUTO, PLAIN, Drafting, Driver, Pass
from benchmarks.concurrency_report import Contest, Scanned, as_text
from benchmarks.gguf_export import write_gguf
from benchmarks.model_costs import ModelCosts, flops_per_token
from benchmarks.sweep_inputs import read_prompts
from benchmarks.timing import Job, Prompt, Sampled
from benchmarks.variants import TASKS, Witness, default_exit_layers, usual_exit_layers
from config.settings import BUNDLED_CHECKPOINT, EngineSettings
from decoding.checkpoint import open_checkpoint
from decoding.engine import Engine
from server.commands.bench import bench
from tests.tiny import load_reference, make_checkpoint
from training.gguf_import import open_gguf, read_tensors


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), num_layers=4)


def test_a_closed_loop_keeps_its_number_and_every_text(checkpoint: Path):
    settings = EngineSettings(model=str(checkpoint), num_threads=1, block_size=512, max_num_seqs=8)
    driver = Driver(Engine.load(settings), count())
    prompts = tuple(Prompt(index, (5 + index, 6, 7)) for index in range(5))
    job = Job(prompts, 12, Sampled(0.8, 0.95))
    plain = driver.run(job, PLAIN, concurrency=2)
    drafted = driver.run(job, Drafting(2, 3), concurrency=2)
    # The first begin at other points of their texts.
    assert [len(text) for text in plain.token_ids] == [6, 12, 12, 12, 12]
    assert (plain.drafted, plain.kept) == (0, 0)
    assert 0 < drafted.kept < drafted.drafted
    assert drafted.token_ids == plain.token_ids == driver.run(job, AUTO, concurrency=2).token_ids


class _Counted:
    """An engine's `step`, with the most requests that were ever running at once."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.most_running = 0

    @property
    def has_work(self) -> bool:
        return self._engine.has_work

    def submit(self, request) -> None:
        self._engine.submit(request)

    def step(self):
        report = self._engine.step()
        self.most_running = max(self.most_running, len(report.decoded))
        return report


def test_a_closed_loop_never_exceeds_its_number(checkpoint: Path):
    engine = _Counted(Engine.load(EngineSettings(model=str(checkpoint), num_threads=1, block_size=512)))
    prompts = tuple(Prompt(index, (5 + index, 6, 7)) for index in range(6))
    Driver(engine, count()).run(Job(prompts, 8, Sampled(0.0, 1.0)), PLAIN, concurrency=3)
    assert engine.most_running == 3


def passes(*speeds: float, text: tuple[int, ...] = (1, 2, 3, 4)) -> tuple[Pass, ...]:
    return tuple(Pass((text,), len(text) / speed, len(text), drafted=4, kept=3) for speed in speeds)


def contest(auto: tuple[Pass, ...]) -> Contest:
    static = Drafting(2, 3)
    return Contest(
        Sampled(0.0, 1.0), 4, static, (Scanned(static, 1.5),), auto, passes(10, 20, 10), passes(16, 32, 16)
    )


def test_a_contest_takes_ratios_round_by_round_and_judges_the_promise():
    found = contest(passes(12, 24, 12))
    assert found.over_plain.median == pytest.approx(1.2)
    assert found.over_static.median == pytest.approx(0.75)
    assert found.keeps_its_promise
    assert not contest(passes(9.7, 19.4, 9.7)).keeps_its_promise
    assert (found.num_compared, found.num_different_texts) == (24, 0)
    assert contest(passes(12, 24, 12, text=(1, 2, 3, 5))).num_different_texts == 3
    assert as_text([found]).splitlines()[1].split()[:7] == ["T=0", "4", "10.0", "12.0", "E=2", "γ=3", "16.0"]


def test_concurrency_runs_on_a_tiny_checkpoint(checkpoint: Path, tmp_path: Path, capsys):
    flags = ["--model", str(checkpoint), "--concurrency", "1", "3", "--pairs", "2", "--tokens", "12"]
    flags += ["--scan-tokens", "8", "--exit-layers", "1", "2", "--draft-lengths", "2", "--waves", "1"]
    concurrency.main([*flags, "--temperatures", "0", "0.8", "--out", str(tmp_path)])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "concurrency.json").read_text(encoding="utf-8")) == document
    assert (tmp_path / "concurrency.png").stat().st_size > 0
    found = [(each["temperature"], each["concurrency"]) for each in document["contests"]]
    assert found == [(0.0, 1), (0.0, 3), (0.8, 1), (0.8, 3)]
    for each in document["contests"]:
        assert each["auto_over_plain"]["num_pairs"] == 2
        assert each["tokens_compared"] == 2 * 2 * sum({1: [12], 3: [4, 8, 12]}[each["concurrency"]])
        assert each["texts_different"] == 0
    assert str(checkpoint) not in json.dumps(document)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_transformers_count(tmp_path: Path, tied: bool):
    folder = make_checkpoint(tmp_path / "sizes", tied=tied)
    model = load_reference(folder, torch.float32)
    costs = ModelCosts(open_checkpoint(str(folder), revision=None).shape)
    assert costs.num_parameters == sum(weight.numel() for weight in model.parameters())
    held = costs.num_parameters + (costs.head_flops // 2 if tied else 0)
    assert costs.weight_bytes(4, 4) == 4 * held


def test_flops_of_plain_and_of_drafts(checkpoint: Path):
    costs = ModelCosts(open_checkpoint(str(checkpoint), revision=None).shape)
    whole = costs.layer_flops + costs.head_flops
    assert flops_per_token(costs, row_steps=10, drafted=0, emitted=10, draft_flops=7) == whole
    # Ten cycles of two drafts that give twenty tokens: thirty tokens in all layers, and what the drafts took.
    found = flops_per_token(costs, row_steps=10, drafted=20, emitted=20, draft_flops=7)
    assert found == (30 * whole + 20 * 7) / 20


def test_table_has_a_row_for_every_assistant_and_task(checkpoint: Path, tmp_path: Path):
    draft = make_checkpoint(tmp_path / "draft", num_layers=2)
    app = Typer()
    app.command()(bench)
    flags = ["--table", "--model", str(checkpoint), "--draft-model", str(draft), "--exit-layers", "1,2"]
    out = tmp_path / "table.json"
    result = CliRunner().invoke(
        app, [*flags, "--tokens", "16", "--rounds", "1", "--out", str(out)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text(encoding="utf-8"))
    assert json.loads(result.stdout.splitlines()[-1]) == document
    assistants = [row["assistant"] for row in document["rows"] if row["task"] == "all"]
    assert assistants[:4] == ["none", "early exit E=1 γ=4", "early exit E=2 γ=4", "early exit, auto"]
    assert assistants[4:6] == ["lookup γ=4", "hybrid, auto"]
    assert assistants[6].startswith("draft model of 0.0 M")
    tasks = ["complete", "summarise", "edit", "table", "free", "all"]
    assert [row["task"] for row in document["rows"]] == [task for task in tasks for _ in assistants]
    none, early, *_, model = (row for row in document["rows"] if row["task"] == "all")
    assert none["speed_up"] == 1.0
    assert none["acceptance_rate"] is None
    assert early["acceptance_rate"] < 1
    assert early["flops_per_token"] > none["flops_per_token"]
    assert model["memory"]["weight_bytes"] > none["memory"]["weight_bytes"]
    assert document["texts_different"] == 0
    assert "A100" in result.stdout
    assert "1.297x" in result.stdout


def test_a_short_run_tries_exits_in_the_first_half():
    assert usual_exit_layers(str(BUNDLED_CHECKPOINT)) == (3, 4)
    assert default_exit_layers(2) == (1,)


def test_a_different_text_is_seen():
    witness, job = Witness(), Job((Prompt(0, (1,)),), 2, Sampled(0.0, 1.0))
    for text in ((4, 5), (4, 5), (4, 6)):
        witness.see(None, job, Pass((text,), 1.0, len(text), 0, 0))
    assert (witness.num_tokens, witness.num_different) == (6, 1)


def test_tasks_are_three_prompts_each():
    assert {task: len(texts) for task, texts in read_prompts(TASKS).items()} == {
        "complete": 3,
        "summarise": 3,
        "edit": 3,
        "table": 3,
        "free": 3,
    }


@pytest.mark.parametrize("tied", [False, True])
def test_a_written_gguf_file_holds_the_same_weights(tmp_path: Path, tied: bool):
    folder = make_checkpoint(tmp_path / "weights", tied=tied)
    reference = load_reference(folder, torch.float32)
    write_gguf(str(folder), tmp_path / "model.gguf", dtype="float32")
    config = reference.config
    config.dtype = torch.float32
    found = read_tensors(open_gguf(tmp_path / "model.gguf"), config)
    expected = reference.state_dict()
    assert found.keys() == expected.keys() - ({"lm_head.weight"} if tied else set())
    for name, weight in found.items():
        assert torch.equal(weight, expected[name]), name
