"""A step that does not fit the device's memory costs the newest request at most, and no other a token."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from decoding.cycle import Cycle
from decoding.engine import Engine
from decoding.messages import Abort, Generate, Load, SamplingParams, StepReport
from decoding.plan import Plan, Result
from decoding.runtime import Runtime
from server.errors import OutOfMemory
from tests.mixes import Lab
from tests.played_worker import Played, drain, said
from tests.server_process import Server

NUM_ROWS = 4


class FullMemory:
    """A cycle on a device whose memory runs out, before a step or once it has written all it writes."""

    def __init__(self, cycle: Cycle, fits: Callable[[int, Plan], bool]) -> None:
        self._cycle = cycle
        self._fits = fits
        self.num_failed = 0
        self.plans: list[Plan] = []

    def run(self, plan: Plan) -> Result:
        self.plans.append(plan)
        if self._fits(len(self.plans) - 1, plan):
            return self._cycle.run(plan)
        self.num_failed += 1
        if self.num_failed % 2:
            self._cycle.run(plan)
        raise torch.OutOfMemoryError("scripted")


def engine_of(lab: Lab, fits: Callable[[int, Plan], bool], *, budget: int = 64) -> tuple[Engine, FullMemory]:
    """An engine whose steps fit if `fits` says so of their number and plan."""
    loaded = lab.fresh_engine(block_size=4, num_blocks=128, max_num_seqs=NUM_ROWS, budget=budget)
    cycle = FullMemory(loaded.runtime.cycle, fits)
    runtime: Runtime = replace(loaded.runtime, cycle=cycle)  # type: ignore[arg-type]
    return Engine(loaded.ready, runtime, loaded._scheduler, clock=lambda: 0.0), cycle


def request(sequence_id: int, *, prompt: int = 30, new: int = 12) -> Generate:
    return Generate(
        sequence_id=sequence_id,
        prompt_ids=[(7 * sequence_id + 3 * i) % 60 for i in range(prompt)],
        max_new_tokens=new,
        sampling=SamplingParams(temperature=0.8 * (sequence_id % 2)),
        seed=sequence_id,
        stop_token_ids=[],
    )


def decode(engine: Engine, requests: list[Generate]) -> tuple[dict[int, list[int]], list[int]]:
    """Tokens by sequence, and which were dropped. Every block is accounted for after every step."""
    tokens: dict[int, list[int]] = {each.sequence_id: [] for each in requests}
    dropped: list[int] = []
    for each in requests:
        engine.submit(each)
    while engine.has_work:
        report = engine.step()
        engine.check_integrity()
        dropped += report.out_of_memory
        for event in report.decoded:
            tokens[event.sequence_id] += event.token_ids
    return tokens, dropped


def expected(lab: Lab, requests: list[Generate]) -> dict[int, list[int]]:
    return {each.sequence_id: lab.oracle.decode(each) for each in requests}


@pytest.mark.parametrize("failing", [{0}, {3}, {0, 2, 4, 6, 8}, {2, 5, 8}])
def test_a_step_that_does_not_fit_is_taken_again_and_nothing_is_lost(lab: Lab, failing: set[int]) -> None:
    requests = [request(i) for i in range(NUM_ROWS)]
    engine, cycle = engine_of(lab, lambda number, _: number not in failing)
    tokens, dropped = decode(engine, requests)
    assert tokens == expected(lab, requests)
    assert dropped == []
    assert cycle.num_failed == engine.report().load.num_out_of_memory_total == len(failing)


def test_the_second_try_is_half_as_large_and_steps_stay_small_for_a_while(lab: Lab) -> None:
    """Memory has room for 40 tokens a step; prompts of 50 and 30 ask for 64."""
    engine, cycle = engine_of(lab, lambda _, plan: plan.num_tokens <= 40)
    requests = [request(0, prompt=50, new=20), request(1, new=300)]
    tokens, dropped = decode(engine, requests)
    assert tokens == expected(lab, requests)
    assert dropped == []
    sizes = [plan.num_tokens for plan in cycle.plans]
    assert sizes[:2] == [64, 32]
    assert max(sizes[1:66]) <= 32
    # Much later a prompt may again ask for as much as the settings allow.
    engine.submit(request(2, prompt=64))
    engine.step()
    assert cycle.plans[-2].num_tokens == 64
    assert cycle.plans[-1].num_tokens == 32


def test_the_newest_request_is_dropped_where_even_small_steps_do_not_fit(lab: Lab) -> None:
    """There is memory for three rows and no more, however few their tokens."""
    requests = [request(i) for i in range(NUM_ROWS)]
    engine, cycle = engine_of(lab, lambda _, plan: plan.num_rows <= 3, budget=128)
    tokens, dropped = decode(engine, requests)
    wanted = expected(lab, requests)
    assert dropped == [3]
    assert tokens[3] == []
    assert [tokens[i] for i in range(3)] == [wanted[i] for i in range(3)]
    assert cycle.num_failed == 2
    assert engine.report().load.num_used_blocks == 0


def test_a_request_dropped_midway_leaves_the_others_their_tokens(lab: Lab) -> None:
    requests = [request(i) for i in range(NUM_ROWS)]
    engine, _ = engine_of(lab, lambda number, _: number not in (4, 5))
    tokens, dropped = decode(engine, requests)
    wanted = expected(lab, requests)
    assert dropped == [3]
    assert [tokens[i] for i in range(3)] == [wanted[i] for i in range(3)]
    assert 0 < len(tokens[3]) < len(wanted[3])
    assert tokens[3] == wanted[3][: len(tokens[3])]


def test_memory_that_stays_full_drops_every_request_and_then_serves_again(lab: Lab) -> None:
    requests = [request(i) for i in range(NUM_ROWS)]
    engine, cycle = engine_of(lab, lambda number, _: number >= 2 * NUM_ROWS, budget=256)
    tokens, dropped = decode(engine, requests)
    assert dropped == [3, 2, 1, 0]
    assert not any(tokens.values())
    later = [request(10)]
    assert decode(engine, later) == (expected(lab, later), [])
    assert cycle.num_failed == 2 * NUM_ROWS


def test_a_request_ends_with_all_its_sequences_once_one_is_dropped() -> None:
    async def play() -> None:
        played = Played().ready()
        other, dropped = played.submit(1), played.submit(2, 3)
        played.step(said(1, 5), said(2, 6), said(3, 7), num_running=3)
        report = StepReport([said(1, 8)], Load(num_running=2), num_taken=3, out_of_memory=[3])
        played.process.callbacks.on_event(report)
        events, error = await drain(dropped)
        assert events == [said(2, 6), said(3, 7)]
        assert isinstance(error, OutOfMemory)
        assert Abort([2, 3]) in played.process.sent
        assert await drain(other) == ([said(1, 5), said(1, 8)], None)
        assert played.client.num_open == 1
        # What was given up meanwhile may still be reported as dropped.
        played.process.callbacks.on_event(report)

    asyncio.run(play())


def test_the_client_is_told_in_the_shape_of_every_error(scripted: Server) -> None:
    body = {"prompt": "!full of it", "max_tokens": 60}
    answer = scripted.post(body)
    assert answer.status == 503
    assert answer.headers["retry-after"] == "1"
    assert answer.error["code"] == "out_of_memory"
    assert answer.error["type"] == "server_error"
    events = scripted.stream(**body)
    assert json.loads(events[-1])["error"] == answer.error
    assert "[DONE]" not in events
    assert scripted.complete(prompt="and others", max_tokens=4)
    scripted.wait_idle()
