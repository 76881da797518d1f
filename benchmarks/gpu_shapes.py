"""Models that exist by their sizes alone: a configuration, a tokenizer of one letter, and no weights.

Knows sizes and what is read for a token; times nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer, models

from benchmarks.model_costs import ModelCosts
from decoding.checkpoint import ModelShape, open_checkpoint

_LLAMA32_ROPE: Final = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """What config.json says of a Llama decoder."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    positions: int
    theta: float = 10000.0
    is_tied: bool = False
    scaling: Mapping[str, object] | None = None

    def write(self, folder: Path) -> Path:
        """A checkpoint folder without weights; returns it."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_act": "silu",
            "num_hidden_layers": self.layers,
            "hidden_size": self.width,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.mlp,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.positions,
            "rms_norm_eps": 1e-5,
            "rope_theta": self.theta,
            "rope_scaling": self.scaling,
            "tie_word_embeddings": self.is_tied,
            "torch_dtype": "bfloat16",
        }
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
        tokenizer.save(str(folder / "tokenizer.json"))
        kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "tokenizer_config.json").write_text(json.dumps(kind), encoding="utf-8")
        return folder


SHAPES: Final[Mapping[str, Sizes]] = {
    "tiny": Sizes(8, 64, 4, 2, 120, 256, 1024),
    "1B": Sizes(16, 2048, 32, 8, 8192, 128256, 131072, theta=5e5, is_tied=True, scaling=_LLAMA32_ROPE),
    "7B": Sizes(32, 4096, 32, 32, 11008, 32000, 4096),
    "8B": Sizes(32, 4096, 32, 8, 14336, 128256, 8192, theta=5e5),
}
"""Those of Llama 3.2 1B, Llama 2 7B and Llama 3 8B, for which LayerSkip checkpoints are published; and a toy."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A named model of some sizes, and its folder."""

    name: str
    folder: Path
    sizes: ModelShape

    @classmethod
    def named(cls, name: str, below: Path) -> Shape:
        """Write it below a folder."""
        folder = SHAPES[name].write(below / f"shape-{name}")
        return cls(name, folder, open_checkpoint(str(folder), revision=None).shape)

    @property
    def layer_bytes(self) -> int:
        """Numbers in the matrices of one layer, at one byte each."""
        return self._costs.layer_flops // (2 * self.sizes.num_layers)

    @property
    def head_bytes(self) -> int:
        """Numbers in the head, at one byte each."""
        return self._costs.head_flops // 2

    def bytes_per_step(self, *, itemsize: int, context: int) -> int:
        """What a step of one row must read: every matrix, and the keys and values of its context."""
        weights = self.sizes.num_layers * self.layer_bytes + self.head_bytes
        return weights * itemsize + self._costs.kv_bytes(context, itemsize)

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Where drafts may leave in these measurements: after an eighth and a quarter of the layers."""
        return (self.sizes.num_layers // 8, self.sizes.num_layers // 4)

    @property
    def _costs(self) -> ModelCosts:
        return ModelCosts(self.sizes)
