"""A lean Llama decoder that can run any stretch of its layers.

Knows hidden states and layers; knows nothing of drafts, rows or sampling.

Shapes: N tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from decoding.attention import GatherAttention, Queries
from decoding.linear import Linear


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer. Projections of the same input are fused: (q, k, v) and (gate, up)."""

    attention_norm_D: Tensor
    qkv: Linear
    attention_out: Linear
    mlp_norm_D: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Weights:
    """Everything a checkpoint brings; a tied head is a linear on the embedding's own values."""

    embedding_VD: Tensor
    layers: Sequence[Layer]
    final_norm_D: Tensor
    head: Linear
    norm_eps: float


class LlamaDecoder:
    """Runs layers first..last of a Llama-architecture model on hidden states of ragged tokens."""

    def __init__(self, weights: Weights, attention: GatherAttention) -> None:
        self._weights = weights
        self._attention = attention
        self.num_layer_calls = 0

    @property
    def num_layers(self) -> int:
        return len(self._weights.layers)

    @property
    def device(self) -> torch.device:
        return self._weights.embedding_VD.device

    def embed(self, ids_N: Tensor) -> Tensor:
        """Hidden states that enter layer 0: [N, D]."""
        return F.embedding(ids_N, self._weights.embedding_VD)

    def run_layers(self, hidden_ND: Tensor, first: int, last: int, queries: Queries) -> Tensor:
        """Residual stream after layers first … last − 1; `hidden_ND` is what enters `first`, and is kept.

        Stores keys and values of the tokens in those layers' caches.
        """
        eps = self._weights.norm_eps
        for index in range(first, last):
            layer = self._weights.layers[index]
            qkv_NW = layer.qkv(rms_norm(hidden_ND, layer.attention_norm_D, eps))
            hidden_ND = hidden_ND + layer.attention_out(self._attention.attend(index, qkv_NW, queries))
            gate, up = layer.gate_up(rms_norm(hidden_ND, layer.mlp_norm_D, eps)).chunk(2, dim=-1)
            hidden_ND = hidden_ND + layer.down(F.silu(gate).mul_(up))
        self.num_layer_calls += last - first
        return hidden_ND

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V] of hidden states after any layer: the final norm, then the one head of the model."""
        return self._weights.head(rms_norm(hidden_ND, self._weights.final_norm_D, self._weights.norm_eps))


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation over D, scaled by `weight_D`."""
    return F.rms_norm(x_ND, weight_D.shape, weight_D, eps)
