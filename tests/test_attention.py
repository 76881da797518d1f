"""Ragged paged attention against one query at a time: rotate, look back, softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from decoding.attention import AttentionShape, GatherAttention, context_classes, rotate_
from decoding.kv_cache import KVCache, slot_bytes
from decoding.ragged import Ragged

LONGEST = 120
NUM_LAYERS = 2
GROUPED = AttentionShape(num_heads=6, num_kv_heads=2, head_width=4)
MULTI_HEAD = AttentionShape(num_heads=3, num_kv_heads=3, head_width=6)
ONE_KEY = AttentionShape(num_heads=4, num_kv_heads=1, head_width=2)


def fused_width(shape: AttentionShape) -> int:
    """Queries, keys and values of one token side by side."""
    return (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_width


def turns(width: int) -> Tensor:
    """Complex rotations [T, F/2] with a frequency of its own for each pair."""
    frequencies = 0.9 ** torch.arange(width // 2, dtype=torch.float64)
    angles = torch.outer(torch.arange(LONGEST, dtype=torch.float64), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def rotated(head_F: np.ndarray, position: int) -> np.ndarray:
    """Neighbouring pairs turned by position · frequency, with the two-by-two rotation written out."""
    out = np.empty_like(head_F)
    for pair in range(len(head_F) // 2):
        angle = position * 0.9**pair
        x, y = head_F[2 * pair], head_F[2 * pair + 1]
        out[2 * pair] = x * math.cos(angle) - y * math.sin(angle)
        out[2 * pair + 1] = x * math.sin(angle) + y * math.cos(angle)
    return out


@dataclass
class Row:
    """A row's whole history: fused queries, keys and values [T, (H + 2G)·F], and its slots [T]."""

    fused: np.ndarray
    slots: np.ndarray

    def attended(self, shape: AttentionShape, position: int) -> np.ndarray:
        """One position's output, from its definition."""
        heads = self.fused.reshape(len(self.fused), -1, shape.head_width)
        out = []
        for head in range(shape.num_heads):
            group = head // (shape.num_heads // shape.num_kv_heads)
            query = rotated(heads[position, head], position)
            keys = [rotated(heads[t, shape.num_heads + group], t) for t in range(position + 1)]
            values = heads[: position + 1, shape.num_heads + shape.num_kv_heads + group]
            scores = np.array([query @ key for key in keys]) / math.sqrt(shape.head_width)
            weights = np.exp(scores - scores.max())
            out.append(weights @ values / weights.sum())
        return np.concatenate(out)


class Bench:
    """Rows in a shared cache whose slots are shuffled, so that nothing works by accident of order."""

    def __init__(self, shape: AttentionShape, lengths: list[int], seed: int) -> None:
        self.shape = shape
        rng = np.random.default_rng(seed)
        num_slots = sum(lengths) + 10
        slots = rng.permutation(num_slots)
        ends = np.cumsum(lengths)
        self.rows = [
            Row(rng.normal(size=(length, fused_width(shape))), slots[end - length : end])
            for length, end in zip(lengths, ends, strict=True)
        ]
        self.cache = KVCache(
            num_layers=NUM_LAYERS,
            num_slots=num_slots,
            slot_width=shape.slot_width,
            dtype=torch.float64,
            device=torch.device("cpu"),
        )
        # What earlier sequences left in the cache must not be read.
        for layer in range(NUM_LAYERS):
            self.cache.store(
                layer,
                torch.full((num_slots, shape.slot_width), 1e3, dtype=torch.float64),
                torch.arange(num_slots),
            )
        self.attention = GatherAttention(
            shape=shape, cache=self.cache, rotations_TF=turns(shape.head_width), dtype=torch.float64
        )

    def feed(
        self, starts: list[int], counts: list[int], rows: list[int] | None = None, layer: int = 1
    ) -> None:
        """Attend `counts` positions of each row from `starts` on, and compare all outputs."""
        chosen = [self.rows[i] for i in (range(len(self.rows)) if rows is None else rows)]
        width = max(start + count for start, count in zip(starts, counts, strict=True)) + 3
        slots_BT = np.zeros((len(chosen), width), dtype=np.int64)
        for row, end, slots_T in zip(
            chosen, (s + c for s, c in zip(starts, counts, strict=True)), slots_BT, strict=True
        ):
            slots_T[:end] = row.slots[:end]
        spans = list(zip(chosen, starts, counts, strict=True))
        qkv_NW = torch.from_numpy(np.concatenate([row.fused[s : s + c] for row, s, c in spans]))
        contexts_B = np.array(starts) + np.array(counts)
        arrangement = self.attention.arrange(Ragged.of(np.array(counts)), context_classes(contexts_B))
        queries = self.attention.queries(arrangement, slots_BT, np.array(starts))
        got = self.attention.attend(layer, qkv_NW, queries)
        expected = [row.attended(self.shape, t) for row, s, c in spans for t in range(s, s + c)]
        np.testing.assert_allclose(got.numpy(), np.array(expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [GROUPED, MULTI_HEAD, ONE_KEY], ids=["grouped", "multi-head", "one key"])
@pytest.mark.parametrize("seed", range(6))
def test_random_mixes_of_rows_equal_attention_one_query_at_a_time(shape: AttentionShape, seed: int) -> None:
    """Rows advance by runs of random length: prompts in chunks, single tokens, drafts; some pause."""
    rng = np.random.default_rng(100 + seed)
    lengths = rng.integers(1, 60, size=5).tolist()
    bench = Bench(shape, lengths, seed)
    computed = [0] * 5
    while any(done < length for done, length in zip(computed, lengths, strict=True)):
        active = [i for i in rng.permutation(5).tolist() if computed[i] < lengths[i] and rng.random() < 0.8]
        if not active:
            continue
        wanted = rng.choice([1, 1, 3, 5, 40], size=len(active)).tolist()
        counts = [min(count, lengths[i] - computed[i]) for i, count in zip(active, wanted, strict=True)]
        bench.feed([computed[i] for i in active], counts, active)
        for i, count in zip(active, counts, strict=True):
            computed[i] += count


@pytest.mark.parametrize(
    "counts",
    [
        [1, 1, 1],
        [4, 4, 4],
        [1, 5, 2],
        [32, 1, 32],
        [33, 1, 2],
        [1, 2, 33],
        [1, 40, 1],
        [50, 60, 70],
        [70],
        [1],
    ],
    ids=str,
)
@pytest.mark.parametrize("start", [0, 9])
def test_every_layout_of_rectangles_gives_the_same(counts: list[int], start: int) -> None:
    """Equal rows, padded rows, and long rows first, last, between and alone, with and without a context."""
    bench = Bench(GROUPED, [start + count for count in counts], seed=3)
    if start:
        bench.feed([0] * len(counts), [start] * len(counts))
    bench.feed([start] * len(counts), counts)


def test_rows_of_different_contexts_do_not_see_each_others_padding() -> None:
    """The shortest row's padded context reaches over slots that are another row's."""
    bench = Bench(GROUPED, [3, 50, 20], seed=4)
    bench.feed([0, 0, 0], [2, 49, 19])
    bench.feed([2, 49, 19], [1, 1, 1])


def test_recomputed_positions_overwrite_what_refused_drafts_stored() -> None:
    bench = Bench(GROUPED, [30, 12], seed=5)
    bench.feed([0, 0], [20, 8])
    truth = bench.rows[0].fused.copy()
    bench.rows[0].fused[20:25] += 1
    bench.feed([20, 8], [5, 2])
    bench.rows[0].fused[:] = truth
    bench.feed([20, 10], [6, 1])


def test_keys_and_values_are_stored_in_the_slots_of_their_tokens_and_in_one_layer() -> None:
    bench = Bench(GROUPED, [5], seed=6)
    row, shape = bench.rows[0], bench.shape
    bench.feed([0], [5], layer=1)
    stored = bench.cache.gather(1, torch.from_numpy(row.slots)).numpy()
    heads = row.fused.reshape(5, -1, shape.head_width)
    for t in range(5):
        keys = [rotated(head, t) for head in heads[t, shape.num_heads :][: shape.num_kv_heads]]
        values = heads[t, shape.num_heads + shape.num_kv_heads :]
        np.testing.assert_allclose(stored[t], np.concatenate([*keys, *values]), atol=1e-12)
    untouched = np.setdiff1d(np.arange(15), row.slots)
    assert (bench.cache.gather(1, torch.from_numpy(untouched)) == 1e3).all()
    assert (bench.cache.gather(0, torch.arange(15)) == 1e3).all()


def test_a_gathered_context_is_a_copy() -> None:
    cache = KVCache(num_layers=1, num_slots=4, slot_width=2, dtype=torch.float32, device=torch.device("cpu"))
    cache.store(0, torch.tensor([[1.0, 2.0]]), torch.tensor([2]))
    cache.gather(0, torch.tensor([2, 2])).zero_()
    assert cache.gather(0, torch.tensor([2])).tolist() == [[1.0, 2.0]]


def test_a_position_takes_a_key_and_a_value_in_every_layer() -> None:
    width = GROUPED.slot_width
    assert width == 2 * 2 * 4
    assert slot_bytes(num_layers=3, slot_width=width, dtype=torch.bfloat16) == 3 * width * 2


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_short_dtypes_are_rotated_in_float32(dtype: torch.dtype, tolerance: float) -> None:
    """One rounding at the end, none between."""
    generator = torch.Generator().manual_seed(7)
    heads = torch.randn(5, 2, 4, generator=generator).to(dtype)
    expected = np.array([[rotated(h, t) for h in row] for t, row in enumerate(heads.double().numpy())])
    rotate_(heads, turns(4)[:5, None].to(torch.complex64))
    assert (np.abs(heads.double().numpy() - expected) <= tolerance * np.abs(expected) + 1e-7).all()


def test_a_long_context_does_not_widen_those_of_short_neighbours() -> None:
    contexts_B = np.array([60, 512, 513, 2048, 2049, 9000, 100])
    assert context_classes(contexts_B).tolist() == [0, 0, 1, 1, 2, 3, 0]
