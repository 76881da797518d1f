"""Requests of one step may ask for different exit layers: each drafts at its own, or all at one of those."""

from __future__ import annotations

import pytest
import torch

from decoding.blocks import BlockPool
from decoding.choice import FixedChoice
from decoding.messages import Generate, SamplingParams
from decoding.plan import Plan
from decoding.planning import StepLimits
from decoding.scheduler import Scheduler
from tests.test_scheduler import refused


def scheduler(*, promotes: bool) -> Scheduler:
    pool = BlockPool(num_blocks=4096, block_size=16)
    return Scheduler(
        pool,
        StepLimits(64, 512, promotes),
        FixedChoice(exit_layer=2, draft_length=3),
        device=torch.device("cpu"),
        clock=lambda: 0.0,
    )


def request(sequence_id: int, exit_layer: int | None, draft_length: int | None) -> Generate:
    prompt_ids = [1000 * sequence_id + i for i in range(4)]
    sampling = SamplingParams(temperature=0.0)
    return Generate(sequence_id, prompt_ids, 100, sampling, 0, [], exit_layer, draft_length)


def decoding_plan(under_test: Scheduler, *requests: Generate) -> Plan:
    """The first plan after the prompts are computed."""
    for each in requests:
        under_test.submit(each)
    for _ in range(2):
        plan = under_test.plan()
        assert plan is not None
        under_test.commit(refused(plan))
    return plan


def drafts(plan: Plan) -> dict[int, tuple[int, int]]:
    """Exit layer and draft length of each row that drafts, by sequence id."""
    columns = (plan.sequence_ids, plan.exit_layers_B.tolist(), plan.draft_lengths_B.tolist())
    return {row: (layer, length) for row, layer, length in zip(*columns, strict=True) if length}


def test_every_row_drafts_at_the_layer_it_asked_for() -> None:
    plan = decoding_plan(
        scheduler(promotes=False),
        request(0, 1, 4),
        request(1, 6, 2),
        request(2, None, None),
        request(3, 8, 0),
    )
    assert drafts(plan) == {0: (1, 4), 1: (6, 2), 2: (2, 3)}


def test_all_rows_draft_at_one_of_the_layers_asked_for() -> None:
    plan = decoding_plan(
        scheduler(promotes=True), request(0, 1, 4), request(1, 6, 2), request(2, None, None), request(3, 8, 0)
    )
    # Row 3 does not draft, so that its layer is not asked for.
    assert drafts(plan) == {0: (6, 4), 1: (6, 2), 2: (6, 3)}


@pytest.mark.parametrize("promotes", [False, True])
def test_rows_that_leave_it_open_get_the_layer_chosen(promotes: bool) -> None:
    plan = decoding_plan(scheduler(promotes=promotes), request(0, None, None), request(1, None, 5))
    assert drafts(plan) == {0: (2, 3), 1: (2, 5)}
