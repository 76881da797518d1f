"""Attention of ragged queries over a paged cache: the interface, and its reference on gathered contexts.

Knows slots and positions; knows nothing of drafts, requests or which tokens are committed.

Shapes: N query tokens, B rows, Q queries of a row, T cache positions, H query heads, G key/value heads,
R = H / G queries that share a key, F head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from decoding.kv_cache import KVCache
from decoding.ragged import LENGTH_CLASSES, Ints, Ragged, length_classes

_CLASS_ENDS: Final = 512 * 4 ** np.arange(16)
"""Longest context of each class. Padding a row to the shortest of these costs less than a call of its own."""


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
class Arrangement:
    """How ragged queries are attended, whatever their positions; every attention makes a kind of its own."""

    tokens: Ragged


@dataclass(frozen=True, slots=True)
class Queries:
    """Ragged query tokens at their positions, for the attention that made this."""


class Attention(Protocol):
    """Rotates, stores and attends. `arrange` is for many steps, `queries` for one, `attend` for a layer of it."""

    def arrange(self, tokens: Ragged, classes_B: Ints) -> Arrangement:
        """Prepare for these queries, at least one of each row; row b's context is of class `classes_B[b]`."""
        ...

    def queries(self, arrangement: Arrangement, slots_BT: Ints, starts_B: Ints) -> Queries:
        """Queries of each row, whose 0-th token, skipped or not, is at position `starts_B[b]`.

        `slots_BT[b, t]` is the slot of row b's position t; columns reach at least to the last query.
        """
        ...

    def attend(self, layer: int, qkv_NW: Tensor, queries: Queries) -> Tensor:
        """Rotate queries in place, store rotated keys and values, attend: [N, H·F]. A query sees its own position
        and those before.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Band:
    """Rows first_row … last_row − 1, padded to `num_queries` each: tokens first … last − 1 of the ragged list.

    `steps_BQ` says which of its row's queries each padded one is; rows that have fewer repeat their last.
    `pad` and `unpad` index ragged into padded queries and back; None where nothing is padded.
    """

    first_row: int
    last_row: int
    first: int
    last: int
    steps_BQ: Ints
    pad: Tensor | None
    unpad: Tensor | None


@dataclass(frozen=True, slots=True)
class _Banded(Arrangement):
    """The rows in bands."""

    bands: tuple[_Band, ...]


@dataclass(frozen=True, slots=True)
class _Rectangle:
    """A band at its positions: the slots of its rows' contexts, row after row, and what each query may see."""

    band: _Band
    context_slots: Tensor
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class _Gathering(Queries):
    """Where each token is stored, how it is rotated, what it may see."""

    slots_N: Tensor
    rotations_N1F: Tensor
    rectangles: tuple[_Rectangle, ...]


class GatherAttention:
    """Gathers each row's context and calls scaled_dot_product_attention: any device and dtype."""

    def __init__(
        self, *, shape: AttentionShape, cache: KVCache, rotations_TF: Tensor, dtype: torch.dtype
    ) -> None:
        """`rotations_TF` is complex: how the head's pairs turn at each position up to the longest context."""
        self._cache = cache
        self._num_heads, self._num_kv_heads, self._head_width = (
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_width,
        )
        self._query_width = shape.num_heads * shape.head_width
        self._rotations_T1F = rotations_TF[:, None, :]
        self._dtype = dtype
        self._device = rotations_TF.device
        self._repeats = shape.num_heads // shape.num_kv_heads

    def arrange(self, tokens: Ragged, classes_B: Ints) -> Arrangement:
        """Put rows in bands: neighbours share one if queries and contexts are of one class and short."""
        counts_B = tokens.counts_B
        lengths_B = length_classes(counts_B)
        is_long_B = lengths_B == len(LENGTH_CLASSES)
        starts_band_B = is_long_B[1:] | (np.diff(lengths_B) != 0) | (np.diff(classes_B) != 0)
        edges = [0, *(np.flatnonzero(starts_band_B) + 1).tolist(), len(counts_B)]
        return _Banded(
            tokens=tokens,
            bands=tuple(self._band(counts_B, *pair) for pair in pairwise(edges)),
        )

    def queries(self, arrangement: Arrangement, slots_BT: Ints, starts_B: Ints) -> Queries:
        """Look up where each row's tokens are stored, and what each query sees."""
        assert isinstance(arrangement, _Banded)
        tokens = arrangement.tokens
        positions_N = starts_B[tokens.rows_N] + tokens.steps_N
        starts_B, ends_B = starts_B + tokens.skipped_B, starts_B + tokens.ends_B
        return _Gathering(
            slots_N=self._on_device(slots_BT[tokens.rows_N, positions_N]),
            rotations_N1F=self._rotations_T1F.index_select(0, self._on_device(positions_N)),
            rectangles=tuple(self._rectangle(band, slots_BT, starts_B, ends_B) for band in arrangement.bands),
        )

    def attend(self, layer: int, qkv_NW: Tensor, queries: Queries) -> Tensor:
        """Rotate queries and keys in place, store keys and values, attend: [N, H·F]."""
        assert isinstance(queries, _Gathering)
        heads_NHF = qkv_NW.view(qkv_NW.shape[0], -1, self._head_width)
        rotate_(heads_NHF[:, : self._num_heads + self._num_kv_heads], queries.rotations_N1F)
        self._cache.store(layer, qkv_NW[:, self._query_width :], queries.slots_N)
        queries_NHF = heads_NHF[:, : self._num_heads]
        if len(queries.rectangles) == 1:
            return self._attend_rectangle(layer, queries_NHF, queries.rectangles[0])
        return torch.cat(
            [
                self._attend_rectangle(layer, queries_NHF[r.band.first : r.band.last], r)
                for r in queries.rectangles
            ]
        )

    def _band(self, counts_B: Ints, first_row: int, last_row: int) -> _Band:
        own_B = counts_B[first_row:last_row]
        num_queries = int(own_B.max())
        steps_BQ = np.minimum(np.arange(num_queries), own_B[:, None] - 1)
        is_ragged = bool((own_B < num_queries).any())
        tokens_BQ = steps_BQ + (np.cumsum(own_B) - own_B)[:, None]
        first = int(counts_B[:first_row].sum())
        return _Band(
            first_row=first_row,
            last_row=last_row,
            first=first,
            last=first + int(own_B.sum()),
            steps_BQ=steps_BQ,
            pad=self._on_device(tokens_BQ.reshape(-1)) if is_ragged else None,
            unpad=self._on_device(np.flatnonzero(np.arange(num_queries) < own_B[:, None]))
            if is_ragged
            else None,
        )

    def _rectangle(self, band: _Band, slots_BT: Ints, starts_B: Ints, ends_B: Ints) -> _Rectangle:
        rows = slice(band.first_row, band.last_row)
        context = int(ends_B[rows].max())
        slots_BT = slots_BT[rows, :context]
        if (ends_B[rows] < context).any():
            # Shorter rows repeat their last slot: what others left behind must not be read, not even masked.
            steps_BT = np.minimum(np.arange(context), ends_B[rows, None] - 1)
            slots_BT = np.take_along_axis(slots_BT, steps_BT, axis=1)
        return _Rectangle(
            band=band,
            context_slots=self._on_device(slots_BT.reshape(-1)),
            mask=self._mask(starts_B[rows, None] + band.steps_BQ, context),
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
        band, groups, width = rectangle.band, self._num_kv_heads, self._head_width
        rows = band.last_row - band.first_row
        if band.pad is not None:
            queries_NHF = queries_NHF[band.pad]
        # Queries that share a key become neighbours in the query dimension, so no key is copied for them.
        grouped = queries_NHF.reshape(rows, -1, groups, self._repeats, width)
        packed = grouped.transpose(1, 2).reshape(rows, groups, -1, width)
        context = (
            self._cache.gather(layer, rectangle.context_slots)
            .view(rows, -1, 2 * groups, width)
            .transpose(1, 2)
        )
        attended = F.scaled_dot_product_attention(
            packed, context[:, :groups], context[:, groups:], attn_mask=rectangle.mask
        )
        unpacked = attended.view(rows, groups, -1, self._repeats, width)
        flat_NW = unpacked.transpose(1, 2).reshape(-1, self._query_width)
        return flat_NW if band.unpad is None else flat_NW[band.unpad]

    def _on_device(self, array: NDArray[np.int64] | NDArray[np.bool_]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def context_classes(contexts_B: Ints) -> Ints:
    """Classes of context lengths: rows of one class differ by a factor of four at most, or are short."""
    classes_B: Ints = np.searchsorted(_CLASS_ENDS, contexts_B)
    return classes_B


def rotate_(heads_NHF: Tensor, rotations_N1F: Tensor) -> None:
    """Rotary embedding in place: neighbouring pairs of each head are complex numbers that turn.

    Checkpoints pair element i with i + F/2; the loader reorders their rows so that pairs are neighbours.
    """
    wide_NHF = heads_NHF if heads_NHF.dtype in (torch.float32, torch.float64) else heads_NHF.float()
    torch.view_as_complex(wide_NHF.view(*wide_NHF.shape[:-1], -1, 2)).mul_(rotations_N1F)
    if wide_NHF is not heads_NHF:
        heads_NHF.copy_(wide_NHF)
