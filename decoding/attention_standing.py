"""Attention whose queries stand where tensors on the device say: what recorded work needs, and its reference.

Knows slots and positions; knows nothing of drafts, requests or which tokens are committed.

Shapes: B rows, Q queries of a row, N = B·Q queries, W blocks of a row, T = W · block size cache positions,
H query heads, G key/value heads, R = H / G queries that share a key, F head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from decoding.attention import Arrangement, Attention, AttentionShape, GatherAttention, Queries, rotate_
from decoding.kv_cache import KVCache
from decoding.ragged import Ints, Ragged


@runtime_checkable
class Standing(Attention, Protocol):
    """An attention that can also be told on the device where queries stand."""

    def standing(self, arrangement: Arrangement, contexts_BX: Tensor) -> Queries:
        """Queries of these rows; X = 2 + W: a row's start, its length after this step, its blocks, in int32.

        Tokens at positions from the row's length on are padding: they store nothing that is read, and what is
        attended for them means nothing. Rows have equally many tokens; blocks reach to the last of them. Nothing
        is read on the host.
        """


@dataclass(frozen=True, slots=True)
class _Standing(Queries):
    """Where each query is stored and how it is rotated, the slots of whole contexts, what exists of them and what
    each query may see.
    """

    slots_N: Tensor
    rotations_N1F: Tensor
    context_slots: Tensor
    exists_BT1: Tensor
    mask_B1QT: Tensor


class StandingAttention:
    """Gathers all that a row may ever hold, and hides what is not there: slow, any device and dtype.

    Queries whose places the host knows are left to GatherAttention.
    """

    def __init__(
        self, *, shape: AttentionShape, cache: KVCache, rotations_TF: Tensor, block_size: int
    ) -> None:
        """`rotations_TF` as in GatherAttention. The last block of the cache takes what padding stores."""
        dtype = cache.layer(0).dtype
        self._gathered = GatherAttention(shape=shape, cache=cache, rotations_TF=rotations_TF, dtype=dtype)
        self._shape = shape
        self._cache = cache
        self._dtype = dtype
        self._rotations_T1F = rotations_TF[:, None, :]
        self._block_size = block_size
        self._padding_slot = len(cache.layer(0)) - 1
        self._repeats = shape.num_heads // shape.num_kv_heads

    def arrange(self, tokens: Ragged, classes_B: Ints) -> Arrangement:
        """As GatherAttention."""
        return self._gathered.arrange(tokens, classes_B)

    def queries(self, arrangement: Arrangement, slots_BT: Ints, starts_B: Ints) -> Queries:
        """As GatherAttention."""
        return self._gathered.queries(arrangement, slots_BT, starts_B)

    def standing(self, arrangement: Arrangement, contexts_BX: Tensor) -> Queries:
        """Look up where tokens are stored and what each query sees, on the device."""
        num_rows = len(contexts_BX)
        num_queries = len(arrangement.tokens.rows_N) // num_rows
        size, device = self._block_size, contexts_BX.device
        starts_B, lengths_B = contexts_BX[:, 0].long(), contexts_BX[:, 1].long()
        blocks_BW = contexts_BX[:, 2:].long()
        positions_BQ = starts_B[:, None] + torch.arange(num_queries, device=device)
        slots_BQ = blocks_BW.gather(1, positions_BQ // size) * size + positions_BQ % size
        slots_BQ = slots_BQ.masked_fill(positions_BQ >= lengths_B[:, None], self._padding_slot)
        context_slots_BWS = blocks_BW[:, :, None] * size + torch.arange(size, device=device)
        steps_T = torch.arange(context_slots_BWS[0].numel(), device=device)
        exists_BT = steps_T < lengths_B[:, None]
        is_hidden_BQT = (steps_T > positions_BQ[:, :, None]) | ~exists_BT[:, None, :]
        # Queries that share a key are neighbours, as they are packed.
        is_hidden_BQT = is_hidden_BQT[:, :, None, :].expand(-1, -1, self._repeats, -1).flatten(1, 2)
        mask_BQT = torch.zeros(is_hidden_BQT.shape, dtype=self._dtype, device=device)
        return _Standing(
            slots_N=slots_BQ.reshape(-1),
            rotations_N1F=self._rotations_T1F.index_select(0, positions_BQ.reshape(-1)),
            context_slots=context_slots_BWS.reshape(-1),
            exists_BT1=exists_BT[:, :, None],
            mask_B1QT=mask_BQT.masked_fill_(is_hidden_BQT, -torch.inf)[:, None],
        )

    def attend(self, layer: int, qkv_NW: Tensor, queries: Queries) -> Tensor:
        """Rotate queries and keys in place, store keys and values, attend: [N, H·F]."""
        if not isinstance(queries, _Standing):
            return self._gathered.attend(layer, qkv_NW, queries)
        heads, groups, width = self._shape.num_heads, self._shape.num_kv_heads, self._shape.head_width
        num_rows = len(queries.exists_BT1)
        heads_NHF = qkv_NW.view(len(qkv_NW), -1, width)
        rotate_(heads_NHF[:, : heads + groups], queries.rotations_N1F)
        self._cache.store(layer, qkv_NW[:, heads * width :], queries.slots_N)
        grouped = heads_NHF[:, :heads].reshape(num_rows, -1, groups, self._repeats, width)
        packed = grouped.transpose(1, 2).reshape(num_rows, groups, -1, width)
        context = self._cache.gather(layer, queries.context_slots).view(num_rows, -1, 2 * groups * width)
        # What is not there may be anything, also no number, and no number times nothing is none.
        context = context.masked_fill(~queries.exists_BT1, 0.0)
        context = context.view(num_rows, -1, 2 * groups, width).transpose(1, 2)
        attended = F.scaled_dot_product_attention(
            packed, context[:, :groups], context[:, groups:], attn_mask=queries.mask_B1QT
        )
        unpacked = attended.view(num_rows, groups, -1, self._repeats, width)
        return unpacked.transpose(1, 2).reshape(-1, heads * width)
