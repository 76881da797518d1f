"""Tiny random Llama checkpoints on disk, written by transformers and tokenizers as published ones are.

Knows nothing of the engine. Weights are drawn so that logits are clearly spread and an early exit agrees with
the last layer sometimes, not always.
"""

from __future__ import annotations

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

# Matrices of a test are small: two threads that wait for each other cost more than they compute.
torch.set_num_threads(1)

END_OF_TEXT = "<|end|>"
MAX_POSITIONS = 512
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
"""The scaling of Llama 3.2, with an original context so short that positions of a test lie beyond it."""


def make_checkpoint(
    folder: Path,
    *,
    num_layers: int = 4,
    hidden: int = 32,
    mlp: int | None = None,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    vocab: int = 97,
    tied: bool = False,
    rope_parameters: dict[str, object] | None = None,
    shards: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    init_std: float = 0.3,
    transparent_from: int | None = None,
) -> Path:
    """Write config, safetensors weights and tokenizer into `folder`, and return it.

    `shards` splits the weights over several files with an index. Layers from `transparent_from` on add
    nothing to the residual stream, so that every exit from there on gives the full model's logits.
    """
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=mlp or 2 * hidden - 8,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim or hidden // heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=tied,
        rope_parameters=rope_parameters or {"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(torch.float64)
        _draw_weights(model, init_std, torch.Generator().manual_seed(seed))
    if transparent_from is not None:
        _make_transparent(model, transparent_from)
    model.to(dtype).save_pretrained(folder, max_shard_size="20KB" if shards else "1GB")
    write_tokenizer(folder, vocab)
    return folder


def load_reference(folder: Path, dtype: torch.dtype) -> LlamaForCausalLM:
    """transformers' own model of a checkpoint, computing in `dtype` throughout.

    Its norms round to float32 whatever the model's dtype is, which would hide all that float64 can show, so
    torch's norm stands in for them there.
    """
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
    if dtype == torch.float64:
        model.model.norm = _same_norm(model.model.norm)
        for layer in model.model.layers:
            layer.input_layernorm = _same_norm(layer.input_layernorm)
            layer.post_attention_layernorm = _same_norm(layer.post_attention_layernorm)
    return model


def write_tokenizer(folder: Path, vocab: int) -> None:
    """One token for each printable character, as many as fit, after the end-of-text token with id 0."""
    tokens = [END_OF_TEXT, *string.printable[:95], "\n"][:vocab]
    tokens += [f"<|unused-{i}|>" for i in range(len(tokens), vocab)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT).save_pretrained(folder)


def _same_norm(norm: LlamaRMSNorm) -> torch.nn.RMSNorm:
    same = torch.nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon, dtype=norm.weight.dtype)
    same.weight = norm.weight
    return same


def _draw_weights(model: LlamaForCausalLM, std: float, generator: torch.Generator) -> None:
    """Normal matrices; norm weights around 1, so that a norm left out or misplaced shows."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.copy_(1 + 0.2 * drawn if "norm" in name else std * drawn)
        # Later layers add less, as in a trained model: this is what lets early exits agree now and then.
        for depth, layer in enumerate(model.model.layers, start=1):
            layer.self_attn.o_proj.weight /= depth
            layer.mlp.down_proj.weight /= depth


def _make_transparent(model: LlamaForCausalLM, first: int) -> None:
    with torch.no_grad():
        for layer in model.model.layers[first:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
