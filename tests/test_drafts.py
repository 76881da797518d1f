"""Draft tallies agree with counting each cycle by hand."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from decoding.messages import Drafter
from server.drafts import AcceptanceWindow, DraftTally

CYCLES = st.lists(
    st.integers(0, 4).flatmap(
        lambda drafted: st.tuples(st.sampled_from([2, 4]), st.just(drafted), st.integers(0, drafted))
    )
)


def tally_of(cycles) -> DraftTally:
    tally = DraftTally()
    for exit_layer, drafted, kept in cycles:
        tally.record(exit_layer=exit_layer, drafted=drafted, kept=kept)
    return tally


@given(CYCLES)
def test_totals_are_sums_over_cycles(cycles):
    tally = tally_of(cycles)
    assert tally.num_drafts == sum(drafted > 0 for _, drafted, _ in cycles)
    assert tally.num_draft_tokens == sum(drafted for _, drafted, _ in cycles)
    assert tally.num_kept_tokens == sum(kept for _, _, kept in cycles)
    histogram = tally.kept_histogram(max_draft_length=4)
    assert sum(histogram) == tally.num_drafts
    assert sum(kept * count for kept, count in enumerate(histogram)) == tally.num_kept_tokens


@given(CYCLES)
def test_a_position_is_proposed_by_longer_drafts_and_reached_when_all_before_it_were_kept(cycles):
    for (layer, position), counts in tally_of(cycles).by_position(Drafter.EARLY_EXIT).items():
        mine = [(drafted, kept) for exit_layer, drafted, kept in cycles if exit_layer == layer]
        assert counts.proposed == sum(drafted > position for drafted, _ in mine)
        assert counts.reached == sum(drafted > position and kept >= position for drafted, kept in mine)
        assert counts.kept == sum(kept > position for _, kept in mine)


def test_main_exit_layer_is_that_of_most_cycles():
    assert tally_of([]).main_exit_layer is None
    assert tally_of([(2, 0, 0), (4, 3, 1), (4, 1, 0)]).main_exit_layer == 4


def test_window_forgets_old_cycles_and_keeps_at_least_its_size():
    window = AcceptanceWindow(min_drafts=10)
    assert window.rate == 0.0
    for _ in range(100):
        window.record(drafted=4, kept=4)
    assert window.rate == 1.0
    for _ in range(3):
        window.record(drafted=4, kept=0)
    assert window.rate == 0.0
    window.record(drafted=4, kept=2)
    assert window.rate == 2 / 12


def test_drafts_are_told_apart_by_who_made_them():
    tally = DraftTally()
    tally.record(exit_layer=4, drafted=3, kept=1)
    tally.record(exit_layer=4, drafted=2, kept=2, drafter=Drafter.LOOKUP)
    tally.record(exit_layer=4, drafted=0, kept=0, drafter=Drafter.NONE)
    assert tally.by_drafter == {"early_exit": 3, "lookup": 2}
    assert (tally.num_drafts, tally.num_draft_tokens, tally.num_kept_tokens) == (2, 5, 3)
    assert DraftTally().by_drafter == {"early_exit": 0}
