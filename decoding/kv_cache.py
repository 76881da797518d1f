"""The tensors that keys and values live in, addressed by slot. Knows no blocks and no rows.

Shapes: N tokens, S slots, G key/value heads, F head width, W = 2·G·F.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer for a fixed number of slots; allocated once, never cleared.

    A slot holds the key and the value of one position side by side, so that a token is stored by one copy and
    a context is gathered by one read.
    """

    def __init__(
        self, *, num_layers: int, num_slots: int, slot_width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        stored = torch.zeros(num_layers, num_slots, slot_width, dtype=dtype, device=device)
        self._layers_SW = tuple(stored.unbind(0))

    def store(self, layer: int, kv_NW: Tensor, slots_N: Tensor) -> None:
        """Write one key and value for each token; what the slots held is overwritten."""
        self._layers_SW[layer].index_copy_(0, slots_N, kv_NW)

    def layer(self, layer: int) -> Tensor:
        """Keys and values of all slots, [S, W], as they lie in memory."""
        return self._layers_SW[layer]

    def gather(self, layer: int, slots_M: Tensor) -> Tensor:
        """Keys and values at these slots, [M, W], in order and copied."""
        return self._layers_SW[layer].index_select(0, slots_M)


def slot_bytes(*, num_layers: int, slot_width: int, dtype: torch.dtype) -> int:
    """Memory of one position in all layers."""
    return num_layers * slot_width * dtype.itemsize
