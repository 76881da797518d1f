"""A lean Llama decoder that can run any stretch of its layers.

Knows hidden states and layers; knows nothing of drafts or rows.

Shapes: N tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from decoding.attention import Attention, Queries
from decoding.coupling import choose
from decoding.linear import Linear
from decoding.logits import Sampling
from decoding.ragged import Ints


class RmsNorm:
    """Root-mean-square normalisation over D, scaled by a weight.

    On a CPU it is written as x / √(‖x‖² + D·eps) · (√D · weight): four small operators instead of the six that
    `rms_norm` falls apart into there. In short dtypes and on accelerators the library's own is used.
    """

    def __init__(self, weight_D: Tensor, eps: float) -> None:
        width = weight_D.shape[0]
        self.weight_D = weight_D
        self.eps = eps
        self._is_plain = weight_D.device.type == "cpu" and weight_D.dtype in (torch.float32, torch.float64)
        self._scaled_weight_D = weight_D * width**0.5
        self._floor = weight_D.new_tensor((width * eps) ** 0.5)

    def __call__(self, x_ND: Tensor, /) -> Tensor:
        """Normalise and scale; `x_ND` is kept."""
        if not self._is_plain:
            return F.rms_norm(x_ND, self.weight_D.shape, self.weight_D, self.eps)
        length_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True).hypot_(self._floor)
        return x_ND.div(length_N1).mul_(self._scaled_weight_D)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer. Projections of the same input are fused: (q, k, v) and (gate, up)."""

    attention_norm: RmsNorm
    qkv: Linear
    attention_out: Linear
    mlp_norm: RmsNorm
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Weights:
    """Everything a checkpoint brings; a tied head is a linear of the same values as the embedding, which may be a
    view of it.

    `head_rows_VD` is the head as a plain matrix, where one was asked for.
    """

    embedding_VD: Tensor
    layers: Sequence[Layer]
    final_norm: RmsNorm
    head: Linear
    head_rows_VD: Tensor | None = None


class LlamaDecoder:
    """Runs layers first..last of a Llama-architecture model on hidden states of ragged tokens, and chooses among
    logits by the public rule, which is the same for every decoder.
    """

    def __init__(self, weights: Weights, attention: Attention) -> None:
        self._weights = weights
        self._attention = attention
        self.num_layer_calls = 0

    @property
    def weights(self) -> Weights:
        """What it computes with: the same weights may serve another decoder, with a cache of its own."""
        return self._weights

    @property
    def attention(self) -> Attention:
        """Who makes the queries that layers run with."""
        return self._attention

    @property
    def num_layers(self) -> int:
        """Decoder layers of the full model."""
        return len(self._weights.layers)

    @property
    def device(self) -> torch.device:
        """Where hidden states live."""
        return self._weights.embedding_VD.device

    @property
    def see(self) -> Callable[[Ints], None] | None:
        """What is to be told of tokens that came, where drafts are among those seen lately."""
        return None

    def embed(self, ids_N: Tensor) -> Tensor:
        """Hidden states that enter layer 0: [N, D]."""
        return F.embedding(ids_N, self._weights.embedding_VD)

    def run_layers(self, hidden_ND: Tensor, first: int, last: int, queries: Queries) -> Tensor:
        """Residual stream after layers first … last − 1; `hidden_ND` is what enters `first`, and is kept.

        Stores keys and values of the tokens in those layers' caches.
        """
        for index in range(first, last):
            layer = self._weights.layers[index]
            qkv_NW = layer.qkv(layer.attention_norm(hidden_ND))
            hidden_ND = hidden_ND + layer.attention_out(self._attention.attend(index, qkv_NW, queries))
            gate, up = layer.gate_up(layer.mlp_norm(hidden_ND)).chunk(2, dim=-1)
            hidden_ND = hidden_ND + layer.down(F.silu(gate).mul_(up))
        self.num_layer_calls += last - first
        return hidden_ND

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V] of hidden states after any layer: the final norm, then the one head of the model."""
        return self._weights.head(self._weights.final_norm(hidden_ND))

    def choose(self, logits_NV: Tensor, sampling: Sampling, positions_N: Tensor) -> Tensor:
        """The token that stands at each position by the choice rule, int64 [N]."""
        return choose(logits_NV, sampling, positions_N)
