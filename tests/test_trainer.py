"""Whole steps: ordinary training as the special case, and runs that go on where they stopped."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import LlamaConfig, LlamaForCausalLM

from training.corpus import Windows
from training.recipe import EarlyExit, LayerDropout, Optimizer, Recipe, RecipeError, Stage
from training.trainer import Trainer

NUM_STEPS = 6


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps number format and device for a whole process; each test chooses its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def make_model(*, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def make_recipe(**changes: object) -> Recipe:
    whole: dict[str, object] = {
        "name": "r",
        "num_steps": NUM_STEPS,
        "batch_tokens": 128,
        "stages": [
            Stage(until=0.5, sequence_tokens=16, micro_batch=4),
            Stage(until=1, sequence_tokens=32, micro_batch=2),
        ],
        "layer_dropout": LayerDropout(p_max=0.6),
        "early_exit": EarlyExit(e_scale=1.0, rotation=2, self_distillation=0.5),
        "optimizer": Optimizer(num_warmup=2),
    }
    return Recipe.model_validate({**whole, **changes})


def make_windows() -> Windows:
    return Windows(np.random.default_rng(1).integers(96, size=2000).astype(np.uint32), seed=1)


def make_trainer(recipe: Recipe, folder, *, tied: bool = False) -> tuple[Trainer, LlamaForCausalLM]:
    model = make_model(tied=tied)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    return Trainer(recipe, model, make_windows(), folder, accelerator=accelerator), model


def losses_of(recipe: Recipe, folder, *, until: int = NUM_STEPS, tied: bool = False) -> list[float]:
    trainer, _ = make_trainer(recipe, folder, tied=tied)
    trainer.resume()
    losses: list[float] = []
    trainer.run(until=until, on_step=lambda step: losses.append(step.loss), save_every=100)
    return losses


def test_without_dropout_and_exit_loss_training_is_ordinary_training_bit_for_bit(tmp_path):
    recipe = make_recipe(
        layer_dropout=LayerDropout(p_max=0.0),
        early_exit=EarlyExit(e_scale=0.0),
        optimizer=Optimizer(name="adamw", learning_rate=1e-2, num_warmup=0, decay_share=1e-9),
        stages=[Stage(until=1, sequence_tokens=16, micro_batch=8)],
    )
    trainer, model = make_trainer(recipe, tmp_path)
    trainer.run(until=3, on_step=lambda _step: None, save_every=100)

    ordinary, windows = make_model(), make_windows()
    is_inner = {name: p.ndim == 2 and "layers" in name for name, p in ordinary.named_parameters()}
    groups = [
        {
            "params": [p for name, p in ordinary.named_parameters() if is_inner[name] is inner],
            "weight_decay": decay,
        }
        for inner, decay in ((True, 0.1), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for step in range(3):
        ids = torch.from_numpy(windows.batch(first=step * 8, count=8, num_tokens=16))
        logits = ordinary(input_ids=ids[:, :-1], use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(ordinary.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for (name, ours), theirs in zip(model.named_parameters(), ordinary.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    # The comparison can fail: with the recipe's losses the same steps end elsewhere.
    other, moved = make_trainer(
        recipe.model_copy(update={"early_exit": EarlyExit(e_scale=1.0)}), tmp_path / "b"
    )
    other.run(until=3, on_step=lambda _step: None, save_every=100)
    assert not torch.equal(
        moved.model.layers[0].mlp.up_proj.weight, ordinary.model.layers[0].mlp.up_proj.weight
    )


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_run_that_is_stopped_and_resumed_has_the_losses_of_one_that_was_not(tmp_path, name, tied, stop):
    recipe = make_recipe(optimizer=Optimizer(name=name, num_warmup=2))
    whole = losses_of(recipe, tmp_path / "whole", tied=tied)
    assert len(set(whole)) == NUM_STEPS
    first = losses_of(recipe, tmp_path / "parts", until=stop, tied=tied)
    rest = losses_of(recipe, tmp_path / "parts", tied=tied)
    assert first + rest == whole


def test_a_state_that_a_kill_left_half_written_is_not_taken_up(tmp_path):
    recipe = make_recipe()
    whole = losses_of(recipe, tmp_path / "whole")
    losses_of(recipe, tmp_path / "parts", until=2)
    # Killed while the fresh state was being written, and again between the two renames.
    (tmp_path / "parts" / "state.fresh").mkdir()
    (tmp_path / "parts" / "state").rename(tmp_path / "parts" / "state.old")
    losses_of(recipe, tmp_path / "parts", until=3)
    assert not (tmp_path / "parts" / "state.fresh").exists()
    # Killed a second time where only the old state and a fresh one are there.
    (tmp_path / "parts" / "state").rename(tmp_path / "parts" / "state.old")
    trainer, _ = make_trainer(recipe, tmp_path / "parts")
    assert trainer.resume()
    assert losses_of(recipe, tmp_path / "parts") == whole[3:]


def test_a_run_may_be_prolonged_but_not_continued_with_another_recipe(tmp_path):
    losses_of(make_recipe(), tmp_path, until=2)
    with pytest.raises(RecipeError, match="layer_dropout"):
        losses_of(make_recipe(layer_dropout=LayerDropout(p_max=0.1)), tmp_path)
    longer, _ = make_trainer(make_recipe(num_steps=50), tmp_path)
    assert longer.resume()
    assert longer.next_step == 2


def test_micro_batches_add_up_to_the_batch(tmp_path):
    whole = make_recipe(
        layer_dropout=LayerDropout(p_max=0.0),
        early_exit=EarlyExit(e_scale=0.0),
        stages=[Stage(until=1, sequence_tokens=16, micro_batch=8)],
    )
    halves = whole.model_copy(update={"stages": (Stage(until=1, sequence_tokens=16, micro_batch=4),)})
    assert losses_of(halves, tmp_path / "a") == pytest.approx(losses_of(whole, tmp_path / "b"), abs=1e-4)


def test_training_learns_a_text_that_can_be_learned(tmp_path):
    recipe = make_recipe(num_steps=40, optimizer=Optimizer(learning_rate=2e-2, num_warmup=2))
    model = make_model()
    ids = np.tile(np.arange(32, dtype=np.uint32), 60)
    trainer = Trainer(
        recipe, model, Windows(ids, seed=1), tmp_path, accelerator=Accelerator(cpu=True, mixed_precision="no")
    )
    seen: dict[int, float] = {}
    trainer.run(until=40, on_step=lambda step: seen.update(step.loss_of_exit), save_every=100)
    assert seen[4] < 0.5
    # The first exit weighs nothing in the paper's scale: its depth is 0.
    assert set(seen) == {2, 3, 4}
