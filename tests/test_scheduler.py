"""What a step holds, who waits for whom, and what becomes of rows that leave while it runs."""

from __future__ import annotations

import torch
from msgspec.structs import replace

from decoding.blocks import BlockPool
from decoding.choice import FixedChoice
from decoding.messages import FinishReason, Generate, SamplingParams
from decoding.plan import Plan, Result
from decoding.planning import StepLimits
from decoding.scheduler import Scheduler


def scheduler(*, max_num_seqs: int = 64, budget: int = 512, num_blocks: int = 4096) -> Scheduler:
    pool = BlockPool(num_blocks=num_blocks, block_size=16)
    limits, chooser = StepLimits(max_num_seqs, budget), FixedChoice(exit_layer=1, draft_length=0)
    return Scheduler(pool, limits, chooser, device=torch.device("cpu"), clock=lambda: 0.0)


def request(
    sequence_id: int, *, prompt: int = 4, new: int = 1000, draft_length: int = 0, priority: int = 0
) -> Generate:
    prompt_ids = [1000 * sequence_id + i for i in range(prompt)]
    greedy = SamplingParams(temperature=0.0)
    return Generate(sequence_id, prompt_ids, new, greedy, 0, [], 1, draft_length, priority=priority)


def refused(plan: Plan) -> Result:
    """A result in which every row that chooses gets one token and no draft stands."""
    return Result(
        tuple((7,) if chooses else () for chooses in plan.chooses_B), (None,) * plan.num_rows, 0.0, 0.0
    )


def step(under_test: Scheduler) -> Plan:
    plan = under_test.plan()
    assert plan is not None
    under_test.commit(refused(plan))
    under_test.check_integrity()
    return plan


def steps_until_first_token(under_test: Scheduler, sequence_id: int) -> int:
    for count in range(1, 50):
        plan = step(under_test)
        row = plan.sequence_ids.index(sequence_id) if sequence_id in plan.sequence_ids else None
        if row is not None and plan.chooses_B[row]:
            return count
    raise AssertionError("not within 50 steps")


def test_drafts_keep_no_newcomer_waiting() -> None:
    under_test = scheduler()
    for sequence_id in range(60):
        under_test.submit(request(sequence_id, draft_length=16))
    assert step(under_test).num_rows == 60
    assert step(under_test).draft_lengths_B.sum() == 512 - 60
    under_test.submit(request(99))
    assert steps_until_first_token(under_test, 99) == 1


def test_drafts_keep_no_long_prompt_waiting() -> None:
    under_test = scheduler()
    for sequence_id in range(60):
        under_test.submit(request(sequence_id, draft_length=16))
    step(under_test)
    under_test.submit(request(99, prompt=4000))
    assert steps_until_first_token(under_test, 99) <= 10


def test_every_running_row_gets_a_token_beside_a_long_prompt() -> None:
    under_test = scheduler(budget=16, max_num_seqs=16)
    for sequence_id in range(8):
        under_test.submit(request(sequence_id, prompt=1))
    step(under_test)
    under_test.submit(request(9, prompt=100))
    plan = step(under_test)
    assert plan.num_fed_B.sum() == 16
    assert sorted(plan.sequence_ids) == [*range(8), 9]


def test_a_row_that_leaves_between_plan_and_commit_gets_nothing_and_keeps_nothing() -> None:
    under_test = scheduler()
    for sequence_id in range(3):
        under_test.submit(request(sequence_id))
    plan = under_test.plan()
    assert plan is not None
    under_test.abort([1])
    events = under_test.commit(refused(plan))
    under_test.check_integrity()
    assert [event.sequence_id for event in events] == [0, 2]
    assert under_test.load().num_running == 2


def test_shortage_takes_the_youngest_row_and_loses_nobody() -> None:
    under_test = scheduler(num_blocks=8, max_num_seqs=4)
    for sequence_id in range(3):
        under_test.submit(request(sequence_id, prompt=30, new=60, draft_length=4))
    endings: dict[int, FinishReason | None] = {}
    num_tokens = dict.fromkeys(range(3), 0)
    while under_test.has_work:
        plan = under_test.plan()
        assert plan is not None
        for event in under_test.commit(refused(plan)):
            num_tokens[event.sequence_id] += len(event.token_ids)
            endings[event.sequence_id] = event.finish_reason
        under_test.check_integrity()
    assert num_tokens == dict.fromkeys(range(3), 60)
    assert endings == dict.fromkeys(range(3), FinishReason.LENGTH)
    assert under_test.load().num_preemptions_total > 0
    assert under_test.load().num_free_blocks == 8


def ended_in_order(under_test: Scheduler) -> list[int]:
    ended = []
    while under_test.has_work:
        plan = under_test.plan()
        assert plan is not None
        events = under_test.commit(refused(plan))
        ended += [event.sequence_id for event in events if event.finish_reason is not None]
        under_test.check_integrity()
    return ended


def test_the_lowest_priority_is_next_and_then_the_oldest() -> None:
    under_test = scheduler(max_num_seqs=1)
    for sequence_id, priority in enumerate((5, 0, 5, -1, 0, -1)):
        under_test.submit(request(sequence_id, new=2, priority=priority))
    step(under_test)
    # Who runs is not put out, even by one that would have been before it.
    under_test.submit(request(9, new=2, priority=-7))
    assert ended_in_order(under_test) == [3, 9, 5, 1, 4, 0, 2]


def test_shortage_takes_the_youngest_of_those_that_matter_least() -> None:
    under_test = scheduler(num_blocks=8, max_num_seqs=4)
    for sequence_id, priority in enumerate((3, 0, 3, 1)):
        under_test.submit(request(sequence_id, prompt=30, new=60, priority=priority))
        step(under_test)
    put_out, running = [], {0, 1, 2}
    while len(put_out) < 3:
        still_running = set(step(under_test).sequence_ids)
        put_out += running - still_running
        running = still_running
    assert put_out == [2, 0, 3]
    assert under_test.load().num_preemptions_total == 3
    assert ended_in_order(under_test)[0] == 1


def test_who_runs_is_told_once_there_are_priorities() -> None:
    under_test = scheduler(max_num_seqs=2)
    for sequence_id in range(3):
        under_test.submit(request(sequence_id))
    step(under_test)
    assert under_test.running_ids is None
    under_test.submit(request(7, priority=-1))
    under_test.abort([0])
    step(under_test)
    assert under_test.running_ids == [1, 7]


def test_choices_of_one_prompt_wait_for_the_first_and_share_its_blocks() -> None:
    under_test = scheduler(budget=64)
    prompt = list(range(200))
    for sequence_id in range(4):
        under_test.submit(replace(request(sequence_id), prompt_ids=prompt))
    fed = 0
    for _ in range(5):
        fed += int(step(under_test).num_fed_B.sum())
    # One whole prompt, and of the others what lies behind the last full block before the prompt's last token.
    assert under_test.load().num_running == 4
    assert under_test.load().prefix_cache_hit_tokens_total == 3 * 192
    assert fed <= 200 + 3 * 8 + 2 * 4


class CountedId(int):
    """A token id that counts how often any of its kind is hashed."""

    num_hashed = 0

    def __hash__(self) -> int:
        CountedId.num_hashed += 1
        return int(self)


def test_a_prompt_that_waits_for_blocks_is_looked_up_once() -> None:
    under_test = scheduler(num_blocks=64)
    prompt = list(map(CountedId, range(512)))
    under_test.submit(replace(request(1), prompt_ids=prompt, max_new_tokens=1))
    ended_in_order(under_test)
    under_test.submit(request(2, prompt=16 * 16))
    step(under_test)
    # Half the pool holds what this one begins with; what it lacks is more than is left beside that.
    under_test.submit(replace(request(3), prompt_ids=prompt + [CountedId(7)] * 512, max_new_tokens=1))
    CountedId.num_hashed = 0
    hashed = []
    for _ in range(5):
        plan = under_test.plan()
        assert plan is not None
        under_test.commit(refused(plan))
        hashed.append(CountedId.num_hashed)
    under_test.check_integrity()
    assert under_test.load().num_waiting == 1
    assert hashed[0] >= 512
    # Each further step may ask for the first block that is missing.
    assert hashed[-1] - hashed[0] <= 4 * 16


def test_nothing_is_shared_with_another_salt() -> None:
    """Not what was computed, and nobody waits for what is being."""
    under_test = scheduler(num_blocks=64)
    for sequence_id, salt in enumerate(("ours", "", "ours", "theirs")):
        asked = replace(request(sequence_id), prompt_ids=list(range(64)), max_new_tokens=1, cache_salt=salt)
        under_test.submit(asked)
    first = under_test.plan()
    assert first is not None
    assert sorted(first.sequence_ids) == [0, 1]
    cached = {event.sequence_id: event.num_cached_tokens for event in under_test.commit(refused(first))}
    while (plan := under_test.plan()) is not None:
        cached |= {event.sequence_id: event.num_cached_tokens for event in under_test.commit(refused(plan))}
    assert cached == {0: 0, 1: 0, 2: 48, 3: 0}


def test_another_prompt_waits_for_nobody() -> None:
    under_test = scheduler(budget=64)
    under_test.submit(request(1, prompt=40))
    under_test.submit(request(2, prompt=20))
    assert step(under_test).num_rows == 2
