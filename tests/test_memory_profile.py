"""The largest step that the settings allow, which is what memory is kept free for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from config.settings import EngineSettings
from decoding.capacity import Capacity
from decoding.checkpoint import open_checkpoint
from decoding.engine import Engine
from decoding.memory_profile import activation_bytes, least_capacity, run_largest_step
from decoding.runtime import build_decoder
from tests.tiny import make_checkpoint

MiB = 1 << 20


@pytest.mark.parametrize(
    ("rows", "tokens", "block_size", "num_choosing"),
    [(1, 37, 16, 3), (4, 4, 1, 4), (7, 40, 4, 21), (3, 64, 64, 9), (64, 64, 16, 64)],
)
def test_it_fills_the_budget_and_fits_the_cache_it_asks_for(
    tmp_path: Path, rows: int, tokens: int, block_size: int, num_choosing: int
) -> None:
    settings = EngineSettings(
        model=str(make_checkpoint(tmp_path, vocab=61)),
        num_threads=1,
        max_num_seqs=rows,
        max_num_batched_tokens=tokens,
        block_size=block_size,
        max_draft_length=2,
        draft_length=0,
        exit_layer=1,
    )
    weights = Engine.load(settings).runtime.model.weights
    asked: list[Capacity] = []

    def built(capacity: Capacity):
        asked.append(capacity)
        return build_decoder(settings, open_checkpoint(settings.model, revision=None), capacity, weights)

    # A CPU is not measured; the step is the same.
    assert activation_bytes(settings, built, torch.device("cpu")) == 0
    assert not asked
    assert run_largest_step(settings, *built(least_capacity(settings))) == num_choosing
    assert asked[0].num_slots >= tokens


@pytest.mark.gpu
def test_a_device_keeps_at_least_the_logits_free(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    folder = make_checkpoint(tmp_path, vocab=32_000, hidden=64)
    settings = EngineSettings(model=str(folder), device="cuda", max_num_batched_tokens=512, num_blocks=64)
    engine = Engine.load(settings)
    weights = engine.runtime.model.weights

    def built(capacity: Capacity):
        return build_decoder(settings, open_checkpoint(str(folder), revision=None), capacity, weights)

    taken = activation_bytes(settings, built, torch.device("cuda"))
    assert 512 * 32_000 * 4 < taken < 1024 * MiB
