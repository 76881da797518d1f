"""Writes a Llama checkpoint as a GGUF file, so that llama.cpp can run the same weights.

Knows what GGUF calls things and how it lays them out; knows nothing of text: but for their number, tokens are left
out. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from training.gguf_import import TENSOR_NAMES

_PARTS: Final = {theirs: own for own, theirs in TENSOR_NAMES.items()}
_LAYER: Final = "model.layers."


def write_gguf(folder: str, path: Path, *, dtype: str) -> None:
    """Matrices in `dtype`, float32, float16 or bfloat16, as far as they hold it; norms in float32.

    Raises ValueError for scaled RoPE, which is not written.
    """
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    _write_header(writer, config)
    for name, weights in model.state_dict().items():
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            _write_tensor(writer, name, weights, config, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_header(writer: gguf.GGUFWriter, config: LlamaConfig) -> None:
    rope = config.rope_parameters
    if rope["rope_type"] != "default":
        raise ValueError(f"RoPE of type {rope['rope_type']!r} is not written")
    head_width = config.head_dim
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_width)
    writer.add_value_length(head_width)
    writer.add_rope_dimension_count(head_width)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")


def _write_tensor(
    writer: gguf.GGUFWriter, name: str, weights: Tensor, config: LlamaConfig, dtype: str
) -> None:
    values = weights.detach().numpy()
    part = _part(name)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    if part in heads:
        values = _neighbours(values, heads[part])
    place = f"blk.{name.removeprefix(_LAYER).split('.')[0]}." if name.startswith(_LAYER) else ""
    called = f"{place}{part}.weight"
    if values.ndim == 1 or dtype == "float32":
        writer.add_tensor(called, np.ascontiguousarray(values))
    elif dtype == "float16":
        writer.add_tensor(called, np.ascontiguousarray(values.astype(np.float16)))
    else:
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(called, gguf.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)


def _part(name: str) -> str:
    within = name.removesuffix(".weight")
    if within.startswith(_LAYER):
        within = within.removeprefix(_LAYER).partition(".")[2]
    return _PARTS[within]


def _neighbours(rows_OI: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """The pairs that RoPE turns, half a head apart here, stand side by side in a GGUF file."""
    halves = rows_OI.reshape(num_heads, 2, -1, rows_OI.shape[-1])
    return halves.swapaxes(1, 2).reshape(rows_OI.shape)
