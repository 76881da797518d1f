"""Reads a Llama model out of a GGUF file and writes it as a Hugging Face checkpoint.

Knows what GGUF calls things and how it lays them out; knows nothing of where the file came from.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from config.errors import StartupError

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

T = TypeVar("T")

TENSOR_NAMES: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""What a tensor is called in a GGUF file, and in a Hugging Face one."""

_TENSOR_NAME: Final = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.weight")


class GgufError(StartupError):
    """The GGUF file cannot be converted; the message is one line: the file, what is wrong, what would do."""


@dataclass(frozen=True, slots=True)
class GgufFile:
    """An opened GGUF file; its tensors stay on disk until they are read."""

    path: Path
    reader: GGUFReader

    def optional(self, key: str, kind: type[T]) -> T | None:
        """A value of the file's header, None where it is not given. Raises GgufError for another type."""
        field = self.reader.get_field(key)
        if field is None:
            return None
        value = field.contents()
        if not isinstance(value, kind):
            raise GgufError(f"{self.path}: {key} is {value!r:.40}; pass a GGUF of a plain Llama model")
        return value

    def required(self, key: str, kind: type[T]) -> T:
        """A value that no Llama model goes without. Raises GgufError."""
        value = self.optional(key, kind)
        if value is None:
            raise GgufError(f"{self.path}: {key} is missing; pass a GGUF of a whole Llama model")
        return value


def require_gguf() -> None:
    """Raise GgufError unless the library that reads GGUF files is installed."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise GgufError(
            "reading GGUF files needs the gguf package; run: pip install 'layerskip-server[train]'"
        ) from error


def open_gguf(path: Path) -> GgufFile:
    """Open a file and check that it holds a Llama model we can convert. Raises GgufError."""
    import gguf

    try:
        file = GgufFile(path, gguf.GGUFReader(path))
    except (ValueError, KeyError, IndexError, OverflowError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise GgufError(f"{path}: not a readable GGUF file ({reason}); pass a complete one") from error
    architecture = file.required("general.architecture", str)
    if architecture != "llama":
        raise GgufError(
            f"{path}: architecture {architecture!r} is not supported; pass a GGUF of a Llama model"
        )
    scaling = file.optional("llama.rope.scaling.type", str) or "none"
    if scaling != "none" or any(tensor.name == "rope_freqs.weight" for tensor in file.reader.tensors):
        raise GgufError(f"{path}: scaled RoPE is not supported here; pass the original checkpoint's folder")
    return file


def write_checkpoint(path: Path, folder: Path, progress: Callable[[str], None]) -> None:
    """Write configuration, float weights and tokenizer of a GGUF file into `folder`. Raises GgufError."""
    from training.gguf_tokenizer import read_tokenizer

    file = open_gguf(path)
    config = read_config(file)
    tokenizer = read_tokenizer(file)
    dtype = str(config.dtype).removeprefix("torch.")
    progress(f"converting {len(file.reader.tensors)} tensors of {path.name} to {dtype}")
    config.save_pretrained(folder)
    weights = folder / "model.safetensors"
    save_file(read_tensors(file, config), weights, metadata={"format": "pt"})
    # safetensors lets its writer alone read the file; a container's user shall, too.
    weights.chmod((folder / "config.json").stat().st_mode)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(folder)
    # One file has all that is said of the tokenizer, the chat template too.
    tokenizer.save_pretrained(folder, save_jinja_files=False)


def read_config(file: GgufFile) -> LlamaConfig:
    """The model's sizes and special tokens. Raises GgufError."""
    names = {tensor.name for tensor in file.reader.tensors}
    num_heads = file.required("llama.attention.head_count", int)
    width = file.required("llama.embedding_length", int)
    if num_heads < 1 or width % num_heads:
        raise GgufError(f"{file.path}: {num_heads} heads do not divide a width of {width}; pass another file")
    head_width = file.optional("llama.attention.key_length", int) or width // num_heads
    rotated = file.optional("llama.rope.dimension_count", int) or head_width
    if rotated != head_width or head_width % 2:
        raise GgufError(
            f"{file.path}: RoPE turns {rotated} of {head_width} columns; pass a plain Llama model"
        )
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(file.required("tokenizer.ggml.tokens", list)),
        hidden_size=width,
        intermediate_size=file.required("llama.feed_forward_length", int),
        num_hidden_layers=file.required("llama.block_count", int),
        num_attention_heads=num_heads,
        num_key_value_heads=file.optional("llama.attention.head_count_kv", int) or num_heads,
        head_dim=head_width,
        max_position_embeddings=file.required("llama.context_length", int),
        rms_norm_eps=_shortest(file.required("llama.attention.layer_norm_rms_epsilon", float)),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": _shortest(file.optional("llama.rope.freq_base", float) or 10_000.0),
        },
        tie_word_embeddings="output.weight" not in names,
        bos_token_id=file.optional("tokenizer.ggml.bos_token_id", int),
        eos_token_id=file.required("tokenizer.ggml.eos_token_id", int),
        pad_token_id=file.optional("tokenizer.ggml.padding_token_id", int),
        dtype=_dtype(file),
    )


def read_tensors(file: GgufFile, config: LlamaConfig) -> dict[str, Tensor]:
    """Every tensor under its Hugging Face name, dequantised. Raises GgufError."""
    with torch.device("meta"):
        expected = LlamaForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    found = {_hugging_face_name(file, tensor): tensor for tensor in file.reader.tensors}
    for name in sorted(expected.keys() ^ found.keys()):
        problem = "is missing" if name in expected else "is not of a plain Llama model"
        raise GgufError(f"{file.path}: tensor {name} {problem}; pass a GGUF of a whole Llama model")
    return {name: _read(file, found[name], like, config) for name, like in expected.items()}


def _hugging_face_name(file: GgufFile, tensor: ReaderTensor) -> str:
    match = _TENSOR_NAME.fullmatch(tensor.name)
    if match is None or match["part"] not in TENSOR_NAMES:
        raise GgufError(f"{file.path}: tensor {tensor.name} is unknown; pass a GGUF of a plain Llama model")
    prefix = "" if match["layer"] is None else f"model.layers.{match['layer']}."
    return f"{prefix}{TENSOR_NAMES[match['part']]}.weight"


def _read(file: GgufFile, tensor: ReaderTensor, like: Tensor, config: LlamaConfig) -> Tensor:
    import gguf

    try:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, ValueError) as error:
        kind = tensor.tensor_type.name
        remedy = "pass a file quantised in another way"
        raise GgufError(
            f"{file.path}: tensor {tensor.name} is {kind}, which is not read; {remedy}"
        ) from error
    if values.shape != like.shape:
        found, wanted = list(values.shape), list(like.shape)
        raise GgufError(f"{file.path}: tensor {tensor.name} has shape {found}, the header asks for {wanted}")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    part = tensor.name.removesuffix(".weight").rpartition(".")[2]
    ordered = _halves(values, heads[part]) if part in heads else values
    stored = torch.tensor(ordered).to(config.dtype)
    if not stored.isfinite().all():
        raise GgufError(f"{file.path}: tensor {tensor.name} does not fit {config.dtype}; pass another file")
    return stored


def _halves(rows_OI: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Undo GGUF's order of a head's rows: the pairs that RoPE turns, neighbours there, go half a head apart."""
    pairs = rows_OI.reshape(num_heads, -1, 2, rows_OI.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows_OI.shape)


def _dtype(file: GgufFile) -> torch.dtype:
    """float16 changes dequantised values seven times less than bfloat16; what is bfloat16 stays so."""
    has_bfloat16 = any(tensor.tensor_type.name == "BF16" for tensor in file.reader.tensors)
    return torch.bfloat16 if has_bfloat16 else torch.float16


def _shortest(value: float) -> float:
    """The decimal that was meant: headers hold float32."""
    return float(str(np.float32(value)))
