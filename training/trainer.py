"""Runs a recipe: batches, gradients, weights, and a state on disk from which a killed run goes on.

Knows one run; what a micro-batch costs and what the schedules say is decided elsewhere.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import LlamaForCausalLM

from training.corpus import Windows
from training.optimizers import make_optimizers, set_learning_rate
from training.recipe import Recipe, RecipeError
from training.stack import Batch, SkippingStack, Weighing, draw_runs

_STATE: Final = "state"
_MAY_CHANGE: Final = {"num_steps", "compile_layers", "kept_update"}
"""Keys that a run may be continued with other values of: they leave the arithmetic of its steps alone."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one step did: the cross-entropy of each exit that had a loss, by exit layer E."""

    number: int
    num_tokens: int
    loss: float
    loss_of_exit: Mapping[int, float]


class Trainer:
    """Follows a recipe from the step its folder stands at. `run` may be stopped anywhere and called again."""

    def __init__(
        self,
        recipe: Recipe,
        model: LlamaForCausalLM,
        windows: Windows,
        folder: Path,
        *,
        accelerator: Accelerator,
        teacher: LlamaForCausalLM | None = None,
    ) -> None:
        self.recipe = recipe
        for stage in recipe.stages:
            windows.check(stage.sequence_tokens)
        self._windows = windows
        self._folder = folder
        self._accelerator = accelerator
        self._teacher = teacher
        stack = SkippingStack(model, compiles=recipe.compile_layers)
        optimizers = make_optimizers(model, recipe.optimizer)
        self._stack, *self._optimizers = accelerator.prepare(stack, *optimizers)
        self._num_layers = stack.num_layers
        self.next_step = 0

    def run(self, *, until: int, on_step: Callable[[Step], None], save_every: int) -> None:
        """Train up to step `until`, saving every so many steps and at the end."""
        while self.next_step < until:
            on_step(self._step(self.next_step))
            self.next_step += 1
            if self.next_step % save_every == 0 or self.next_step == until:
                self.save()

    def save(self) -> None:
        """Write the state beside the old one, then put it in its place: a kill leaves one of the two whole."""
        fresh, state = self._folder / f"{_STATE}.fresh", self._folder / _STATE
        shutil.rmtree(fresh, ignore_errors=True)
        self._accelerator.save_state(str(fresh))
        about = {"next_step": self.next_step, "recipe": self.recipe.model_dump(mode="json")}
        (fresh / "run.json").write_text(json.dumps(about), encoding="utf-8")
        _replace(fresh, state)

    def resume(self) -> bool:
        """Take up the state in the folder, if there is one. Raises RecipeError if another recipe wrote it."""
        state = _whole_state(self._folder)
        if state is None:
            return False
        try:
            about = json.loads((state / "run.json").read_text(encoding="utf-8"))
            # Read as a recipe, so that keys which have come since have their defaults.
            theirs = Recipe.model_validate(about["recipe"])
        except ValueError as error:
            raise RecipeError(f"{state}: cannot be read; give another --out, or delete it") from error
        other = [
            key
            for key in Recipe.model_fields
            if key not in _MAY_CHANGE and getattr(self.recipe, key) != getattr(theirs, key)
        ]
        if other:
            raise RecipeError(
                f"{self._folder}: was begun with another {other[0]}; give another --out, or the first recipe"
            )
        self._accelerator.load_state(str(state))
        self.next_step = int(about["next_step"])
        return True

    def _step(self, step: int) -> Step:
        recipe, accelerator = self.recipe, self._accelerator
        stage = recipe.stage_at(step)
        num_micro = recipe.num_micro_batches(step)
        set_learning_rate(self._optimizers, recipe.learning_rate(step))
        exits = recipe.exit_weights(step, num_layers=self._num_layers)
        total, of_exit = 0.0, dict.fromkeys(exits, 0.0)
        self._stack.train()
        for micro in range(num_micro):
            losses = self._micro_batch(step, micro, exits, share=1 / num_micro)
            total += float(losses[0]) / num_micro
            for layer, entropy in losses[1].items():
                of_exit[layer] += float(entropy) / num_micro
        accelerator.clip_grad_norm_(self._stack.parameters(), recipe.optimizer.max_gradient_norm)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        num_tokens = num_micro * stage.micro_batch * stage.sequence_tokens
        return Step(step, num_tokens, total, {layer + 1: of_exit[layer] for layer in sorted(of_exit)})

    def _micro_batch(
        self, step: int, micro: int, exits: Mapping[int, float], *, share: float
    ) -> tuple[Tensor, Mapping[int, Tensor]]:
        batch = self._batch(step, micro)
        weighing = Weighing(
            exits,
            self_distillation=self.recipe.early_exit.self_distillation,
            teacher_share=self.recipe.distillation.weight if self.recipe.distillation else 0.0,
            teacher_BTV=self._teacher_logits(batch.ids_BT),
        )
        with self._accelerator.autocast():
            losses = self._stack(batch, weighing)
        self._accelerator.backward(losses.total * share)
        return losses.total.detach(), losses.of_exit

    def _batch(self, step: int, micro: int) -> Batch:
        """A micro-batch that depends on seed, step and place alone, so that no state of generators is saved."""
        recipe, device = self.recipe, self._accelerator.device
        stage = recipe.stage_at(step)
        first = (step * recipe.num_micro_batches(step) + micro) * stage.micro_batch
        ids = torch.from_numpy(
            self._windows.batch(first=first, count=stage.micro_batch, num_tokens=stage.sequence_tokens)
        ).to(device)
        dropout_L = [
            recipe.dropout(layer, step, num_layers=self._num_layers) for layer in range(self._num_layers)
        ]
        seed = int(np.random.SeedSequence((recipe.seed, step, first)).generate_state(1)[0])
        generator = torch.Generator().manual_seed(seed)
        runs_LB = draw_runs(dropout_L, stage.micro_batch, generator)
        return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), runs_LB.to(device))

    def _teacher_logits(self, ids_BT: Tensor) -> Tensor | None:
        if self._teacher is None:
            return None
        with torch.no_grad(), self._accelerator.autocast():
            logits_BTV: Tensor = self._teacher(input_ids=ids_BT, use_cache=False).logits
            return logits_BTV


def _replace(fresh: Path, state: Path) -> None:
    old = state.with_name(f"{state.name}.old")
    # Without a state, the old one is the only whole one until the fresh one has its place.
    if state.exists():
        shutil.rmtree(old, ignore_errors=True)
        state.rename(old)
    fresh.rename(state)
    shutil.rmtree(old, ignore_errors=True)


def _whole_state(folder: Path) -> Path | None:
    """The state, or the one before it if the run was killed while they changed places."""
    candidates = [folder / _STATE, folder / f"{_STATE}.old"]
    return next((path for path in candidates if (path / "run.json").is_file()), None)
