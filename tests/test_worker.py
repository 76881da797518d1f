"""The worker's loop: commands before the step, a report after it, a heartbeat while idle."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from config.settings import EngineSettings
from decoding.messages import Abort, Command, Event, Generate, SamplingParams, StepReport
from server.worker import serve
from tests.scripted_engine import ScriptedEngine


class EndOfScriptError(Exception):
    pass


class ScriptedLink:
    """Hands out one batch of commands a turn, then ends the loop."""

    def __init__(self, *turns: Sequence[Command]) -> None:
        self.turns = list(turns)
        self.waits: list[bool] = []
        self.reports: list[StepReport] = []

    def take(self, *, wait: bool) -> Sequence[Command]:
        self.waits.append(wait)
        if not self.turns:
            raise EndOfScriptError
        return self.turns.pop(0)

    def send(self, event: Event) -> None:
        assert isinstance(event, StepReport)
        self.reports.append(event)


def run(*turns: Sequence[Command]) -> ScriptedLink:
    link = ScriptedLink(*turns)
    with pytest.raises(EndOfScriptError):
        serve(ScriptedEngine(EngineSettings()), link)
    return link


def generate(sequence_id: int) -> Generate:
    return Generate(sequence_id, [11, 12], 4, SamplingParams(), 0, [], 4, 0)


def test_sequences_run_together_and_waiting_is_for_the_idle():
    link = run([], [generate(1), generate(2)], [], [], [], [])
    assert [len(report.decoded) for report in link.reports] == [0, 2, 2, 2, 2, 0]
    assert link.waits == [True, True, False, False, False, True, True]


def test_abort_takes_effect_before_the_next_step_and_is_reported_when_nothing_is_left():
    link = run([generate(1)], [Abort([1])], [])
    assert [len(report.decoded) for report in link.reports] == [1, 0, 0]
    assert link.reports[1].load.num_running == 0
    assert link.reports[1].times is None


def test_blocks_are_counted_once_when_work_is_over_and_nothing_more_comes():
    engine = ScriptedEngine(EngineSettings())

    def checks_after(*turns: Sequence[Command]) -> int:
        with pytest.raises(EndOfScriptError):
            serve(engine, ScriptedLink(*turns))
        return engine.num_checks

    assert checks_after([], []) == 0
    assert checks_after([generate(1)], [], [], [generate(2)]) == 0
    assert checks_after([], [], [generate(3)], [], [], [], [], []) == 1


def test_a_worker_that_lost_a_block_ends():
    class Leaking(ScriptedEngine):
        def check_integrity(self) -> None:
            raise AssertionError("a block is lost")

    with pytest.raises(AssertionError, match="lost"):
        serve(Leaking(EngineSettings()), ScriptedLink([generate(1)], [], [], [], [], []))
