"""Whatever happens to an engine and in which order, every sequence gets the tokens of naive decoding alone.

Requests come, steps are run, rows leave in the middle of one, the pool is too small, and the engine dies and is
followed by another: hypothesis looks for an order that breaks something.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, settings, stateful
from hypothesis import strategies as st
from msgspec.structs import replace

from decoding.blocks import BlockPool
from decoding.choice import DraftChooser
from decoding.messages import Decoded, Drafter, FinishReason, Generate, LogitEdits, SamplingParams
from decoding.planning import StepLimits
from decoding.scheduler import Scheduler
from tests.choosers import NUM_LAYERS, RandomChooser, RestlessController
from tests.mixes import VOCAB, Lab
from tests.oracle import CachedDecoder
from tests.test_draft_model import make_draft_lab
from tests.tiny import make_checkpoint

BLOCK_SIZE, MAX_PROMPT, MAX_NEW = 4, 26, 14
SMALLEST_POOL = (MAX_PROMPT + MAX_NEW) // BLOCK_SIZE

ROOTS = ([7, 3, 11, 5] * 7, list(range(30, 60)), [2, 2, 9] * 10)
"""Prompts are beginnings of these, so that they share blocks."""

SAMPLINGS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.0, edits=LogitEdits(frequency_penalty=0.7, repetition_penalty=1.3)),
    SamplingParams(temperature=0.8, top_p=0.9),
    SamplingParams(temperature=0.8, edits=LogitEdits(allowed_token_ids=[7, 3])),
    SamplingParams(temperature=1.2),
    SamplingParams(temperature=1.2, top_k=9, edits=LogitEdits(min_tokens=5, bad_words=[[3, 11], [9]])),
)
STOPS = ([], list(range(20)))

ways_of_drafting = st.fixed_dictionaries(
    {
        "exit_layer": st.none() | st.integers(1, NUM_LAYERS - 1),
        "draft_length": st.none() | st.integers(0, 8),
        "drafter": st.sampled_from(Drafter),
        "traces_drafts": st.booleans(),
    }
)
prompts = st.builds(
    lambda root, length, tail: [*root[:length], *tail],
    st.sampled_from(ROOTS),
    # Half of these come to a whole number of blocks with their answer.
    st.sampled_from([2, 6, 10]) | st.integers(1, MAX_PROMPT - 2),
    st.sampled_from(([], [], [], [1, 2])),
)
requests = st.builds(
    lambda drafting, **fields: Generate(sequence_id=0, **fields, **drafting),
    drafting=ways_of_drafting,
    prompt_ids=prompts,
    max_new_tokens=st.sampled_from([MAX_NEW, MAX_NEW, MAX_NEW, 1, 5]),
    sampling=st.sampled_from(SAMPLINGS),
    seed=st.sampled_from([1, 2**62 + 1]),
    stop_token_ids=st.sampled_from(STOPS),
    priority=st.sampled_from([0, 0, 0, -2, 5]),
)
choosers: st.SearchStrategy[DraftChooser] = st.builds(
    lambda make, seed: make(seed), st.sampled_from([RandomChooser, RestlessController]), st.integers(0, 99)
)
places = st.integers(0, 7)
"""Which of the open sequences, counted from the oldest, over and over."""


@dataclass(frozen=True, slots=True)
class Labs:
    """A model alone and the same with a draft model; the same oracle for both. `happened` counts over all runs."""

    alone: Lab
    followed: Lab
    oracle: CachedDecoder
    happened: Counter[str] = field(default_factory=Counter)


@dataclass
class Open:
    """A request that has not ended, its whole answer, and what came of it so far."""

    request: Generate
    answer: list[int]
    got: list[int] = field(default_factory=list)
    has_been_heard: bool = False


class EngineStates(stateful.RuleBasedStateMachine):
    """The engine, taken apart so that rows can leave between plan and commit, beside what must come of it."""

    def __init__(self, labs: Labs) -> None:
        super().__init__()
        self._labs = labs
        self._open: dict[int, Open] = {}
        self._ended: list[Open] = []
        self._num_submitted = 0

    @stateful.initialize(
        num_blocks=st.sampled_from([SMALLEST_POOL, SMALLEST_POOL + 3, SMALLEST_POOL + 6, 64]),
        limits=st.sampled_from([(1, 2), (3, 3), (3, 64), (8, 9), (8, 64), (8, 64)]),
        promotes=st.booleans(),
        has_draft_model=st.booleans(),
        chooser=choosers,
    )
    def start(
        self,
        num_blocks: int,
        limits: tuple[int, int],
        promotes: bool,
        has_draft_model: bool,
        chooser: DraftChooser,
    ) -> None:
        model_draft_length = 3 if has_draft_model else None
        lab = self._labs.followed if has_draft_model else self._labs.alone
        self._has_draft_model = has_draft_model
        self._cycle = lab.engines[BLOCK_SIZE].runtime.cycle
        self._make_scheduler = lambda: Scheduler(
            BlockPool(num_blocks=num_blocks, block_size=BLOCK_SIZE),
            StepLimits(*limits, promotes, model_draft_length),
            chooser,
            device=torch.device("cpu"),
            clock=lambda: 0.0,
        )
        self._scheduler = self._make_scheduler()

    @stateful.rule(coming=st.lists(requests, min_size=1, max_size=6))
    def submit(self, coming: list[Generate]) -> None:
        for request in coming:
            self._submit(request)

    @stateful.precondition(lambda self: self._ended)
    @stateful.rule(place=places, drafting=ways_of_drafting)
    def go_on_with_an_answer(self, place: int, drafting: dict[str, object]) -> None:
        """The last token of an answer was never computed, though it may fill a block."""
        before = self._ended[-1 - place % len(self._ended)]
        prompt_ids = [*before.request.prompt_ids, *before.answer, 9][:MAX_PROMPT]
        self._submit(replace(before.request, prompt_ids=prompt_ids, **drafting))

    @stateful.precondition(lambda self: self._open)
    @stateful.rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self._step(lambda: None)

    @stateful.precondition(lambda self: self._open)
    @stateful.rule(place=places, moment=st.sampled_from(["plan", "run", "commit"]))
    def step_while_one_leaves(self, place: int, moment: str) -> None:
        self._step(lambda: self._abort(place), before=moment)

    @stateful.precondition(lambda self: self._open)
    @stateful.rule()
    def step_until_one_ends(self) -> None:
        num_open = len(self._open)
        for _ in range(1000):
            self._step(lambda: None)
            if len(self._open) < num_open:
                return
        raise AssertionError("none ends")

    @stateful.precondition(lambda self: self._open)
    @stateful.rule(count=st.integers(0, 4))
    def die_and_be_followed(self, count: int) -> None:
        """What the cache holds is of no use to the next, whose pool knows nothing of it."""
        self.step(count)
        self._count_what_the_scheduler_did()
        self._scheduler = self._make_scheduler()
        for each in self._open.values():
            each.has_been_heard = bool(each.got)
            self._labs.happened["resumed"] += each.has_been_heard
            self._scheduler.submit(each.request.resumed(each.got))

    def check_invariants(self, *args: object, **kwargs: object) -> None:
        super().check_invariants(*args, **kwargs)
        if hasattr(self, "_scheduler"):
            self._labs.happened["rules"] += 1
            self._scheduler.check_integrity()
            load = self._scheduler.load()
            assert load.num_running + load.num_waiting == len(self._open)

    def teardown(self) -> None:
        if not hasattr(self, "_scheduler"):
            return
        num_steps = 0
        while self._open:
            num_steps += 1
            assert num_steps < 3000, "some never end"
            self._step(lambda: None)
        assert not self._scheduler.has_work
        assert self._scheduler.load().num_used_blocks == 0
        self._scheduler.check_integrity()
        self._count_what_the_scheduler_did()

    def _submit(self, asked: Generate) -> None:
        is_impossible = asked.drafter is Drafter.MODEL and not self._has_draft_model
        drafter = Drafter.EARLY_EXIT if is_impossible else asked.drafter
        self._num_submitted += 1
        request = replace(asked, sequence_id=self._num_submitted, drafter=drafter)
        self._open[self._num_submitted] = Open(request, self._labs.oracle.decode(request))
        self._scheduler.submit(request)

    def _step(self, meanwhile: Callable[[], None], *, before: str = "commit") -> None:
        """Plan, run, commit; who is aborted meanwhile gets nothing of it."""
        if before == "plan":
            meanwhile()
        plan = self._scheduler.plan()
        assert (plan is not None) == bool(self._open), "a step is idle though some wait"
        if plan is None:
            return
        if before == "run":
            meanwhile()
        # What a step took decides what the next holds: made up, so that what is tried twice goes the same way.
        took = {"draft_s": 1e-4 * int(plan.num_drafts_B.sum()), "verify_s": 1e-3 + 1e-4 * plan.num_tokens}
        result = dataclasses.replace(self._cycle.run(plan), **took)
        if before == "commit":
            meanwhile()
        for event in self._scheduler.commit(result):
            self._take(event)
        self._scheduler.host_took(0.0)
        self._labs.happened["steps"] += 1

    def _take(self, event: Decoded) -> None:
        """Tokens are checked at once, so that a fault is found where it shows first."""
        each = self._open[event.sequence_id]
        each.got += event.token_ids
        assert each.got == each.answer[: len(each.got)]
        assert (event.num_cached_tokens is None) == each.has_been_heard
        assert 0 <= event.kept <= event.drafted
        assert (event.drafted_ids is None) == (not each.request.traces_drafts)
        each.has_been_heard = True
        self._labs.happened["kept"] += event.kept
        self._labs.happened[event.drafter] += event.drafted
        self._labs.happened["hits"] += event.num_cached_tokens or 0
        if event.finish_reason is not None:
            assert each.got == each.answer
            has_stopped = each.answer[-1] in each.request.stop_token_ids
            assert event.finish_reason is (FinishReason.STOP if has_stopped else FinishReason.LENGTH)
            self._ended.append(self._open.pop(event.sequence_id))

    def _abort(self, place: int) -> None:
        sequence_id = sorted(self._open)[place % len(self._open)]
        del self._open[sequence_id]
        self._scheduler.abort([sequence_id])
        self._labs.happened["aborted"] += 1

    def _count_what_the_scheduler_did(self) -> None:
        self._labs.happened["preemptions"] += self._scheduler.load().num_preemptions_total


@pytest.fixture(scope="module")
def labs(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Labs:
    draft_folder = tmp_path_factory.mktemp("draft")
    make_checkpoint(draft_folder, num_layers=2, hidden=16, heads=2, kv_heads=1, vocab=VOCAB, seed=3)
    followed = make_draft_lab(tmp_path_factory.mktemp("full"), draft_folder)
    return Labs(lab, followed, CachedDecoder(lab.oracle, max_new_tokens=MAX_NEW))


def run(labs: Labs, *, num_examples: int, num_rules: int, is_same_every_time: bool) -> None:
    """So many runs of so many rules, in which everything that could break something happened."""
    labs.happened.clear()
    stateful.run_state_machine_as_test(
        partial(EngineStates, labs),
        settings=settings(
            max_examples=num_examples,
            stateful_step_count=num_rules,
            derandomize=is_same_every_time,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    drafted = [labs.happened[drafter] for drafter in (Drafter.EARLY_EXIT, Drafter.LOOKUP, Drafter.MODEL)]
    assert min(drafted) > 0
    assert 0 < labs.happened["kept"] < sum(drafted)
    assert min(labs.happened[each] for each in ("preemptions", "hits", "resumed", "aborted")) > 0


def test_no_order_of_what_happens_changes_a_text_or_loses_a_block(labs: Labs) -> None:
    run(labs, num_examples=10, num_rules=20, is_same_every_time=True)


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_no_order_in_ten_thousand_steps_changes_a_text_or_loses_a_block(labs: Labs) -> None:
    run(labs, num_examples=100, num_rules=40, is_same_every_time=False)
    assert labs.happened["steps"] >= 10_000
