"""The sweep measures every setting beside plain decoding, and the command writes what it found."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks.sweep import Round, Setting, Sweep, Trial, row_of
from benchmarks.sweep_inputs import BUNDLED_PROMPTS, Axes, Request, Work, default_exit_layers, read_prompts
from benchmarks.sweep_report import Circumstances
from benchmarks.sweep_session import prepare, save
from benchmarks.sweep_table import ALL_DOMAINS
from benchmarks.timing import Sampled, Step
from config.errors import SettingsError, StartupError
from tests.tiny import make_checkpoint
from training.commands.sweep import sweep as command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("sweep") / "tiny-sweep")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [("loops", "for i in"), ("tests", "assert"), ("loops", "while x")]
    text = "".join(json.dumps({"domain": domain, "prompt": prompt}) + "\n" for domain, prompt in lines)
    path.write_text(text, encoding="utf-8")
    return path


def request_for(*checkpoints: Path, prompts: Path, repeats: int = 2) -> Request:
    return Request(
        models=tuple(map(str, checkpoints)),
        exit_layers=(1, 3),
        draft_lengths=(1, 2),
        prompts=prompts,
        work=Work(24, Sampled(0.0, 1.0), repeats),
        threads=1,
        device="cpu",
    )


@dataclass(frozen=True, slots=True)
class Swept:
    """A tiny checkpoint and itself as twin, measured to the end, and the name of every trial in order."""

    sweep: Sweep
    trials: list[str]


@pytest.fixture(scope="module")
def swept(checkpoint: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    request = request_for(checkpoint, checkpoint, prompts=prompts)
    found = Swept(prepare(request, tmp_path_factory.mktemp("out")), [])
    found.sweep.run(found.trials.append)
    return found


def test_every_setting_is_measured_as_often_as_asked_and_gives_plain_decodings_text(swept: Swept):
    assert len(swept.trials) == swept.sweep.num_trials == 2 * 2 * 2 * 2 * (2 + 2)
    for found in swept.sweep.tables():
        assert [(r.domain, r.exit_layer, r.draft_length) for r in found.rows] == [
            (domain, layer, length) for domain in ("loops", "tests") for layer in (1, 3) for length in (1, 2)
        ]
        assert all(len(r.speed_ups) == 2 and min(r.speed_ups) > 0 for r in found.rows)
        assert sum(r.tokens_compared for r in found.rows) == 3 * 24 * 4 * 2
        assert sum(r.tokens_different for r in found.rows) == 0
        # A comparison of texts says something only where drafts were made, some kept and some refused.
        assert 0 < sum(r.kept for r in found.rows) < sum(r.drafted for r in found.rows)
        for r in found.rows:
            assert r.acceptance_rate == pytest.approx(r.kept / r.drafted)
            assert 1 <= r.tokens_per_cycle <= 1 + r.draft_length


def test_twin_is_measured_as_the_first_checkpoint_is(swept: Swept):
    first, second = swept.sweep.tables()
    assert (first.checkpoint, second.checkpoint) == ("tiny-sweep", "tiny-sweep (twin)")
    assert [(r.drafted, r.kept) for r in first.rows] == [(r.drafted, r.kept) for r in second.rows]


def test_plain_decoding_is_measured_directly_before_and_after_each_group(swept: Swept):
    groups = [swept.trials[start : start + 4] for start in range(0, len(swept.trials), 4)]
    names = [[trial.rpartition(", ")[2] for trial in group] for group in groups]
    forwards, backwards = names[: len(names) // 2], names[len(names) // 2 :]
    assert forwards[0] == ["γ=0", "E=1 γ=1", "E=1 γ=2", "γ=0"]
    assert backwards[0] == ["γ=0", "E=1 γ=2", "E=1 γ=1", "γ=0"]
    assert all(len({trial.rpartition(", ")[0] for trial in group}) == 1 for group in groups)


def test_row_divides_by_the_mean_of_the_plain_trials_around_and_counts_other_tokens():
    def cycle(drafted: int, kept: int) -> Step:
        draft_s = 0.1 * drafted
        return Step(
            draft_s, 0.3, 0.0, num_rows=1, drafted=drafted, kept=kept, emitted=1 + kept, is_decoding=True
        )

    plain = (Step(0.0, 0.4, 0.0, num_rows=1, drafted=0, kept=0, emitted=1, is_decoding=True),)
    trial = Trial(2.0, ((5, 6, 7, 8),), (cycle(2, 2), cycle(2, 0)))
    before, after = Trial(3.0, ((5, 6, 9, 9),), plain), Trial(5.0, ((5, 6, 9, 9),), plain)
    found = row_of(Setting("any", "tests", 1, 2), [Round(trial, before, after)])
    assert found.speed_up == 2.0
    assert (found.tokens_compared, found.tokens_different) == (4, 2)
    assert (found.tokens_per_s, found.plain_tokens_per_s) == (2.0, 1.0)
    assert (found.acceptance_rate, found.tokens_per_cycle) == (0.5, 2.0)
    # Two tokens a cycle, each worth a plain step of 0.4 s, for two drafts of 0.1 s and a pass of 0.3 s.
    assert found.predicted_speed_up == pytest.approx(2 * 0.4 / 0.5)


def test_interrupted_sweep_keeps_and_writes_whole_groups(checkpoint: Path, prompts: Path, tmp_path: Path):
    prepared = prepare(request_for(checkpoint, prompts=prompts), tmp_path / "out")
    seen: list[str] = []

    def interrupt_in_the_second_group(trial: str) -> None:
        seen.append(trial)
        if len(seen) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared.run(interrupt_in_the_second_group)
    assert [len(found.rows) for found in prepared.tables()] == [2]
    words = save(prepared, Circumstances("2030-01-31", {}, {}, is_complete=False), tmp_path / "out")
    assert "loops" in words
    assert json.loads((tmp_path / "out" / "sweep.json").read_text(encoding="utf-8"))["is_complete"] is False
    assert (tmp_path / "out" / "curves.png").stat().st_size > 0


def test_bundled_prompts_are_three_of_each_of_several_domains():
    found = read_prompts(BUNDLED_PROMPTS)
    assert len(found) >= 5
    assert {len(texts) for texts in found.values()} == {3}


@pytest.mark.parametrize(
    ("line", "message"),
    [("not json", "line 2"), ('{"domain": "a"}', "line 2"), ('{"domain": "a", "prompt": ""}', "line 2")],
)
def test_bad_line_of_prompts_is_named(tmp_path: Path, line: str, message: str):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"domain": "a", "prompt": "b"}\n' + line, encoding="utf-8")
    with pytest.raises(SettingsError, match=message):
        read_prompts(path)


def test_default_exit_layers_are_the_first_half_thinned_in_deep_checkpoints():
    assert default_exit_layers(16) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert default_exit_layers(2) == [1]
    deep = default_exit_layers(80)
    assert (deep[0], deep[-1], len(deep)) == (1, 40, 12)


def test_impossible_axes_are_refused_in_one_line():
    with pytest.raises(StartupError, match="1 to 15"):
        Axes.chosen((2, 16), (1,), num_layers=16)
    with pytest.raises(StartupError, match="1 to 10 can be measured with 24"):
        Work(24, Sampled(0.0, 1.0), 1).check((1, 11))


def test_unknown_device_is_refused_in_one_line(checkpoint: Path, prompts: Path, tmp_path: Path):
    asked = replace(request_for(checkpoint, prompts=prompts), device="gpu")
    with pytest.raises(SettingsError, match="pass auto, cpu, cuda"):
        prepare(asked, tmp_path / "out")


def test_twin_of_another_depth_is_refused(checkpoint: Path, prompts: Path, tmp_path: Path):
    other = make_checkpoint(tmp_path / "deeper", num_layers=5)
    with pytest.raises(SettingsError, match="5 layers, the first checkpoint 4"):
        prepare(request_for(checkpoint, other, prompts=prompts), tmp_path / "out")


def test_command_writes_tables_plots_and_profile(checkpoint: Path, prompts: Path, tmp_path: Path):
    app = Typer()
    app.command()(command)
    out = tmp_path / "found"
    flags = ["--model", str(checkpoint), "--prompts", str(prompts), "--out", str(out), "--new-tokens", "16"]
    flags += ["--exit-layers", "1,2,3", "--draft-lengths", "1,2", "--repeats", "1", "--threads", "1"]
    flags += ["--write-profile", "tiny-sweep", "--profile-dir", str(tmp_path / "profiles")]
    result = CliRunner().invoke(app, flags, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "best setting of each domain" in result.stdout
    assert "tokens compared, 0 different" in result.stdout
    document = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
    assert document["settings"]["domains"] == {"loops": 2, "tests": 1}
    assert str(tmp_path) not in json.dumps(document)
    with (out / "sweep.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == (2 + 1) * 3 * 2
    assert {line["domain"] for line in lines} == {"loops", "tests", ALL_DOMAINS}
    assert {path.name for path in out.glob("*.png")} == {"curves.png", "grid.png"}
    assert (tmp_path / "profiles" / "tiny-sweep.yaml").is_file()
