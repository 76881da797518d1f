"""How long a worker's successor waits, and when there is none."""

from __future__ import annotations

import pytest

from server.restarts import MAX_FRUITLESS_DEATHS, RestartPolicy


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def life(policy: RestartPolicy, clock: Clock, *, seconds: float, finishes: bool) -> float | None:
    """What is waited after a worker that served so long."""
    policy.served()
    clock.now_s += seconds
    if finishes:
        policy.finished()
    return policy.died()


def test_waits_double_up_to_ten_seconds_while_some_requests_finish():
    clock = Clock()
    policy = RestartPolicy(clock)
    waits_s = [life(policy, clock, seconds=1, finishes=True) for _ in range(9)]
    assert waits_s == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10])


def test_a_minute_of_health_makes_good_what_was_before():
    clock = Clock()
    policy = RestartPolicy(clock)
    for _ in range(10):
        for expected_s in (0.1, 0.2, 0.4):
            assert life(policy, clock, seconds=59.9, finishes=False) == pytest.approx(expected_s)
        assert life(policy, clock, seconds=60, finishes=False) == pytest.approx(0.1)
        policy = RestartPolicy(clock)


def test_five_deaths_that_finish_nothing_are_enough():
    clock = Clock()
    policy = RestartPolicy(clock)
    for _ in range(2 * MAX_FRUITLESS_DEATHS):
        assert life(policy, clock, seconds=1, finishes=True) is not None
    waits_s = [life(policy, clock, seconds=1, finishes=False) for _ in range(MAX_FRUITLESS_DEATHS - 1)]
    # The last that finished something was the first of these deaths.
    assert waits_s[-1] is None
    assert None not in waits_s[:-1]


def test_deaths_while_loading_count():
    policy = RestartPolicy(Clock())
    assert [policy.died() is None for _ in range(MAX_FRUITLESS_DEATHS)] == [False] * 4 + [True]
