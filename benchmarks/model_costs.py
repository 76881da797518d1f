"""What a model weighs and computes, from its sizes.

Knows sizes; times nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from decoding.checkpoint import ModelShape


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """Parameters of one model, and what the matrices of its parts take for a token; a multiply-add is two FLOPs.

    Attention's own products are left out: they depend on the length of the text.
    """

    shape: ModelShape

    @property
    def layer_flops(self) -> int:
        """Of all layers."""
        return 2 * self.shape.num_layers * self._layer_matrices

    @property
    def head_flops(self) -> int:
        return 2 * self.shape.vocab_size * self.shape.model_width

    @property
    def num_parameters(self) -> int:
        shape = self.shape
        embedding = shape.vocab_size * shape.model_width
        norms = shape.model_width * (2 * shape.num_layers + 1)
        return shape.num_layers * self._layer_matrices + norms + embedding * (1 if shape.is_head_tied else 2)

    def weight_bytes(self, itemsize: int, matrix_itemsize: int) -> int:
        """Weights as they are held: matrices may be stored smaller; a tied head is held beside the embedding."""
        embedding = self.shape.vocab_size * self.shape.model_width
        matrices = self.shape.num_layers * self._layer_matrices + embedding
        others = self.num_parameters - matrices + (embedding if self.shape.is_head_tied else 0)
        return matrices * matrix_itemsize + others * itemsize

    @property
    def _layer_matrices(self) -> int:
        shape = self.shape
        attended = shape.head_width * (2 * shape.num_heads + 2 * shape.num_kv_heads)
        return shape.model_width * (attended + 3 * shape.mlp_width)

    def kv_bytes(self, num_tokens: int, itemsize: int) -> int:
        """Keys and values of so many tokens in all layers."""
        width = 2 * self.shape.num_kv_heads * self.shape.head_width
        return self.shape.num_layers * width * itemsize * num_tokens

    def scratch_bytes(self, num_tokens: int, itemsize: int) -> int:
        """Exit hidden states and logits of the tokens that are verified together."""
        return (self.shape.model_width + self.shape.vocab_size) * itemsize * num_tokens


def flops_per_token(
    costs: ModelCosts, *, row_steps: int, drafted: int, emitted: int, draft_flops: int
) -> float:
    """Of decoding steps: each of a row computes its token and all its drafts in all layers and the head.

    With a shared cache no layer runs twice on a token, so that a draft by early exit adds one use of the head
    (`draft_flops`), one by a separate model all of that model, and a looked-up one nothing.
    """
    verified = (row_steps + drafted) * (costs.layer_flops + costs.head_flops)
    return (verified + drafted * draft_flops) / emitted
