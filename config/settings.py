"""What the operator may choose, in one model: flags, environment, YAML file and table derive from it.

Knows ranges and precedence; knows nothing of what a checkpoint allows. The only reader of the environment.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from config.errors import SettingsError
from config.server_settings import ServerSettings
from config.setting_sources import (
    ENV_PREFIX,
    as_settings_error,
    read_yaml,
    refuse_unknown,
    refuse_unknown_variables,
    under_one_name,
)
from config.setting_types import (
    COMMA_LIST,
    AttentionKind,
    ExitPolicy,
    Loader,
    LoadFormat,
    ModelNames,
)

DEFAULT_MEMORY_FRACTION: Final = 0.9
BUNDLED_CHECKPOINT: Final = Path(__file__).parent / "checkpoints" / "python-8m"


class Dtype(StrEnum):
    """Number format of weights and KV cache; `auto` is the checkpoint's on CUDA and float32 on CPU."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT64 = "float64"


class EngineSettings(BaseModel, frozen=True, extra="forbid"):
    """What the worker needs to load a checkpoint and decode; travels to it as JSON."""

    model: str = Field(
        default=str(BUNDLED_CHECKPOINT), min_length=1, description="Checkpoint folder or hub id to serve."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub checkpoint.")
    dtype: Dtype = Field(default=Dtype.AUTO, description="Number format of weights and KV cache.")
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N."
    )
    loader: Loader = Field(default=Loader.SAFETENSORS, description="How weights reach the device.")
    load_format: LoadFormat = Field(
        default=LoadFormat.AUTO,
        description="auto reads the checkpoint's weights; dummy draws others, to measure speed alone.",
    )
    dummy_scale: float = Field(
        default=1.0,
        ge=0,
        description="Scales what dummy layers behind the first allowed exit layer add; near 0, drafts are kept.",
    )
    attention: AttentionKind = Field(
        default=AttentionKind.AUTO,
        description="What computes attention: triton, its kernels; gather, any device; "
        "auto, triton on CUDA and gather elsewhere.",
    )
    max_model_len: int | None = Field(
        default=None, ge=2, description="Longest prompt plus answer, in tokens; unset: the checkpoint's."
    )
    max_num_seqs: int = Field(default=64, ge=1, le=4096, description="Sequences decoded together at most.")
    max_num_batched_tokens: int = Field(
        default=512, ge=1, description="Tokens computed in one step at most: prompts, next tokens, drafts."
    )
    block_size: int = Field(default=16, ge=1, le=1024, description="Tokens in one block of the KV cache.")
    num_blocks: int | None = Field(
        default=None, ge=1, description="Blocks of the KV cache; unset: sized from free memory."
    )
    allowed_exit_layers: Annotated[tuple[Annotated[int, Field(ge=1)], ...] | None, *COMMA_LIST] = Field(
        default=None, description="Exit layers a request may ask for, comma-separated; unset: all."
    )
    exit_layer: int | None = Field(
        default=None,
        ge=1,
        description="Exit layer of requests that name none; unset: from the checkpoint's profile.",
    )
    draft_length: int | None = Field(
        default=None, ge=0, description="Draft length of requests that name none; unset: from the profile."
    )
    drafter: Literal["early_exit", "lookup", "hybrid", "model", "none"] = Field(
        default="early_exit", description="Who drafts for requests that do not say."
    )
    mixed_exit_layers: ExitPolicy = Field(
        default=ExitPolicy.EXACT,
        description="When requests of one step ask for different exit layers: exact, each drafts at its own; "
        "promote, all draft at the most promising of those.",
    )
    draft_model: str | None = Field(
        default=None,
        min_length=1,
        description="Checkpoint of a separate draft model with the same tokenizer, for drafter `model`.",
    )
    draft_vocab_size: int | None = Field(
        default=None,
        ge=1,
        description="Early exits draft among so many tokens, those seen lately, which saves time where the "
        "vocabulary is large; unset: all, or with compiled layers an eighth, 1024 to 8192.",
    )
    max_draft_length: int = Field(default=16, ge=0, le=64, description="Longest draft a request may ask for.")
    num_threads: int | None = Field(
        default=None,
        ge=1,
        description="CPU threads of a worker; unset: all cores but one, divided among the workers.",
    )
    tensor_parallel_size: int = Field(
        default=1, ge=1, description="GPUs that one model is spread over, each with a share of every layer."
    )
    compile_layers: bool | Literal["auto"] = Field(
        default="auto",
        description="On a CPU, compile the layers' code for it at the first start; it runs on one thread, several "
        "times as fast for a small model. auto: where there is a C++ compiler, and one thread or a small model.",
    )
    enforce_eager: bool = Field(
        default=False, description="On CUDA, run every step eagerly instead of replaying CUDA graphs."
    )
    memory_fraction: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Share of an accelerator's memory for one worker; unset: 0.9, divided among the workers.",
    )
    gpu_memory_utilization: float | None = Field(
        default=None, gt=0, le=1, description="The same under vLLM's name."
    )

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, values: object) -> object:
        return under_one_name(values, "memory_fraction", alias="gpu_memory_utilization")


class ModelChoice(EngineSettings):
    """One of several checkpoints; only what is given differs from what is chosen for all."""

    model: str = Field(min_length=1)
    served_model_name: ModelNames | None = None
    chat_template: Path | None = None

    @property
    def given(self) -> dict[str, object]:
        """What was chosen for this one alone."""
        return {name: getattr(self, name) for name in self.model_fields_set}


def _as_choice(value: object) -> object:
    return {"model": value} if isinstance(value, str) else value


class Settings(ServerSettings, EngineSettings, BaseSettings):
    """Everything the operator chose. Precedence: flags, then environment, then YAML file, then defaults."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_ignore_empty=True, extra="forbid", frozen=True, hide_input_in_errors=True
    )

    config: Path | None = Field(default=None, description="YAML file with settings.")
    models: Annotated[tuple[Annotated[ModelChoice, BeforeValidator(_as_choice)], ...] | None, *COMMA_LIST] = (
        Field(
            default=None,
            min_length=1,
            description="Checkpoints to serve together, one worker each; in the YAML file with own settings.",
        )
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """Refuse what would leave open which checkpoint is meant."""
        if self.models is None:
            return self
        if "model" in self.model_fields_set:
            raise SettingsError(f"model {self.model}: `models` lists others; give one of the two")
        taken = Counter(name for each in self.per_model() for name in each.model_names)
        name, times = taken.most_common(1)[0]
        if times > 1:
            remedy = "give each a served_model_name in the YAML file's `models`"
            raise SettingsError(f"models: {times} checkpoints would answer to {name}: {remedy}")
        return self

    def per_model(self) -> tuple[Self, ...]:
        """What is chosen for each checkpoint: its own settings before those for all, a share of the machine."""
        if self.models is None:
            return (self,)
        shares = self._shares(len(self.models))
        return tuple(self.model_copy(update={"models": None} | shares | each.given) for each in self.models)

    def _shares(self, num_workers: int) -> dict[str, object]:
        """Threads and memory of one worker of several, where the operator left them open."""
        shares: dict[str, object] = {
            "num_threads": max(1, default_num_threads() // num_workers),
            "memory_fraction": DEFAULT_MEMORY_FRACTION / num_workers,
        }
        return {name: share for name, share in shares.items() if getattr(self, name) is None}

    @property
    def engine(self) -> EngineSettings:
        """The part that travels to the worker."""
        return EngineSettings.model_validate(self.model_dump(include=set(EngineSettings.model_fields)))

    @property
    def model_name(self) -> str:
        """The name of the model in answers and metrics."""
        return self.model_names[0]

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names requests may use: the chosen ones, else the folder's, else the hub id."""
        if self.served_model_name:
            return self.served_model_name
        return (Path(self.model).resolve().name if Path(self.model).is_dir() else self.model,)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags arrive as constructor arguments; dotenv files and secret folders are not read."""
        chosen = init_settings().get("config") or env_settings().get("config")
        file = InitSettingsSource(
            settings_cls,
            read_yaml(Path(chosen), settings_cls.model_fields.keys() - {"config"}) if chosen else {},
        )
        return init_settings, env_settings, file

    @classmethod
    def load(cls, flags: Mapping[str, object]) -> Self:
        """Combine `flags` (by field name, only those given) with the other sources. Raises SettingsError."""
        refuse_unknown_variables(os.environ, cls.model_fields)
        for key in flags:
            refuse_unknown(key, cls.model_fields, "flag")
        try:
            return cls(**dict(flags))  # type: ignore[arg-type]
        except ValidationError as error:
            raise as_settings_error(error) from error


def default_num_threads() -> int:
    """All cores but one, which is left to the API process: threads that wait for a core cost milliseconds."""
    return max(1, len(os.sched_getaffinity(0)) - 1)
