"""A long prompt comes in by parts that the others can wait for, and at once where nobody waits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from decoding.pacing import PromptPacer, is_long_prompt
from decoding.plan import Plan
from decoding.scheduler import Scheduler
from tests.test_scheduler import refused, request, scheduler

STEP_S, TOKEN_S = 0.01, 0.0002


def seconds(plan: Plan) -> float:
    """A step of some rows takes as long as another; each token of a prompt takes time of its own."""
    prompts = plan.num_fed_B[plan.num_fed_B > 1]
    return STEP_S * (len(prompts) < plan.num_rows) + TOKEN_S * float(prompts.sum())


def step(under_test: Scheduler) -> Plan:
    plan = under_test.plan()
    assert plan is not None
    under_test.commit(replace(refused(plan), verify_s=seconds(plan)))
    under_test.check_integrity()
    return plan


def test_a_step_with_a_part_of_a_prompt_takes_no_more_than_two_and_a_half_steps() -> None:
    under_test = scheduler()
    for sequence_id in range(4):
        under_test.submit(request(sequence_id, prompt=100))
    for _ in range(20):
        step(under_test)
    under_test.submit(request(9, prompt=1500))
    plans = [step(under_test) for _ in range(60)]
    with_prompt = [plan for plan in plans if (plan.num_fed_B > 1).any()]
    assert max(map(seconds, plans)) <= 2.5 * STEP_S + TOKEN_S
    assert sum(map(seconds, with_prompt)) <= 3 * 1500 * TOKEN_S
    assert sum(int(plan.num_fed_B[plan.num_fed_B > 1].sum()) for plan in with_prompt) == 1500


def test_rows_draft_beside_short_prompts_and_not_beside_long_ones_to_their_last_part() -> None:
    under_test = scheduler()
    for sequence_id in range(4):
        under_test.submit(request(sequence_id, prompt=100, draft_length=2))
    for _ in range(20):
        step(under_test)
    under_test.submit(request(9, prompt=1500, draft_length=2))
    left = 1500
    while left:
        plan = step(under_test)
        fed = int(plan.num_fed_B[plan.num_fed_B > 1].sum())
        assert not (fed and plan.num_drafts_B.any())
        left -= fed
    assert step(under_test).num_drafts_B.any()


def test_a_prompt_is_long_by_what_is_not_cached_and_until_all_of_it_is_computed() -> None:
    assert is_long_prompt(8, num_pending=1500, num_uncached=1500)
    assert is_long_prompt(8, num_pending=8, num_uncached=1500)
    assert not is_long_prompt(8, num_pending=12, num_uncached=12)
    assert not is_long_prompt(1, num_pending=1, num_uncached=1500)


def test_a_prompt_alone_takes_the_whole_step() -> None:
    under_test = scheduler()
    for sequence_id in (1, 2):
        under_test.submit(request(sequence_id, prompt=1500, new=1))
        assert step(under_test).num_tokens == 512
        while under_test.has_work:
            step(under_test)


def test_prompts_always_come_on() -> None:
    pacer = PromptPacer()
    pacer.observe([1, 1], 0.001, drafts=False)
    pacer.observe([512], 100.0, drafts=False)
    assert pacer.num_prompt_tokens(num_decoding=2, num_beginning=1, most=500) == 6
    assert pacer.num_prompt_tokens(num_decoding=2, num_beginning=1, most=5) == 5


@pytest.mark.parametrize("num_decoding", [0, 3])
def test_nothing_is_held_back_before_anything_is_known(num_decoding: int) -> None:
    assert PromptPacer().num_prompt_tokens(num_decoding=num_decoding, num_beginning=1, most=500) == 500


def known() -> PromptPacer:
    pacer = PromptPacer()
    for num_rows in (1, 4):
        pacer.observe([1] * num_rows, STEP_S, drafts=False)
    pacer.observe([512], 512 * TOKEN_S, drafts=False)
    return pacer


def test_many_who_wait_for_their_first_token_count_more_than_few_who_wait_for_their_next() -> None:
    one, many = (
        known().num_prompt_tokens(num_decoding=4, num_beginning=waiting, most=500) for waiting in (1, 28)
    )
    assert one < 0.2 * many < 100


def test_a_step_that_was_held_up_changes_little() -> None:
    pacer = known()
    before = pacer.num_prompt_tokens(num_decoding=1, num_beginning=1, most=500)
    pacer.observe([1, 100], 30.0, drafts=False)
    assert pacer.num_prompt_tokens(num_decoding=1, num_beginning=1, most=500) >= 0.8 * before


def test_without_end_of_prompts_a_growing_batch_is_looked_at_alone_now_and_then() -> None:
    pacer = PromptPacer()
    pacer.observe([1] * 4, STEP_S, drafts=False)
    pacer.observe([512], 512 * TOKEN_S, drafts=False)
    allowed = []
    for _ in range(200):
        num_tokens = pacer.num_prompt_tokens(num_decoding=32, num_beginning=1, most=500)
        allowed.append(num_tokens)
        fed = [1] * 32 + ([num_tokens] if num_tokens else [])
        pacer.observe(fed, 8 * STEP_S + num_tokens * TOKEN_S, drafts=False)
    assert 3 <= allowed.count(0) <= 4
    # What eight times longer steps leave room for, not what those of few rows do.
    assert min(allowed[2:64]) >= 0.9 * 8 * STEP_S / TOKEN_S


def test_a_look_that_comes_to_nothing_is_not_repeated_at_once() -> None:
    pacer = known()
    allowed = [pacer.num_prompt_tokens(num_decoding=32, num_beginning=1, most=500) for _ in range(60)]
    assert allowed.count(0) == 1
