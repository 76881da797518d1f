"""Finds a checkpoint and says what it is: configuration, generation defaults, tokenizer.

Knows files and hub ids; tensors are read in `weights`. Nothing of a checkpoint is ever executed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from config.errors import StartupError
from decoding.messages import SamplingParams, TextAssets

_HUB_SILENCE_S: Final = 10.0
_NEEDED_FILES: Final = ["*.json", "*.safetensors", "*.jinja"]
_SUPPORTED: Final = (
    "a Llama-architecture checkpoint (Llama 2, Llama 3, Code Llama, SmolLM2, facebook/layerskip-*)"
)


class CheckpointError(StartupError):
    """The checkpoint cannot be served. The message is one line: what is wrong, where, and what would do."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a Llama decoder. `max_positions` is the longest context it was made for."""

    num_layers: int
    model_width: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    mlp_width: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    is_head_tied: bool
    stored_dtype: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint folder that has been looked at but not read: `config` is transformers' LlamaConfig."""

    folder: Path
    config: object
    shape: ModelShape


def open_checkpoint(model: str, *, revision: str | None) -> Checkpoint:
    """Resolve a folder or hub id and check that it is one we serve. Raises CheckpointError."""
    folder = _find_folder(model, revision)
    config = _llama_config(folder / "config.json", _read_config(folder))
    return Checkpoint(folder=folder, config=config, shape=_shape(config, folder / "config.json"))


def sampling_defaults(checkpoint: Checkpoint) -> SamplingParams:
    """The checkpoint's own sampling parameters; OpenAI's neutral ones where it names none.

    A generation config without `do_sample` describes greedy `generate()` calls, not a wish of the model's
    authors, so it leaves the neutral values.
    """
    raw = _read_json(checkpoint.folder / "generation_config.json")
    if not raw.get("do_sample"):
        return SamplingParams()
    neutral = SamplingParams()
    return SamplingParams(
        temperature=_number(raw.get("temperature"), neutral.temperature),
        top_k=round(_number(raw.get("top_k"), neutral.top_k)),
        top_p=_number(raw.get("top_p"), neutral.top_p),
        min_p=_number(raw.get("min_p"), neutral.min_p),
    )


def text_assets(checkpoint: Checkpoint) -> TextAssets:
    """The tokenizer in the portable form that the API process loads. Raises CheckpointError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
        portable = tokenizer.backend_tokenizer.to_str()
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{checkpoint.folder}: no usable tokenizer: {_first_line(error)}") from error
    return TextAssets(
        tokenizer_json=portable,
        eos_token_ids=_eos_token_ids(checkpoint, tokenizer.eos_token_id),
        special_token_ids=sorted(tokenizer.all_special_ids),
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def _eos_token_ids(checkpoint: Checkpoint, tokenizer_eos: int | None) -> list[int]:
    """Those that this model can say: a tokenizer may have ids that the model has not."""
    raw = _read_json(checkpoint.folder / "generation_config.json").get("eos_token_id")
    listed = raw if isinstance(raw, list) else [raw]
    named = {i for i in (*listed, tokenizer_eos) if isinstance(i, int)}
    return sorted(i for i in named if 0 <= i < checkpoint.shape.vocab_size)


def _find_folder(model: str, revision: str | None) -> Path:
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise CheckpointError(
            f"{model}: no such folder; pass a checkpoint folder or a hub id like owner/name"
        )
    return _download(model, revision)


def _download(model: str, revision: str | None) -> Path:
    import httpx2
    from huggingface_hub import get_session, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    # By default the hub's client waits for ever for a hub that accepts the connection and says nothing.
    get_session().timeout = _HUB_SILENCE_S
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_NEEDED_FILES))
    except GatedRepoError as error:
        remedy = "accept its licence on its hub page and set HF_TOKEN, or pass a folder"
        raise CheckpointError(f"{model}: the repository is gated; {remedy}") from error
    except RevisionNotFoundError as error:
        remedy = "pass an existing branch, tag or commit with --revision"
        raise CheckpointError(f"{model}: there is no revision {revision!r}; {remedy}") from error
    except RepositoryNotFoundError as error:
        remedy = "check the name, set HF_TOKEN if it is private, or pass a folder"
        raise CheckpointError(f"{model}: no such repository on the hub; {remedy}") from error
    except (OSError, ValueError, RuntimeError, httpx2.HTTPError) as error:
        remedy = "pass the path of a downloaded checkpoint folder, or start where the hub can be reached"
        raise CheckpointError(
            f"{model}: not in the local cache and the hub cannot be reached; {remedy}"
        ) from error


def _read_config(folder: Path) -> dict[str, object]:
    path = folder / "config.json"
    raw = _read_json(path)
    if not raw:
        raise CheckpointError(
            f"{path}: missing or empty; pass a folder with config.json and safetensors files"
        )
    if "auto_map" in raw:
        raise CheckpointError(
            f"{path}: auto_map asks to run the repository's code, which is never done; pass {_SUPPORTED}"
        )
    if raw.get("model_type") != "llama":
        found = raw.get("model_type") or raw.get("architectures")
        raise CheckpointError(f"{path}: architecture {found!r} is not supported; pass {_SUPPORTED}")
    for key in ("attention_bias", "mlp_bias", "quantization_config"):
        if raw.get(key):
            raise CheckpointError(f"{path}: {key} is not supported; pass {_SUPPORTED}")
    if raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{path}: hidden_act {raw['hidden_act']!r} is not supported; pass {_SUPPORTED}")
    return raw


def _read_json(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {_first_line(error)}") from error
    return raw if isinstance(raw, dict) else {}


def _llama_config(path: Path, raw: dict[str, object]) -> object:
    """transformers' reading of the file: defaults, names of older releases, RoPE scaling."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    try:
        config = LlamaConfig.from_dict(raw)
        LlamaRotaryEmbedding(config)
    except (StrictDataclassError, ValueError, TypeError, KeyError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{path}: describes no Llama model: {_first_line(error)}") from error
    return config


def _shape(config: object, path: Path) -> ModelShape:
    sizes: dict[str, Any] = vars(config)
    num_heads = int(sizes["num_attention_heads"])
    shape = ModelShape(
        num_layers=int(sizes["num_hidden_layers"]),
        model_width=int(sizes["hidden_size"]),
        num_heads=num_heads,
        num_kv_heads=int(sizes["num_key_value_heads"] or num_heads),
        head_width=int(sizes.get("head_dim") or sizes["hidden_size"] // num_heads),
        mlp_width=int(sizes["intermediate_size"]),
        vocab_size=int(sizes["vocab_size"]),
        max_positions=int(sizes["max_position_embeddings"]),
        norm_eps=float(sizes["rms_norm_eps"]),
        is_head_tied=bool(sizes.get("tie_word_embeddings")),
        stored_dtype=str(getattr(config, "dtype", None) or "float32").removeprefix("torch."),
    )
    counts = (shape.num_layers, shape.model_width, shape.num_heads, shape.num_kv_heads, shape.mlp_width)
    if min(*counts, shape.vocab_size, shape.max_positions) < 1:
        raise CheckpointError(f"{path}: a size is below 1: {counts}; pass {_SUPPORTED}")
    if shape.num_heads % shape.num_kv_heads or shape.head_width % 2:
        heads = f"{shape.num_heads} heads of width {shape.head_width} on {shape.num_kv_heads} key/value heads"
        raise CheckpointError(f"{path}: {heads} cannot be attended; pass {_SUPPORTED}")
    return shape


def _number(value: object, neutral: float) -> float:
    return float(value) if isinstance(value, int | float) else neutral


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
