"""Measures the paged attention kernels: how far they are from gathered attention, and how fast they read.

Knows caches and attentions; knows no model.

Shapes: N query tokens, B rows, T cache positions, S slots, W = 2·G·F numbers of a slot.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_device import Device, Row, gb_per_s
from decoding.attention import Attention, AttentionShape, GatherAttention, context_classes
from decoding.attention_triton import TritonAttention
from decoding.kv_cache import KVCache
from decoding.ragged import Ints, Ragged

_BLOCK: Final = 16
_MOST_COMPARED: Final = 1 << 17
"""Positions of all rows up to which float64 is computed beside."""

_MOST_SLOTS: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Case:
    """So many rows, each with a context and a number of queries at its end."""

    batch: int
    context: int
    queries: int

    @property
    def blocks_per_row(self) -> int:
        return -(-(self.context + self.queries) // _BLOCK)

    @property
    def num_slots(self) -> int:
        return self.batch * self.blocks_per_row * _BLOCK

    def slots(self) -> Ints:
        """Slots of every row's positions, [B, T]; blocks lie in random order, as they do after a while."""
        order = np.random.default_rng(0).permutation(self.batch * self.blocks_per_row)
        blocks_BW = order.reshape(self.batch, self.blocks_per_row, 1)
        return (blocks_BW * _BLOCK + np.arange(_BLOCK)).reshape(self.batch, -1)


def cases(batches: tuple[int, ...], contexts: tuple[int, ...], queries: tuple[int, ...]) -> Iterator[Case]:
    """The grid, without what would need a cache beyond all use."""
    for batch in batches:
        for context in contexts:
            for count in queries:
                case = Case(batch, context, count)
                if case.num_slots <= _MOST_SLOTS:
                    yield case


def measure_kernels(
    device: Device, shape: AttentionShape, dtype: torch.dtype, grid: Iterator[Case]
) -> Iterator[Row]:
    """Error and time of every case."""
    for case in grid:
        step = _Step.random(case, shape, device.torch, dtype)
        yield {
            "batch": case.batch,
            "context": case.context,
            "queries": case.queries,
            "heads": f"{shape.num_heads}/{shape.num_kv_heads}x{shape.head_width}",
            **step.errors(),
            **step.times(device),
        }
        del step
        device.forget()


@dataclass(frozen=True, slots=True)
class _Step:
    """One layer's step of a case on random keys, values and queries."""

    case: Case
    shape: AttentionShape
    stored_SW: Tensor
    qkv_NW: Tensor
    turns_TF: Tensor

    @classmethod
    def random(cls, case: Case, shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> _Step:
        torch.manual_seed(0)
        width = shape.num_heads * shape.head_width + shape.slot_width
        frequencies = 0.9 ** torch.arange(shape.head_width // 2, dtype=torch.float64)
        angles = torch.outer(torch.arange(case.context + case.queries, dtype=torch.float64), frequencies)
        return cls(
            case,
            shape,
            torch.randn(case.num_slots, shape.slot_width, device=device, dtype=dtype),
            torch.randn(case.batch * case.queries, width, device=device, dtype=dtype),
            torch.polar(torch.ones_like(angles), angles).to(device),
        )

    def errors(self) -> Row:
        """Largest difference from gathering in float64, of the kernels and of gathering in their dtype."""
        if self.case.batch * self.case.context > _MOST_COMPARED:
            return {}
        exact = self._attended(self._gather(torch.float64), torch.float64)
        return {
            "max_error": float((self._attended(self._triton(), self.qkv_NW.dtype) - exact).abs().max()),
            "max_error_gather": float(
                (self._attended(self._gather(self.qkv_NW.dtype), self.qkv_NW.dtype) - exact).abs().max()
            ),
        }

    def times(self, device: Device) -> Row:
        """As launched, and as replayed in a graph. A step reads all keys and values, and writes its own."""
        attention = self._triton()
        queries = self._queries(attention)
        # Rotated in place again and again: values stay of the same size.
        launched_ms = device.launched_ms(lambda: attention.attend(0, self.qkv_NW, queries))
        graph_ms = device.time_ms(lambda: attention.attend(0, self.qkv_NW, queries))
        case, itemsize = self.case, self.stored_SW.itemsize
        num_bytes = case.batch * (case.context + case.queries) * self.shape.slot_width * itemsize
        return {
            "ms": round(launched_ms, 5),
            "graph_ms": round(graph_ms, 5),
            "GB_per_s": round(gb_per_s(num_bytes, launched_ms), 1),
            "graph_GB_per_s": round(gb_per_s(num_bytes, graph_ms), 1),
        }

    def _attended(self, made: Attention, dtype: torch.dtype) -> Tensor:
        qkv_NW = self.qkv_NW.to(dtype, copy=True)
        return made.attend(0, qkv_NW, self._queries(made)).double()

    def _queries(self, attention: Attention) -> object:
        counts_B = np.full(self.case.batch, self.case.queries, dtype=np.int64)
        starts_B = np.full(self.case.batch, self.case.context, dtype=np.int64)
        arrangement = attention.arrange(Ragged.of(counts_B), context_classes(starts_B + counts_B))
        return attention.queries(arrangement, self.case.slots(), starts_B)

    def _cache(self, dtype: torch.dtype) -> KVCache:
        cache = KVCache(
            num_layers=1,
            num_slots=len(self.stored_SW),
            slot_width=self.shape.slot_width,
            dtype=dtype,
            device=self.stored_SW.device,
        )
        cache.layer(0).copy_(self.stored_SW)
        return cache

    def _triton(self) -> Attention:
        return TritonAttention(
            shape=self.shape,
            cache=self._cache(self.stored_SW.dtype),
            rotations_TF=self.turns_TF.to(torch.complex64),
            block_size=_BLOCK,
        )

    def _gather(self, dtype: torch.dtype) -> Attention:
        turns = self.turns_TF if dtype == torch.float64 else self.turns_TF.to(torch.complex64)
        return GatherAttention(shape=self.shape, cache=self._cache(dtype), rotations_TF=turns, dtype=dtype)
