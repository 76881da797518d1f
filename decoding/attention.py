"""Attention of ragged queries over a paged cache: the interface, and its reference on gathered contexts.

Knows slots and positions; knows nothing of drafts, requests or which tokens are committed.

Shapes: N query tokens, B rows, Q queries of a row, T cache positions, H query heads, G key/value heads,
R = H / G queries that share a key, F head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from decoding.kv_cache import KVCache

Ints = NDArray[np.int64]

_MAX_SHARED_QUERIES: Final = 32
"""Rows with more queries than this are attended alone: padding others to their length would cost more."""


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Head counts and width; H is a multiple of G."""

    num_heads: int
    num_kv_heads: int
    head_width: int

    @property
    def slot_width(self) -> int:
        """Numbers that one position stores in one layer: a key and a value for each key/value head."""
        return 2 * self.num_kv_heads * self.head_width


@dataclass(frozen=True, slots=True)
class _Rectangle:
    """Some rows' queries, padded to one count and one context: tokens first..last of the ragged list."""

    first: int
    last: int
    num_rows: int
    context_slots: Tensor
    mask: Tensor | None
    pad: Tensor | None
    unpad: Tensor | None


@dataclass(frozen=True, slots=True)
class Queries:
    """Ragged query tokens in row order: where each is stored, how it is rotated, what it may see."""

    slots_N: Tensor
    rotations_N1F: Tensor
    rectangles: tuple[_Rectangle, ...]


@dataclass(frozen=True, slots=True)
class _Extent:
    """Which positions some rows query: `counts_B[b]` of them from `starts_B[b]` on."""

    slots_BT: Ints
    starts_B: Ints
    counts_B: Ints


class GatherAttention:
    """Gathers each row's context and calls scaled_dot_product_attention: any device and dtype."""

    def __init__(
        self, *, shape: AttentionShape, cache: KVCache, rotations_TF: Tensor, dtype: torch.dtype
    ) -> None:
        """`rotations_TF` is complex: how the head's pairs turn at each position up to the longest context."""
        self._shape = shape
        self._cache = cache
        self._rotations_T1F = rotations_TF[:, None, :]
        self._dtype = dtype
        self._device = rotations_TF.device
        self._repeats = shape.num_heads // shape.num_kv_heads

    def queries(self, slots_BT: Ints, starts_B: Ints, counts_B: Ints) -> Queries:
        """Lay out `counts_B[b]` ≥ 1 queries of row b from position `starts_B[b]` on.

        `slots_BT[b, t]` is the slot of row b's position t; columns reach at least to the last query.
        """
        extent = _Extent(slots_BT, starts_B, counts_B)
        rows_N = np.repeat(np.arange(len(counts_B)), counts_B)
        ends_B = np.cumsum(counts_B)
        positions_N = np.arange(len(rows_N)) - (ends_B - counts_B - starts_B)[rows_N]
        slots_N = slots_BT[rows_N, positions_N]
        return Queries(
            slots_N=self._on_device(slots_N),
            rotations_N1F=self._rotations_T1F[self._on_device(positions_N)],
            rectangles=tuple(self._rectangles(extent, ends_B)),
        )

    def attend(self, layer: int, qkv_NW: Tensor, queries: Queries) -> Tensor:
        """Rotate queries and keys in place, store keys and values, attend: [N, H·F]."""
        shape = self._shape
        num_rotated = shape.num_heads + shape.num_kv_heads
        heads_NHF = qkv_NW.view(len(qkv_NW), num_rotated + shape.num_kv_heads, shape.head_width)
        rotate_(heads_NHF[:, :num_rotated], queries.rotations_N1F)
        self._cache.store(layer, qkv_NW[:, shape.num_heads * shape.head_width :], queries.slots_N)
        queries_NHF = heads_NHF[:, : shape.num_heads]
        if len(queries.rectangles) == 1:
            return self._attend_rectangle(layer, queries_NHF, queries.rectangles[0])
        return torch.cat(
            [self._attend_rectangle(layer, queries_NHF[r.first : r.last], r) for r in queries.rectangles]
        )

    def _rectangles(self, extent: _Extent, ends_B: Ints) -> list[_Rectangle]:
        """Neighbouring short rows share one rectangle; a long row has its own."""
        edges = [0]
        for row in np.flatnonzero(extent.counts_B > _MAX_SHARED_QUERIES):
            edges += [int(row), int(row) + 1]
        edges.append(len(extent.counts_B))
        return [
            self._rectangle(extent, first, last, ends_B) for first, last in pairwise(edges) if first < last
        ]

    def _rectangle(self, extent: _Extent, first_row: int, last_row: int, ends_B: Ints) -> _Rectangle:
        starts_B, counts_B = extent.starts_B[first_row:last_row], extent.counts_B[first_row:last_row]
        num_queries = int(counts_B.max())
        context = int((starts_B + counts_B).max())
        steps_BQ = np.minimum(np.arange(num_queries), counts_B[:, None] - 1)
        is_ragged = bool((counts_B < num_queries).any())
        tokens_BQ = steps_BQ + np.cumsum(counts_B)[:, None] - counts_B[:, None]
        return _Rectangle(
            first=int(ends_B[first_row] - extent.counts_B[first_row]),
            last=int(ends_B[last_row - 1]),
            num_rows=last_row - first_row,
            context_slots=self._on_device(extent.slots_BT[first_row:last_row, :context].reshape(-1)),
            mask=self._mask(starts_B[:, None] + steps_BQ, context),
            pad=self._on_device(tokens_BQ.reshape(-1)) if is_ragged else None,
            unpad=self._on_device(np.flatnonzero(np.arange(num_queries) < counts_B[:, None]))
            if is_ragged
            else None,
        )

    def _mask(self, positions_BQ: Ints, context: int) -> Tensor | None:
        """Additive [B, 1, Q·R or 1, T]: a query sees its own position and those before. None: sees all."""
        if positions_BQ.min() == context - 1:
            return None
        hidden_BQT = np.arange(context) > positions_BQ[:, :, None]
        if positions_BQ.shape[1] > 1:
            hidden_BQT = np.repeat(hidden_BQT, self._repeats, axis=1)
        mask = torch.zeros(hidden_BQT.shape, dtype=self._dtype, device=self._device)
        return mask.masked_fill_(self._on_device(hidden_BQT), -torch.inf)[:, None]

    def _attend_rectangle(self, layer: int, queries_NHF: Tensor, rectangle: _Rectangle) -> Tensor:
        shape, rows = self._shape, rectangle.num_rows
        if rectangle.pad is not None:
            queries_NHF = queries_NHF[rectangle.pad]
        # Queries that share a key become neighbours in the query dimension, so no key is copied for them.
        grouped = queries_NHF.reshape(rows, -1, shape.num_kv_heads, self._repeats, shape.head_width)
        packed = grouped.transpose(1, 2).reshape(rows, shape.num_kv_heads, -1, shape.head_width)
        context = self._cache.gather(layer, rectangle.context_slots)
        keys, values = context.view(rows, -1, 2, shape.num_kv_heads, shape.head_width).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(packed, keys, values, attn_mask=rectangle.mask)
        unpacked = attended.view(rows, shape.num_kv_heads, -1, self._repeats, shape.head_width)
        flat_NW = unpacked.transpose(1, 2).reshape(-1, shape.num_heads * shape.head_width)
        return flat_NW if rectangle.unpad is None else flat_NW[rectangle.unpad]

    def _on_device(self, array: NDArray[np.int64] | NDArray[np.bool_]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def rotate_(heads_NHF: Tensor, rotations_N1F: Tensor) -> None:
    """Rotary embedding in place: neighbouring pairs of each head are complex numbers that turn.

    Checkpoints pair element i with i + F/2; the loader reorders their rows so that pairs are neighbours.
    """
    wide_NHF = heads_NHF if heads_NHF.dtype in (torch.float32, torch.float64) else heads_NHF.float()
    torch.view_as_complex(wide_NHF.view(*wide_NHF.shape[:-1], -1, 2)).mul_(rotations_N1F)
    if wide_NHF is not heads_NHF:
        heads_NHF.copy_(wide_NHF)
