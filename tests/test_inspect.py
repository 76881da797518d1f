"""`inspect` shows what the model computes: every row against transformers, the last against the engine."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from config.errors import StartupError
from config.settings import EngineSettings
from decoding.checkpoint import open_checkpoint
from decoding.engine import Engine
from decoding.messages import Generate, SamplingParams
from tests.tiny import load_reference, make_checkpoint
from training.commands.inspect import PageError, inspect
from training.lens import Lens, PromptError, Reading

NUM_LAYERS = 4
PROMPT = "def f(x):"


def settings_for(folder: Path) -> EngineSettings:
    return EngineSettings(model=str(folder), dtype="float64", device="cpu", num_threads=1, max_num_seqs=1)


def load_lens(folder: Path) -> Lens:
    return Lens.load(settings_for(folder))


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), num_layers=NUM_LAYERS, tied=request.param)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("untied"), num_layers=NUM_LAYERS)


def random_ids(count: int) -> list[int]:
    return torch.randint(0, 97, (count,), generator=torch.Generator().manual_seed(3)).tolist()


def expected_logits(folder: Path, ids: list[int], *, is_raw: bool) -> Iterator[torch.Tensor]:
    """Every entry of transformers' hidden states through its norm and head; its last is already normalised."""
    reference = load_reference(folder, torch.float64)
    with torch.inference_mode():
        states = reference(torch.tensor([ids]), output_hidden_states=True).hidden_states
        for row, hidden_BND in enumerate(states):
            is_normed = is_raw or row == NUM_LAYERS
            yield reference.lm_head(hidden_BND if is_normed else reference.model.norm(hidden_BND))[0]


@pytest.mark.parametrize("is_raw", [False, True], ids=["normed", "raw"])
@torch.inference_mode()
def test_every_row_is_what_transformers_gives(folder: Path, is_raw: bool) -> None:
    """At 150 positions, more than are put through the head together."""
    lens, ids = load_lens(folder), random_ids(150)
    reading = lens.read(ids, is_raw=is_raw)
    rows = list(lens.rows(ids))
    assert len(rows) == reading.num_layers + 1 == NUM_LAYERS + 1
    for row, expected_NV in enumerate(expected_logits(folder, ids, is_raw=is_raw)):
        assert expected_NV.std() > 0.5
        assert (lens.logits(rows[row], row, is_raw=is_raw) - expected_NV).abs().max() < 1e-9
        best = expected_NV.softmax(-1).topk(5)
        assert np.array_equal(reading.guesses_RNK[row], best.indices.numpy())
        assert np.abs(reading.probabilities_RNK[row] - best.values.numpy()).max() < 1e-9


@torch.inference_mode()
def test_rows_but_the_last_differ_without_the_norm(untied: Path) -> None:
    """The control: were the norm always applied, or never, the test above could not tell."""
    lens, ids = load_lens(untied), random_ids(20)
    for row, hidden_ND in enumerate(lens.rows(ids)):
        change_NV = lens.logits(hidden_ND, row, is_raw=True) - lens.logits(hidden_ND, row, is_raw=False)
        assert (change_NV.abs().max() > 0.1) == (row < NUM_LAYERS)


@pytest.mark.parametrize("is_raw", [False, True], ids=["normed", "raw"])
def test_the_last_row_is_what_the_engine_generates(folder: Path, is_raw: bool) -> None:
    """Whatever the exit layer and the draft length; drafts are made, and some refused."""
    engine = Engine.load(settings_for(folder))
    lens = Lens(engine, open_checkpoint(str(folder), revision=None))
    prompt = random_ids(9)
    for exit_layer, draft_length in [(1, 2), (2, 4), (3, 3), (1, 0)]:
        request = Generate(
            sequence_id=0,
            prompt_ids=prompt,
            max_new_tokens=24,
            sampling=SamplingParams(temperature=0.0),
            seed=0,
            stop_token_ids=[],
            exit_layer=exit_layer,
            draft_length=draft_length,
        )
        events = engine.generate([request])[0]
        drafted, kept = sum(event.drafted for event in events), sum(event.kept for event in events)
        assert drafted == kept == 0 if draft_length == 0 else kept < drafted
        generated = [token for event in events for token in event.token_ids]
        reading = lens.read(prompt + generated[:-1], is_raw=is_raw)
        assert reading.top_RN[-1, len(prompt) - 1 :].tolist() == generated
        assert reading.top_RN[1, len(prompt) - 1 :].tolist() != generated
        continued = lens.continue_greedily(prompt, 24, exit_layer=exit_layer, draft_length=draft_length)
        assert continued == generated[: len(continued)]


def test_reading_leaves_the_engines_cache_alone(untied: Path) -> None:
    """The prompt's blocks are shared by the second run: they must hold what the first stored."""
    lens, prompt = load_lens(untied), random_ids(40)
    first = lens.continue_greedily(prompt, 12)
    lens.read(list(reversed(prompt)), is_raw=False)
    assert lens.continue_greedily(prompt, 12) == first
    assert len(set(first)) > 1


def test_an_inspection_covers_prompt_and_continuation(untied: Path) -> None:
    seen = load_lens(untied).inspect(PROMPT, name="tiny", num_new_tokens=6, is_raw=False)
    assert seen.num_prompt_tokens == len(PROMPT)
    assert seen.reading.ids_N.tolist()[len(PROMPT) :] == list(seen.generated[:-1])
    assert "".join(map(seen.texts, seen.reading.ids_N[: len(PROMPT)].tolist())) == "def·f(x):"


def test_positions_settle_where_the_top_token_stays() -> None:
    """By hand: at once, in the middle after a false start, only at the output, and from row 1 on."""
    top_RN = np.array([[7, 5, 1, 2], [7, 3, 9, 4], [7, 5, 1, 4], [7, 5, 9, 4]])
    reading = Reading(
        ids_N=np.zeros(4, dtype=np.int64),
        guesses_RNK=top_RN[:, :, None],
        probabilities_RNK=np.ones((4, 4, 1)),
        is_raw=False,
    )
    assert reading.settled_N.tolist() == [0, 2, 3, 1]
    assert reading.settled_share_R.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert reading.mean_settling_layer == 1.5


def test_layers_that_add_nothing_change_no_token(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, num_layers=NUM_LAYERS, transparent_from=2)
    reading = load_lens(tmp_path).read(random_ids(60), is_raw=False)
    assert reading.settled_N.max() == 2
    assert reading.settled_share_R[1] < 1 == reading.settled_share_R[2]


def test_among_equal_tokens_the_first_leads_as_in_the_engine(tmp_path: Path) -> None:
    """Every logit is equal where the head is zero."""
    from safetensors.torch import load_file, save_file

    make_checkpoint(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"].zero_()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    lens = load_lens(tmp_path)
    assert (lens.read(random_ids(9), is_raw=False).top_RN == 0).all()
    assert lens.continue_greedily([5], 3) == [0]


def run(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(inspect)
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_the_command_prints_compares_and_writes_a_page(folder: Path, untied: Path, tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    models = ("--model", str(folder), "--compare", str(untied))
    output = run(PROMPT, *models, "--new-tokens", "3", "--raw", "--html", str(target), "--dtype", "float64")
    assert f"{folder.name}: 3 of 3 generated tokens agree" in output
    assert "no final norm" in output
    assert target.read_text(encoding="utf-8").count('<table class="lens">') == 2


def test_folders_of_the_same_name_are_told_apart(untied: Path, tmp_path: Path) -> None:
    for parent in ("one", "two"):
        (tmp_path / parent).mkdir()
        (tmp_path / parent / "final").symlink_to(untied)
    chosen = [str(tmp_path / parent / "final") for parent in ("one", "two")]
    output = run(PROMPT, "-m", chosen[0], "-m", chosen[1], "--new-tokens", "0")
    # Where lines are wrapped depends on how long the folder's name is.
    assert all(f"{name}:" in "".join(output.split()) for name in chosen)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("",), "the prompt is empty"),
        (("x" * 500, "--new-tokens", "13"), "500 tokens of prompt and 13 new ones exceed the 512"),
        (("x", "--html", "no/such/folder/page.html"), "there is no folder no/such/folder"),
        (("x", "--dtype", "float8"), "dtype"),
        (("x", "--device", "tpu"), "device"),
    ],
)
def test_the_operators_faults_are_one_line(untied: Path, arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(StartupError, match=re.escape(words)) as raised:
        run(*arguments, "--model", str(untied))
    assert "\n" not in str(raised.value)


def test_text_that_is_no_utf8_is_refused(untied: Path) -> None:
    with pytest.raises(PromptError, match="UTF-8"):
        load_lens(untied).encode("\udc80", num_new_tokens=0)


def test_a_page_that_cannot_be_written_is_refused(untied: Path, tmp_path: Path) -> None:
    with pytest.raises(PageError, match="cannot be written"):
        run("x", "--model", str(untied), "--new-tokens", "0", "--html", str(tmp_path))


def test_the_command_line_imports_no_torch_to_know_the_command() -> None:
    program = (
        "import training.commands.inspect, sys; sys.exit(bool({'torch', 'rich.console'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
