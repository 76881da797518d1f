"""Steps are measured within whatever one step may hold, and not where there is nothing to choose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from config.settings import EngineSettings
from decoding.blocks import BlockPool
from decoding.capacity import Capacity
from decoding.choice import DraftChooser, FixedChoice
from decoding.controller import Controller
from decoding.engine import Engine
from decoding.exits import resolve_speculation
from decoding.planning import StepLimits
from decoding.scheduler import Scheduler
from decoding.warm_up import Warmup
from tests.tiny import make_checkpoint

NUM_LAYERS, CAPACITY = 2, Capacity(max_model_len=64, block_size=16, num_blocks=1024)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = make_checkpoint(tmp_path_factory.mktemp("warm-up"), num_layers=NUM_LAYERS, vocab=61)
    return Engine.load(_settings(folder))


def _settings(folder: Path | str, **changes: int) -> EngineSettings:
    values = {"num_threads": 1, "num_blocks": CAPACITY.num_blocks, "max_model_len": 64} | changes
    return EngineSettings.model_validate({"model": str(folder), "dtype": "float64"} | values)


def warmed_up(engine: Engine, **changes: int) -> tuple[DraftChooser, int]:
    """Who chooses, and how many shapes were measured by a clock that stands still, so that none is left out."""
    settings = _settings(engine.ready.model, **changes)
    num_measured = 0

    def scheduler(chooser: DraftChooser) -> Scheduler:
        nonlocal num_measured
        num_measured += 1
        limits = StepLimits(settings.max_num_seqs, settings.max_num_batched_tokens)
        pool = BlockPool(num_blocks=CAPACITY.num_blocks, block_size=CAPACITY.block_size)
        return Scheduler(pool, limits, chooser, device=torch.device("cpu"), clock=lambda: 0.0)

    warmup = Warmup(
        settings, CAPACITY, resolve_speculation(settings, num_layers=NUM_LAYERS), num_layers=NUM_LAYERS
    )
    chooser = warmup.chooser(engine.runtime.cycle, scheduler, clock=lambda: 0.0)
    return chooser, num_measured


@pytest.mark.parametrize(("rows", "budget"), [(1, 2), (10, 11), (16, 17), (33, 38), (64, 65), (64, 90)])
def test_a_budget_hardly_above_the_rows_can_be_measured(engine: Engine, rows: int, budget: int) -> None:
    """Prompts that come in slowly could outlast the first rows, and no step would hold all rows of a shape."""
    chooser, num_measured = warmed_up(engine, max_num_seqs=rows, max_num_batched_tokens=budget)
    assert isinstance(chooser, Controller)
    assert num_measured >= 2


def test_a_usual_budget_is_measured_up_to_all_of_its_rows(engine: Engine) -> None:
    assert warmed_up(engine, max_num_seqs=64, max_num_batched_tokens=512)[1] == 33


def test_nothing_is_measured_where_nothing_can_be_drafted(engine: Engine) -> None:
    for changes in ({"max_draft_length": 0}, {"max_num_seqs": 1, "max_num_batched_tokens": 1}):
        chooser, num_measured = warmed_up(engine, **changes)
        assert isinstance(chooser, FixedChoice)
        assert num_measured <= 1
