"""Triton's kernels against gathered attention in float64: on CUDA, or on a CPU where Triton interprets them.

`test_attention_triton` runs this file in a process of its own: interpreting is chosen before Triton is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
from torch import Tensor
from triton.runtime import interpreter

from config.setting_types import AttentionKind
from config.settings import EngineSettings
from decoding.attention import Attention, AttentionShape, GatherAttention
from decoding.attention_triton import TritonAttention
from decoding.attentions import make_attention
from decoding.engine import Engine
from decoding.kv_cache import KVCache
from decoding.messages import Generate, SamplingParams
from decoding.ragged import Ragged
from tests.test_attention import turns
from tests.tiny import make_checkpoint

IS_INTERPRETED = triton.knobs.runtime.interpret
DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")
LONGEST = 2200

# What a kernel may differ by from float64: rounding of sums, then of what is rotated, stored and returned.
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SHORT_DTYPES = [torch.float16] if IS_INTERPRETED else [torch.float16, torch.bfloat16]


def _with_scalars_of_one_element(patch):
    """Triton 3.6's interpreter makes loop bounds of arrays by `int`, which NumPy refuses from 2.4 on."""

    def patched(tensor, scope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return patched


interpreter._patch_lang_tensor = _with_scalars_of_one_element(interpreter._patch_lang_tensor)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN: what is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass
class Rows:
    """Rows in blocks that lie anywhere; every slot that holds no position yet is NaN."""

    shape: AttentionShape
    dtype: torch.dtype
    starts: list[int]
    counts: list[int]
    skipped: list[int]
    block_size: int
    slots_BT: np.ndarray
    stored_SW: Tensor
    qkv_NW: Tensor

    @classmethod
    def random(
        cls,
        shape: AttentionShape,
        starts: list[int],
        counts: list[int],
        *,
        block_size: int = 16,
        skipped: list[int] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Rows:
        rng = np.random.default_rng(len(starts) + sum(starts) + shape.num_heads)
        skipped = skipped or [0] * len(starts)
        ends = np.array(starts) + counts + skipped
        # One block more than the longest row needs, so that all tables have columns to spare.
        blocks = -(-int(ends.max()) // block_size) + 1
        table = rng.permutation(len(starts) * blocks).reshape(len(starts), blocks)
        slots_BT = (table[:, :, None] * block_size + np.arange(block_size)).reshape(len(starts), -1)
        stored_SW = torch.full((table.size * block_size, shape.slot_width), torch.nan, dtype=dtype)
        for slots_T, start, skip in zip(slots_BT, starts, skipped, strict=True):
            kept_TW = torch.from_numpy(rng.normal(size=(start + skip, shape.slot_width)))
            stored_SW[slots_T[: start + skip]] = kept_TW.to(dtype)
        width = shape.num_heads * shape.head_width + shape.slot_width
        qkv_NW = torch.from_numpy(rng.normal(size=(sum(counts), width))).to(dtype)
        return cls(shape, dtype, starts, counts, skipped, block_size, slots_BT, stored_SW, qkv_NW)

    def only(self, row: int, count: int) -> Rows:
        """One row with its first queries, over the same cache."""
        first = sum(self.counts[:row])
        return Rows(
            self.shape,
            self.dtype,
            self.starts[row : row + 1],
            [count],
            self.skipped[row : row + 1],
            self.block_size,
            self.slots_BT[row : row + 1],
            self.stored_SW,
            self.qkv_NW[first : first + count],
        )

    def by_triton(self) -> tuple[Tensor, Tensor]:
        """What is attended, and the cache afterwards."""
        cache = self._cache(self.dtype, DEVICE)
        turns_TF = _turns(self.shape.head_width, DEVICE)
        attention = TritonAttention(
            shape=self.shape, cache=cache, rotations_TF=turns_TF, block_size=self.block_size
        )
        return self._attend(attention, cache, self.qkv_NW.to(DEVICE, copy=True))

    def by_reference(self) -> tuple[Tensor, Tensor]:
        """The same in float64 throughout."""
        cpu = torch.device("cpu")
        cache = self._cache(torch.float64, cpu)
        turns_TF = _turns(self.shape.head_width, cpu).to(torch.complex128)
        attention = GatherAttention(shape=self.shape, cache=cache, rotations_TF=turns_TF, dtype=torch.float64)
        return self._attend(attention, cache, self.qkv_NW.double())

    def check(self) -> None:
        attended, stored = self.by_triton()
        expected, expected_stored = self.by_reference()
        tolerance = TOLERANCES[self.dtype]
        torch.testing.assert_close(attended, expected, rtol=0, atol=tolerance)
        # Keys are rounded relative to their size.
        torch.testing.assert_close(stored, expected_stored, rtol=tolerance, atol=tolerance, equal_nan=True)

    def _cache(self, dtype: torch.dtype, device: torch.device) -> KVCache:
        cache = KVCache(
            num_layers=2,
            num_slots=len(self.stored_SW),
            slot_width=self.shape.slot_width,
            dtype=dtype,
            device=device,
        )
        cache.layer(0).fill_(torch.nan)
        cache.layer(1).copy_(self.stored_SW)
        return cache

    def _attend(self, attention: Attention, cache: KVCache, qkv_NW: Tensor) -> tuple[Tensor, Tensor]:
        tokens = Ragged.of(np.array(self.counts), np.array(self.skipped))
        arrangement = attention.arrange(tokens, np.zeros(len(self.counts), dtype=np.int64))
        queries = attention.queries(arrangement, self.slots_BT, np.array(self.starts))
        attended_NW = attention.attend(1, qkv_NW, queries)
        assert cache.layer(0).isnan().all()
        return attended_NW.double().cpu(), cache.layer(1).double().cpu()


def _turns(width: int, device: torch.device) -> Tensor:
    frequencies = 0.9 ** torch.arange(width // 2, dtype=torch.float64)
    angles = torch.outer(torch.arange(LONGEST, dtype=torch.float64), frequencies)
    return torch.polar(torch.ones_like(angles), angles).to(device, torch.complex64)


SHAPES = {
    "multi-head": AttentionShape(2, 2, 8),
    "three share": AttentionShape(6, 2, 16),
    "four share": AttentionShape(4, 1, 64),
    "eight share, width 96": AttentionShape(8, 1, 96),
    "width 128": AttentionShape(2, 1, 128),
    "odd": AttentionShape(10, 2, 6),
    "more share than a tile holds": AttentionShape(17, 1, 4),
}
PLACES = {
    "first tokens": ([0, 0], [1, 2]),
    "ragged, split": ([140, 3, 127], [1, 2, 3]),
    "prompts and tokens": ([0, 20], [34, 1]),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_the_reference(shape: str, place: str) -> None:
    Rows.random(SHAPES[shape], *PLACES[place]).check()


@pytest.mark.parametrize("dtype", SHORT_DTYPES, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_short_dtypes_are_as_near_as_their_rounding(dtype: torch.dtype, place: str) -> None:
    Rows.random(SHAPES["three share"], *PLACES[place], dtype=dtype).check()


@pytest.mark.parametrize("block_size", [1, 5, 64])
def test_any_block_size(block_size: int) -> None:
    Rows.random(SHAPES["three share"], [140, 3], [2, 1], block_size=block_size).check()


def test_tokens_of_a_row_may_be_skipped() -> None:
    Rows.random(SHAPES["three share"], [140, 3, 0], [1, 1, 34], skipped=[4, 2, 3]).check()


def test_parts_of_long_contexts_are_wider() -> None:
    Rows.random(SHAPES["four share"], [2047, 2100, 5], [2, 1, 1], block_size=64).check()


def test_bits_of_a_query_do_not_depend_on_what_stands_beside_it() -> None:
    together = Rows.random(SHAPES["three share"], [140, 3, 127], [3, 2, 33])
    attended = together.by_triton()[0]
    assert torch.equal(attended[:3], together.only(0, 3).by_triton()[0])
    assert torch.equal(attended[:1], together.only(0, 1).by_triton()[0])


def test_float64_is_left_to_the_reference() -> None:
    assert isinstance(_made(torch.float64), GatherAttention)
    assert isinstance(_made(torch.float32), TritonAttention)


def _made(dtype: torch.dtype) -> Attention:
    shape = SHAPES["multi-head"]
    cache = KVCache(num_layers=1, num_slots=160, slot_width=shape.slot_width, dtype=dtype, device=DEVICE)
    turns_TF = turns(shape.head_width).to(DEVICE, torch.complex64)
    return make_attention(
        AttentionKind.TRITON, shape=shape, cache=cache, rotations_TF=turns_TF, block_size=16
    )


def test_an_engine_decodes_the_same_tokens(tmp_path: Path) -> None:
    """Prompts of different lengths, drafted at an exit layer and decoded together, in float32."""
    folder = make_checkpoint(tmp_path, num_layers=3, hidden=16, heads=2, kv_heads=1, vocab=31)
    torch.use_deterministic_algorithms(False)
    triton_tokens, drafted, kept = _decoded(folder, AttentionKind.TRITON)
    gathered_tokens, _, _ = _decoded(folder, AttentionKind.GATHER)
    assert triton_tokens == gathered_tokens
    assert 0 < kept < drafted


def _decoded(folder: Path, attention: AttentionKind) -> tuple[list[list[int]], int, int]:
    """Tokens of each request, and how many were drafted and kept."""
    engine = Engine.load(
        EngineSettings(
            model=str(folder),
            dtype="float32",
            device=DEVICE.type,
            num_threads=1,
            num_blocks=16,
            block_size=4,
            max_model_len=48,
            exit_layer=2,
            draft_length=2,
            attention=attention,
        )
    )
    requests = [
        Generate(
            sequence_id=i,
            prompt_ids=list(range(1 + i, 4 + 3 * i)),
            max_new_tokens=6,
            sampling=SamplingParams(temperature=0.0),
            seed=i,
            stop_token_ids=[],
        )
        for i in range(2)
    ]
    events = list(engine.generate(requests).values())
    tokens = [[t for event in own for t in event.token_ids] for own in events]
    flat = [event for own in events for event in own]
    return tokens, sum(event.drafted for event in flat), sum(event.kept for event in flat)
