"""Healing of existing checkpoints, tiny ones, and the commands that do it."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import LlamaForCausalLM

from config.settings import EngineSettings
from decoding.checkpoint import CheckpointError
from decoding.engine import Engine
from tests.test_corpus import write_sources
from tests.tiny import make_checkpoint
from training.healing import _fingerprint, heal, write_own_texts
from training.recipe import EarlyExit, LayerDropout, Optimizer, OwnTexts, Recipe, RecipeError
from training.runs import RunOptions, TextSource

NUM_STEPS = 12


def make_recipe(sources_folder, **changes: object) -> dict[str, object]:
    data = write_sources(sources_folder).model_dump(mode="json")
    return {
        "name": "healed",
        "num_steps": NUM_STEPS,
        "batch_tokens": 128,
        "stages": [{"until": 1, "sequence_tokens": 32, "micro_batch": 4}],
        "data": data,
        "layer_dropout": LayerDropout(p_max=0.3, over_time="constant").model_dump(mode="json"),
        "early_exit": EarlyExit(e_scale=1.0, scale="uniform", rotation=2).model_dump(mode="json"),
        "optimizer": Optimizer(name="adamw", learning_rate=3e-3, num_warmup=2).model_dump(mode="json"),
        **changes,
    }


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "sources"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    "changes",
    [{}, {"lora": {"rank": 4, "alpha": 8.0}}, {"distillation": {"weight": 0.5}}],
    ids=["whole", "lora", "distilled"],
)
def test_healing_teaches_early_exits_and_writes_what_both_loaders_read(tmp_path, sources, changes):
    origin = make_checkpoint(tmp_path / "origin", num_layers=4)
    before = {path.name: path.read_bytes() for path in origin.iterdir()}
    recipe = Recipe.model_validate(make_recipe(sources, **changes))
    folder = heal(recipe, str(origin), RunOptions(tmp_path / "run", device="cpu"))
    report = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    assert min(report["after"]["loss_of_exit"]) < min(report["before"]["loss_of_exit"])
    assert report["after"]["loss_of_exit"][0] < report["before"]["loss_of_exit"][0]
    assert {path.name: path.read_bytes() for path in origin.iterdir()} == before
    model = LlamaForCausalLM.from_pretrained(folder)
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    Engine.load(EngineSettings(model=str(folder), max_model_len=64, num_blocks=8)).check_integrity()


def test_of_the_update_as_much_is_kept_as_the_recipe_says(tmp_path, sources):
    """Also by a run that has ended and is only written again."""
    origin = make_checkpoint(tmp_path / "origin", num_layers=4)
    options = RunOptions(tmp_path / "run", device="cpu")
    weights = []
    for share in (1.0, 0.25):
        recipe = Recipe.model_validate(make_recipe(sources, kept_update=share))
        model = LlamaForCausalLM.from_pretrained(heal(recipe, str(origin), options), dtype="float32")
        weights.append(dict(model.named_parameters()))
    untouched = dict(LlamaForCausalLM.from_pretrained(origin, dtype="float32").named_parameters())
    for name, whole in weights[0].items():
        expected = untouched[name] + 0.25 * (whole - untouched[name])
        assert torch.allclose(weights[1][name], expected, rtol=2e-2, atol=2e-3), name
    assert any(not torch.equal(whole, untouched[name]) for name, whole in weights[0].items())


def test_what_healing_writes_is_what_it_measured(tmp_path, sources):
    """The merged low-rank updates are in the file: evaluating the file gives the report's numbers, nearly."""
    origin = make_checkpoint(tmp_path / "origin", num_layers=4)
    recipe = Recipe.model_validate(make_recipe(sources, lora={"rank": 4, "alpha": 8.0}))
    folder = heal(recipe, str(origin), RunOptions(tmp_path / "run", device="cpu"))
    report = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    weights = [
        LlamaForCausalLM.from_pretrained(path).model.layers[1].mlp.up_proj.weight for path in (origin, folder)
    ]
    assert not torch.equal(*weights)
    from training.evaluation import evaluate
    from training.runs import held_out_windows, kept_texts

    texts = kept_texts(tmp_path / "run", TextSource(recipe.data, _fingerprint(origin)))
    assert texts is not None
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    again = evaluate(model, held_out_windows(texts), bytes_per_token=texts.bytes_per_token)
    assert again.as_json()["loss_of_exit"] == pytest.approx(report["after"]["loss_of_exit"], abs=0.05)


def test_own_texts_are_the_model_s_and_written_once(tmp_path):
    origin = make_checkpoint(tmp_path / "origin", num_layers=4)
    wanted = OwnTexts(count=3, num_tokens=20, temperature=1.0)
    settings = EngineSettings(model=str(origin), num_threads=1, draft_length=0)
    source = write_own_texts(settings, wanted, tmp_path / "texts", seed=1)
    texts = [path.read_text(encoding="utf-8") for path in source.paths]
    assert len(set(texts)) == 3
    source.paths[1].unlink()
    write_own_texts(settings, wanted, tmp_path / "texts", seed=1)
    assert [path.read_text(encoding="utf-8") for path in source.paths] == texts


def test_a_folder_keeps_to_the_model_and_the_data_it_was_begun_with(tmp_path, sources):
    models = [
        make_checkpoint(tmp_path / name, num_layers=4, seed=seed) for seed, name in enumerate(("a", "b"))
    ]
    options = RunOptions(tmp_path / "run", device="cpu", until=1)
    whole = make_recipe(sources)
    heal(Recipe.model_validate(whole), str(models[0]), options)
    with pytest.raises(RecipeError, match="another model"):
        heal(Recipe.model_validate(whole), str(models[1]), options)
    other = {**whole, "data": {**whole["data"], "held_out": 0.3}}
    with pytest.raises(RecipeError, match="other data"):
        heal(Recipe.model_validate(other), str(models[0]), options)


def test_a_healed_checkpoint_keeps_its_generation_defaults(tmp_path, sources):
    origin = make_checkpoint(tmp_path / "origin", num_layers=4)
    own = {"eos_token_id": [0, 5], "do_sample": True, "temperature": 0.6}
    (origin / "generation_config.json").write_text(json.dumps(own), encoding="utf-8")
    recipe = Recipe.model_validate(make_recipe(sources))
    folder = heal(recipe, str(origin), RunOptions(tmp_path / "run", device="cpu", until=1))
    assert json.loads((folder / "generation_config.json").read_text(encoding="utf-8")) == own


def test_low_rank_healing_that_is_stopped_ends_as_one_that_was_not(tmp_path, sources):
    origin = make_checkpoint(tmp_path / "origin", num_layers=4)
    recipe = Recipe.model_validate(make_recipe(sources, lora={"rank": 4, "alpha": 8.0}))
    heal(recipe, str(origin), RunOptions(tmp_path / "parts", device="cpu", until=5))
    folders = [
        heal(recipe, str(origin), RunOptions(tmp_path / name, device="cpu")) for name in ("parts", "whole")
    ]
    parts, whole = (LlamaForCausalLM.from_pretrained(folder).state_dict() for folder in folders)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_what_cannot_be_healed_is_refused(tmp_path, sources):
    architecture = {
        "num_layers": 2, "model_width": 8, "num_heads": 1, "num_kv_heads": 1, "head_width": 8, "mlp_width": 8
    }  # fmt: skip
    options = RunOptions(tmp_path / "run", device="cpu")
    with pytest.raises(RecipeError, match="architecture"):
        heal(Recipe.model_validate(make_recipe(sources, architecture=architecture)), "x", options)
    with pytest.raises(CheckpointError, match="no such folder"):
        heal(Recipe.model_validate(make_recipe(sources)), str(tmp_path / "nowhere"), options)


def _command(recipe, out) -> list[str]:
    return [
        sys.executable,
        "-m",
        "server",
        "train",
        str(recipe),
        "--out",
        str(out),
        "--save-every",
        "3",
        "--device",
        "cpu",
    ]


@pytest.mark.slow
def test_a_training_process_killed_at_random_goes_on_with_the_same_losses(tmp_path, sources):
    """Tolerance: none. Batches and dropout depend on the step alone, and one machine adds up alike."""
    architecture = {
        "num_layers": 4, "model_width": 32, "num_heads": 2, "num_kv_heads": 1, "head_width": 16, "mlp_width": 64
    }  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    whole = {**make_recipe(sources, architecture=architecture), "num_steps": 100}
    whole["data"]["vocab_size"] = 300
    recipe.write_text(json.dumps(whole), encoding="utf-8")
    subprocess.run(_command(recipe, tmp_path / "whole"), check=True, capture_output=True)
    unbroken = (tmp_path / "whole" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    chance = random.Random(20240416)
    for _ in range(2):
        process = subprocess.Popen(
            _command(recipe, tmp_path / "parts"), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        log = tmp_path / "parts" / "log.jsonl"
        goal = chance.randrange(5, 40) + (len(log.read_text().splitlines()) if log.is_file() else 0)
        while process.poll() is None and not (log.is_file() and len(log.read_text().splitlines()) >= goal):
            time.sleep(0.005)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(_command(recipe, tmp_path / "parts"), check=True, capture_output=True)
    broken = (tmp_path / "parts" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [_loss(line) for line in broken] == [_loss(line) for line in unbroken]
    assert len(unbroken) == 100


def test_a_bad_recipe_is_one_line_on_the_terminal(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "server", "train", str(tmp_path / "no.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("layerskip: recipe")
    assert done.stderr.count("\n") == 1
    assert "python-8m" in done.stderr


def _loss(line: str) -> tuple[int, float, dict[str, float]]:
    step = json.loads(line)
    return step["number"], step["loss"], step["loss_of_exit"]
