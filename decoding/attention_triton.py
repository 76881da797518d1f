"""Paged attention by Triton kernels: contexts are read where they lie, lengths and block tables on the device.

Knows slots and positions; knows nothing of drafts, requests or which tokens are committed.

Shapes: N query tokens, B rows, W blocks of a row, C tiles of queries, M tokens of split rows, T cache positions,
H query heads, G key/value heads, R = H / G queries that share a key, F head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decoding import triton_kernels
from decoding.attention import Arrangement, AttentionShape, Queries
from decoding.kv_cache import KVCache
from decoding.ragged import Ints, Ragged

# Sizes are chosen by shape, never by a timing, so that the same request takes the same operations everywhere.

_MOST_SPLIT_QUERIES: Final = 32
"""Rows with more queries than this fill the device with tiles; their contexts are not split besides."""

_SHORT_TILE: Final = 16
"""Queries times R in a tile of the other rows: the least that tensor cores multiply."""

_LONG_TILE: Final = 64
"""The same for long rows, prompts: their queries share most of what they read."""

_LONG_WIDE_TILE: Final = 32
"""The same in float32, which is not multiplied by tensor cores and takes twice the registers."""

_LEAST_PART: Final = 128
_MOST_PARTS: Final = 16
"""A split context is cut into parts of 128 positions, or of double that until 16 parts hold it."""

_PARTING: Final = {"LEAST_PART": _LEAST_PART, "MOST_PARTS": _MOST_PARTS}

_MOST_KEYS: Final = 64
_KEY_BYTES: Final = 16 * 1024
"""Keys read at once: so many positions, or so many bytes; and as many values, which lie beside them."""

_STORED_AT_ONCE: Final = 2048
"""Numbers that one program rotates and stores."""


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Queries of some rows in tiles of one height; `tokens_M` are all tokens that they cover, in order."""

    height: int
    tiles_C5: Tensor
    tokens_M: Tensor


@dataclass(frozen=True, slots=True)
class _Tiled(Arrangement):
    """On the device: row and step of each token, and which tile computes which queries."""

    rows_N: Tensor
    steps_N: Tensor
    short: _Tiles | None
    long: _Tiles | None


@dataclass(frozen=True, slots=True)
class _Scratch:
    """Sums of parts and their (peak, total) until they are joined; every layer of a step uses the same."""

    parts_MHPF: Tensor
    weights_MHP2: Tensor

    @property
    def num_parts(self) -> int:
        """Parts that the longest context is cut into at most."""
        return self.parts_MHPF.shape[2]


@dataclass(frozen=True, slots=True)
class _Paged(Queries):
    """Contexts at their positions; X = 2 + W: a row's start, its length after this step, its blocks."""

    tiled: _Tiled
    contexts_BX: Tensor
    scratch: _Scratch | None


@dataclass(frozen=True, slots=True)
class _LayerStep:
    """A step's tensors in one layer."""

    qkv_NW: Tensor
    cache_SW: Tensor
    out_NW: Tensor
    queries: _Paged

    @property
    def contexts(self) -> tuple[Tensor, int]:
        """Each row's start, length and blocks; and how long a row of these is."""
        return self.queries.contexts_BX, self.queries.contexts_BX.shape[1]


class TritonAttention:
    """Attends paged contexts in place: any group size and head width, float16, bfloat16 or float32.

    Whatever stands beside a row, its queries are computed by the same operations.
    """

    def __init__(
        self, *, shape: AttentionShape, cache: KVCache, rotations_TF: Tensor, block_size: int
    ) -> None:
        """`rotations_TF` as in GatherAttention; slots are those of blocks of `block_size`."""
        self._shape = shape
        self._cache = cache
        self._block_size = block_size
        self._device = rotations_TF.device
        self._item_bytes = cache.layer(0).itemsize
        self._turns_TF2 = torch.view_as_real(rotations_TF.to(torch.complex64)).contiguous()
        self._repeats = shape.num_heads // shape.num_kv_heads
        self._head_pad = max(16, _power_of_two(shape.head_width))
        self._heads = {
            "NUM_HEADS": shape.num_heads,
            "HEAD_WIDTH": shape.head_width,
            "HEAD_PAD": self._head_pad,
        }
        self._paging = {"NUM_KV_HEADS": shape.num_kv_heads, "BLOCK_SIZE": block_size}

    def arrange(self, tokens: Ragged, classes_B: Ints) -> Arrangement:
        """Cut the queries into tiles; lengths of contexts do not matter."""
        is_long_B = tokens.counts_B > _MOST_SPLIT_QUERIES
        return _Tiled(
            tokens=tokens,
            rows_N=self._on_device(tokens.rows_N),
            steps_N=self._on_device(tokens.steps_N),
            short=self._tiles(tokens, ~is_long_B, _SHORT_TILE),
            long=self._tiles(tokens, is_long_B, _LONG_TILE if self._item_bytes == 2 else _LONG_WIDE_TILE),
        )

    def queries(self, arrangement: Arrangement, slots_BT: Ints, starts_B: Ints) -> Queries:
        """Send positions and blocks to the device, in one copy."""
        assert isinstance(arrangement, _Tiled)
        lengths_B = starts_B + arrangement.tokens.ends_B
        blocks_BW = slots_BT[:, :: self._block_size] // self._block_size
        return _Paged(
            tiled=arrangement,
            contexts_BX=self._on_device(np.column_stack((starts_B, lengths_B, blocks_BW))),
            scratch=self._scratch(arrangement.short, int(lengths_B.max())),
        )

    def standing(self, arrangement: Arrangement, contexts_BX: Tensor) -> Queries:
        """Queries that stand where `contexts_BX` says when kernels run; contexts may be as long as any."""
        assert isinstance(arrangement, _Tiled)
        scratch = self._scratch(arrangement.short, len(self._turns_TF2))
        return _Paged(tiled=arrangement, contexts_BX=contexts_BX, scratch=scratch)

    def attend(self, layer: int, qkv_NW: Tensor, queries: Queries) -> Tensor:
        """Rotate queries in place, store rotated keys and values, attend: [N, H·F]."""
        assert isinstance(queries, _Paged)
        assert qkv_NW.is_contiguous()
        step = _LayerStep(
            qkv_NW=qkv_NW,
            cache_SW=self._cache.layer(layer),
            out_NW=qkv_NW.new_empty(len(qkv_NW), self._shape.num_heads * self._shape.head_width),
            queries=queries,
        )
        # Triton launches on the current CUDA device, which need not be the tensors' own; −1 changes nothing.
        with torch.cuda.device(qkv_NW.get_device()):
            self._launch(step)
        return step.out_NW

    def warm_up(self) -> None:
        """Compile what steps need, so that none waits for it. Overwrites what the first block holds."""
        long = _MOST_SPLIT_QUERIES + 1
        self._try(counts=(long, 1), lengths=(long, long))
        self._try(counts=(1,), lengths=(_LEAST_PART + 1,))

    def _try(self, *, counts: tuple[int, ...], lengths: tuple[int, ...]) -> None:
        """Attend once, as far as contexts of these lengths can be, in the first layer."""
        longest = len(self._turns_TF2)
        counts_B, lengths_B = np.minimum(counts, longest), np.minimum(lengths, longest)
        tokens = Ragged.of(counts_B)
        slots_BT = np.zeros((len(counts), longest), dtype=np.int64)
        queries = self.queries(self.arrange(tokens, np.zeros_like(counts_B)), slots_BT, lengths_B - counts_B)
        width = self._shape.num_heads * self._shape.head_width + self._shape.slot_width
        self.attend(0, self._cache.layer(0).new_zeros(int(counts_B.sum()), width), queries)

    def _launch(self, step: _LayerStep) -> None:
        tiled, scratch = step.queries.tiled, step.queries.scratch
        self._store(step)
        if tiled.long is not None:
            self._attend(step, tiled.long, scratch=None)
        if tiled.short is not None:
            self._attend(step, tiled.short, scratch=scratch)
            if scratch is not None:
                self._join(step, tiled.short, scratch)

    def _store(self, step: _LayerStep) -> None:
        num_tokens, width = step.qkv_NW.shape
        num_heads = width // self._shape.head_width
        heads = min(_power_of_two(num_heads), max(1, _STORED_AT_ONCE // self._head_pad))
        triton_kernels.rotate_and_store[num_tokens, -(-num_heads // heads)](
            step.qkv_NW,
            step.cache_SW,
            self._turns_TF2,
            step.queries.tiled.rows_N,
            step.queries.tiled.steps_N,
            *step.contexts,
            **self._heads,
            **self._paging,
            HEADS=heads,
        )

    def _attend(self, step: _LayerStep, tiles: _Tiles, scratch: _Scratch | None) -> None:
        grid = (len(tiles.tiles_C5), self._shape.num_kv_heads, 1 if scratch is None else scratch.num_parts)
        triton_kernels.attend_tile[grid](
            step.out_NW,
            # Of a result that is whole, neither is written.
            step.out_NW if scratch is None else scratch.parts_MHPF,
            step.out_NW if scratch is None else scratch.weights_MHP2,
            step.qkv_NW,
            step.cache_SW,
            tiles.tiles_C5,
            *step.contexts,
            math.log2(math.e) / math.sqrt(self._shape.head_width),
            **self._heads,
            **self._paging,
            **_PARTING,
            TILE_M=tiles.height,
            TILE_N=min(_MOST_KEYS, _KEY_BYTES // (self._head_pad * self._item_bytes)),
            IS_SPLIT=scratch is not None,
        )

    def _join(self, step: _LayerStep, tiles: _Tiles, scratch: _Scratch) -> None:
        triton_kernels.join_parts[len(tiles.tokens_M), self._shape.num_heads](
            step.out_NW,
            scratch.parts_MHPF,
            scratch.weights_MHP2,
            tiles.tokens_M,
            step.queries.tiled.rows_N,
            step.queries.tiled.steps_N,
            *step.contexts,
            scratch.num_parts,
            **self._heads,
            **_PARTING,
        )

    def _tiles(self, tokens: Ragged, is_chosen_B: NDArray[np.bool_], height: int) -> _Tiles | None:
        """Tiles of the chosen rows: [row, first token, its step, number of queries, index in `tokens_M`]."""
        if not is_chosen_B.any():
            return None
        height = max(height, _power_of_two(self._repeats))
        per_tile = height // self._repeats
        chosen_B = np.where(is_chosen_B, tokens.counts_B, 0)
        tiles = Ragged.of(-(-chosen_B // per_tile))
        rows_C, offsets_C = tiles.rows_N, tiles.steps_N * per_tile
        steps_C = tokens.skipped_B[rows_C] + offsets_C
        tiles_C5 = (
            rows_C,
            tokens.firsts_B[rows_C] + steps_C,
            steps_C,
            np.minimum(per_tile, chosen_B[rows_C] - offsets_C),
            (np.cumsum(chosen_B) - chosen_B)[rows_C] + offsets_C,
        )
        return _Tiles(
            height=height,
            tiles_C5=self._on_device(np.column_stack(tiles_C5)),
            tokens_M=self._on_device(np.flatnonzero(is_chosen_B[tokens.rows_N])),
        )

    def _scratch(self, tiles: _Tiles | None, longest: int) -> _Scratch | None:
        if tiles is None or longest <= _LEAST_PART:
            return None
        num_parts = min(_MOST_PARTS, -(-longest // _LEAST_PART))
        shape = (len(tiles.tokens_M), self._shape.num_heads, num_parts)
        return _Scratch(
            parts_MHPF=torch.empty(*shape, self._shape.head_width, device=self._device),
            weights_MHP2=torch.empty(*shape, 2, device=self._device),
        )

    def _on_device(self, array: Ints) -> Tensor:
        # From memory that is not pinned, CUDA copies aside at once and does not make the host wait.
        return torch.from_numpy(array.astype(np.int32, order="C")).to(self._device, non_blocking=True)


def _power_of_two(number: int) -> int:
    """The least power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()
