"""A training recipe: one YAML file that says everything a run depends on.

Knows keys, ranges and what contradicts what; knows no tensors and reads no data.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from config.errors import StartupError
from training.schedules import (
    Curriculum,
    ExitScale,
    OverTime,
    dropout_depth,
    dropout_time,
    exit_scale,
    exit_weights,
    gradual,
    learning_rate_factor,
    rotational,
)


class RecipeError(StartupError):
    """The recipe cannot be followed. One line: the key, what was got, what would do."""


class _Part(BaseModel, frozen=True, extra="forbid"):
    pass


class Architecture(_Part):
    """Sizes of a model made from scratch."""

    num_layers: int = Field(ge=2)
    model_width: int = Field(ge=8)
    num_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    head_width: int = Field(ge=2, multiple_of=2)
    mlp_width: int = Field(ge=8)
    max_positions: int = Field(default=1024, ge=8)
    rope_theta: float = Field(default=10_000.0, gt=0)
    is_head_tied: bool = False

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError("num_heads must be a multiple of num_kv_heads")
        return self


class Data(_Part):
    """What is read: `standard_library`, `package:NAME` of installed packages, or `files:GLOB`.

    `held_out` is the share of files that is never trained on; `vocab_size` that of the tokenizer made from the
    rest when a model is made from scratch; `own_texts` are for healing only.
    """

    sources: tuple[str, ...] = ("standard_library",)
    held_out: float = Field(default=0.03, gt=0, lt=0.5)
    vocab_size: int = Field(default=4096, ge=260)
    max_bytes: int | None = Field(default=None, ge=1)
    own_texts: OwnTexts | None = None


class OwnTexts(_Part):
    """Texts that the model to be healed writes itself before training: `count` of them, `num_tokens` long."""

    count: int = Field(ge=1)
    num_tokens: int = Field(default=256, ge=8)
    temperature: float = Field(default=0.8, gt=0)


class LayerDropout(_Part):
    """p_{l,t} = S(t) D(l) p_max, drawn for each sample of a batch."""

    p_max: float = Field(default=0.1, ge=0, lt=1)
    over_time: OverTime = OverTime.EXPONENTIAL


class EarlyExit(_Part):
    """The early-exit loss. `self_distillation` is the share of an early exit's target taken from the model's own
    last layer instead of from the text: what acceptance asks of an exit is agreement, not truth.
    `deepest` bounds the exits with a loss; unset, all have one.
    """

    e_scale: float = Field(default=0.2, ge=0)
    scale: ExitScale = ExitScale.DEPTH_SUM
    curriculum: Curriculum = Curriculum.ROTATIONAL
    rotation: int = Field(default=8, ge=1)
    deepest: int | None = Field(default=None, ge=1)
    self_distillation: float = Field(default=0.0, ge=0, le=1)


class Optimizer(_Part):
    """`muon` orthogonalises the updates of matrices inside layers and leaves the rest to AdamW."""

    name: str = Field(default="muon", pattern="^(muon|adamw)$")
    learning_rate: float = Field(default=2e-3, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    num_warmup: int = Field(default=100, ge=0)
    decay_share: float = Field(default=0.3, gt=0, le=1)
    max_gradient_norm: float = Field(default=1.0, gt=0)


class Stage(_Part):
    """Sequences of `sequence_tokens`, `micro_batch` at a time, until this share of all steps is done."""

    until: float = Field(gt=0, le=1)
    sequence_tokens: int = Field(ge=8)
    micro_batch: int = Field(ge=1)


class Lora(_Part):
    """Low-rank updates of the layers' matrices, merged when the checkpoint is written."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)


class Distillation(_Part):
    """Ties the last layer to the untouched model: this share of its target is what that model would say."""

    weight: float = Field(default=0.5, gt=0, le=1)


class Recipe(_Part):
    """Everything that decides what a run computes. Layers, steps and formulas as in `training.schedules`.

    Of what healing changed in the weights `kept_update` is kept: less gives up agreement of early layers for the
    quality of the last (weight averaging: Wortsman and others, arXiv 2109.01903).
    """

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    seed: int = Field(default=1, ge=0)
    num_steps: int = Field(ge=1)
    batch_tokens: int = Field(ge=1)
    stages: tuple[Stage, ...] = Field(min_length=1)
    data: Data = Data()
    architecture: Architecture | None = None
    layer_dropout: LayerDropout = LayerDropout()
    early_exit: EarlyExit = EarlyExit()
    optimizer: Optimizer = Optimizer()
    lora: Lora | None = None
    distillation: Distillation | None = None
    kept_update: float = Field(default=1.0, gt=0, le=1)
    compile_layers: bool = False

    @model_validator(mode="after")
    def _stages_cover_all_steps(self) -> Self:
        ends = [stage.until for stage in self.stages]
        if ends != sorted(ends) or ends[-1] != 1:
            raise ValueError("stages must have rising `until`, the last one 1")
        return self

    @classmethod
    def find(cls, name: str, *, num_steps: int | None = None) -> Self:
        """Read a recipe file, or the bundled recipe of that name. Raises RecipeError.

        `based_on` names another recipe, whose keys this one changes.
        """
        try:
            raw = _read_with_base(name)
            if num_steps is not None:
                raw["num_steps"] = num_steps
            return cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "as a whole"
            raise RecipeError(f"recipe {name}: {where}: {first['msg']}") from error
        except RecursionError as error:
            raise RecipeError(f"recipe {name}: based_on: goes round in a circle") from error

    def stage_at(self, step: int) -> Stage:
        """The stage that `step` belongs to."""
        return next(stage for stage in self.stages if step < stage.until * self.num_steps or stage.until == 1)

    def num_micro_batches(self, step: int) -> int:
        """Micro-batches that run before the weights move."""
        stage = self.stage_at(step)
        return max(1, round(self.batch_tokens / (stage.sequence_tokens * stage.micro_batch)))

    def dropout(self, layer: int, step: int, *, num_layers: int) -> float:
        """p_{l,t}: how likely a sample skips this layer at this step (equation 1)."""
        share = dropout_time(step, self.num_steps, self.layer_dropout.over_time)
        return share * dropout_depth(layer, num_layers) * self.layer_dropout.p_max

    def exit_weights(self, step: int, *, num_layers: int) -> Mapping[int, float]:
        """ẽ(t, l) of the layers whose exit has a loss at this step; they add up to 1."""
        wanted = self.early_exit

        def is_on(layer: int) -> bool:
            if wanted.deepest is not None and layer >= wanted.deepest:
                return False
            if wanted.curriculum is Curriculum.ROTATIONAL:
                return rotational(layer, step, wanted.rotation)
            if wanted.curriculum is Curriculum.GRADUAL:
                return gradual(layer, step, num_layers=num_layers, num_steps=self.num_steps)
            return True

        return exit_weights(
            num_layers, lambda layer: exit_scale(layer, num_layers, wanted.e_scale, wanted.scale), is_on
        )

    def learning_rate(self, step: int) -> float:
        """The learning rate of this step."""
        chosen = self.optimizer
        return chosen.learning_rate * learning_rate_factor(
            step, self.num_steps, num_warmup=chosen.num_warmup, decay_share=chosen.decay_share
        )


def _read_with_base(name: str) -> dict[str, object]:
    path = _find(name)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"recipe {path}: cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"recipe {path}: must be a mapping of keys to values")
    base = raw.pop("based_on", None)
    if base is None:
        return raw
    if not isinstance(base, str) or base == name:
        raise RecipeError(f"recipe {path}: based_on: must name another recipe, got {base!r}")
    return _changed(_read_with_base(base), raw)


def _find(name: str) -> Path:
    bundled = Path(__file__).parent / "recipes"
    for path in (Path(name), bundled / f"{name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in bundled.glob("*.yaml")))
    raise RecipeError(f"recipe {name}: no such file; bundled recipes: {known}")


def _changed(base: Mapping[str, object], changes: Mapping[str, object]) -> dict[str, object]:
    """`base` with keys replaced, those of its parts one by one."""
    whole = dict(base)
    for key, value in changes.items():
        old = whole.get(key)
        whole[key] = _changed(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return whole
