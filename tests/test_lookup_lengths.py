"""How many looked-up drafts are verified follows how those that were found alike have fared."""

from __future__ import annotations

from decoding.acceptance_record import RowRecord
from decoding.choice import Fate
from decoding.controller import Controller
from decoding.lookup import LONGEST_MATCH, NgramSearch
from decoding.messages import Drafter
from tests.machines import costs, linear_with_gain
from tests.test_controller import LONGEST, controller, record, rows


def chooser() -> Controller:
    return controller(costs(linear_with_gain), record(lambda layer: 0.5))


def length(under_test: Controller, num_matched: int, *, may_exit: bool = False) -> int:
    return under_test.lookup_length(1, LONGEST, num_matched=num_matched, may_exit=may_exit)


def learn(under_test: Controller, num_matched: int, kept: int, times: int = 200) -> None:
    fate = Fate(RowRecord(), LONGEST, kept, num_matched=num_matched)
    for _ in range(times):
        under_test.drafted(1, Drafter.LOOKUP, [fate])


def test_looked_up_drafts_that_are_all_kept_are_believed() -> None:
    under_test = chooser()
    before = length(under_test, 4)
    learn(under_test, 4, LONGEST)
    assert before < length(under_test, 4) == LONGEST
    learn(under_test, 4, 0)
    assert length(under_test, 4) < before


def test_those_found_by_few_ids_say_nothing_of_those_found_by_many() -> None:
    under_test = chooser()
    before = length(under_test, LONGEST_MATCH)
    learn(under_test, 2, 0)
    assert length(under_test, LONGEST_MATCH) == before > length(under_test, 2)


def test_where_early_exits_promise_more_they_draft_instead() -> None:
    """But for one draft now and then, and only in rows that may leave early."""
    under_test = controller(costs(linear_with_gain), record(lambda layer: 0.97))
    learn(under_test, 2, 0)
    under_test.choose(rows(1))
    lengths = [length(under_test, 2, may_exit=True) for _ in range(600)]
    assert set(lengths) == {0, 1}
    assert lengths.count(1) < 4
    learn(under_test, 5, LONGEST)
    assert length(under_test, 5, may_exit=True) == LONGEST


def test_it_counts_the_ids_that_match() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 9, 9]
    for size in range(1, 8):
        search, ids = NgramSearch(), [*text, *text[:size]]
        found = min(size, LONGEST_MATCH) if size > 1 else 0
        assert search.num_matched(ids) == found
        assert search.propose(ids, 2) == (tuple([*text, 1][size : size + 2]) if found else ())
        assert search.num_matched([*ids, 77]) == 0
