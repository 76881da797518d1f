"""What is expected of exit layers that were never tried: guessed from others, or measured elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from decoding.acceptance_record import AcceptanceRecord

NUM_LAYERS = 16
MEASURED = {2: 0.5, 4: 0.8, 8: 0.9, 12: 0.96}


def record(first: dict[int, float]) -> AcceptanceRecord:
    return AcceptanceRecord(num_layers=NUM_LAYERS, max_draft_length=4, first=first)


def seen(known: AcceptanceRecord, exit_layer: int, kept: int, *, of: int) -> AcceptanceRecord:
    known.record(exit_layer, [(1, 1)] * kept + [(1, 0)] * (of - kept))
    known.refresh()
    return known


def test_between_measured_exit_layers_lie_the_others() -> None:
    firsts = record(MEASURED).firsts()
    assert [firsts[layer] for layer in MEASURED] == pytest.approx(list(MEASURED.values()))
    assert firsts[3] == pytest.approx(0.65)
    assert (np.diff(firsts) > 0).all()


@pytest.mark.parametrize("first", [{4: 0.8}, MEASURED])
def test_beyond_them_refusals_fade_towards_the_last_layer_and_acceptance_towards_the_first(
    first: dict[int, float],
) -> None:
    firsts = record(first).firsts()
    assert firsts[max(first)] < firsts[15] < 1
    assert 0 < firsts[1] < firsts[min(first)]


def test_texts_that_are_harder_at_one_exit_layer_are_harder_at_all() -> None:
    firsts = seen(record(MEASURED), 4, 60, of=100).firsts()
    assert firsts[4] == pytest.approx(0.6, abs=0.03)
    assert firsts[8] == pytest.approx(0.8, abs=0.03)
    assert firsts[12] == pytest.approx(0.92, abs=0.02)


def test_what_is_seen_of_an_exit_layer_counts_more_than_what_was_measured() -> None:
    known = seen(seen(record(MEASURED), 4, 400, of=500), 8, 300, of=500)
    assert known.firsts()[8] == pytest.approx(0.6, abs=0.08)
    assert known.firsts()[4] == pytest.approx(0.8, abs=0.05)


def test_there_is_less_to_hope_for_where_acceptance_was_measured() -> None:
    guessed, measured = record({4: 0.8}), record(MEASURED)
    layers = [2, 4, 8]
    assert guessed.hopes(layers)[:, 0].tolist() == [1.0, 1.0, 1.0]
    hopes = measured.hopes(layers)[:, 0]
    assert (measured.firsts()[layers] < hopes).all()
    assert hopes == pytest.approx([0.54, 0.82, 0.91], abs=0.01)
    assert measured.is_known(8)
    assert not measured.is_tried(8)
    assert not guessed.is_known(8)
