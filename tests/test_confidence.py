"""How sure drafts are is learned from those that were made, and what stopping promises is what it gives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from decoding.acceptance_record import AcceptanceRecord, RowRecord
from decoding.choice import DraftingRow, Fate, Seen
from decoding.confidence import EDGES, NUM_GRADES, ConfidenceRecord, Grades
from decoding.controller import Controller
from decoding.messages import Drafter
from decoding.stopping import StoppingWeigher, Walks
from decoding.weighing import Batch, Candidate
from tests.machines import (
    NUM_LAYERS,
    Seconds,
    costs,
    dear_steps,
    flat,
    linear,
    linear_with_gain,
    not_monotone,
)

LONGEST = 8
TRUE = Grades(
    shares_G=np.arange(NUM_GRADES, 0, -1) / sum(range(NUM_GRADES + 1)),
    chances_G=np.linspace(0.35, 0.97, NUM_GRADES),
)
"""Sure drafts are seldom."""


def cycles(grades: Grades, count: int, seed: int = 0) -> list[tuple[list[int], int]]:
    """Grades of drafts and how many of them were kept, as these chances have it."""
    rng = np.random.default_rng(seed)
    drawn = rng.choice(NUM_GRADES, p=grades.shares_G, size=(count, LONGEST))
    refused = rng.random((count, LONGEST)) > grades.chances_G[drawn]
    kept = np.where(refused.any(axis=1), refused.argmax(axis=1), LONGEST)
    return list(zip(drawn.tolist(), kept.tolist(), strict=True))


def taught(grades: Grades = TRUE, *, layer: int = 4, count: int = 3000) -> ConfidenceRecord:
    record = ConfidenceRecord(NUM_LAYERS)
    for drawn, kept in cycles(grades, count):
        record.record(layer, drawn, kept=kept, is_sampled=True)
    record.refresh()
    return record


def test_shares_and_chances_are_those_of_drafts_that_were_reached() -> None:
    """Drafts behind one that was refused are of no kept run: counted, they would halve every chance."""
    found = taught().grades(4, is_sampled=True, mean=0.5)
    assert found.shares_G == pytest.approx(TRUE.shares_G, abs=0.03)
    assert found.chances_G[:8] == pytest.approx(TRUE.chances_G[:8], abs=0.1)
    assert (np.diff(found.chances_G) >= 0).all()


def test_greedy_rows_and_sampled_ones_are_told_apart() -> None:
    record = taught()
    for drawn, _ in cycles(TRUE, 400):
        record.record(4, drawn, kept=LONGEST, is_sampled=False)
    record.refresh()
    sampled, greedy = (record.grades(4, is_sampled=each, mean=0.5) for each in (True, False))
    assert greedy.chances_G[0] > sampled.chances_G[0] + 0.3


def test_elsewhere_margins_are_read_alike_but_kept_as_often_as_is_expected_there() -> None:
    """A deeper exit layer of which nothing is known but how many of its drafts are kept."""
    found = taught().grades(9, is_sampled=True, mean=0.9)
    assert found.mean == pytest.approx(0.9, abs=0.02)
    assert found.chances_G[0] < 0.9 < found.chances_G[-1]


def test_drafts_long_ago_count_less() -> None:
    record, other = taught(), ConfidenceRecord(NUM_LAYERS)
    before = record.versions_2L.copy()
    for _ in range(40):
        record.fade(but=5)
    assert (record.versions_2L[:, 4] > before[:, 4]).all()
    assert (record.versions_2L[:, 5] == before[:, 5]).all()
    forgotten, unknown = (each.grades(4, is_sampled=True, mean=0.6) for each in (record, other))
    assert forgotten.chances_G == pytest.approx(unknown.chances_G, abs=0.01)


def played(grades: Grades, least: float, *, count: int = 4000) -> tuple[float, float]:
    """Drafts made and kept by a row that stops, on average of many cycles."""
    made = kept = 0
    for drawn, would_keep in cycles(grades, count, seed=1):
        chance, length = 1.0, 0
        for grade in drawn:
            length += 1
            chance *= grades.chances_G[grade]
            if chance < least:
                break
        made += length
        kept += min(length, would_keep)
    return made / count, kept / count


@pytest.mark.parametrize("least", [0.35, 0.6, 0.9])
def test_what_walks_foretell_is_what_happens(least: float) -> None:
    walks = Walks.of([TRUE], [least], LONGEST)
    made, kept = played(TRUE, least)
    assert walks.made_WTK.sum() == pytest.approx(made, rel=0.08)
    assert walks.kept_WT[0, 0] == pytest.approx(kept, rel=0.08)


def test_walks_of_several_kinds_and_bounds_are_those_of_each() -> None:
    surer = TRUE.with_refusals(0.3)
    together = Walks.of([TRUE, surer], [0.4, 0.8], LONGEST)
    for kind, grades in enumerate((TRUE, surer)):
        for bound, least in enumerate((0.4, 0.8)):
            alone = Walks.of([grades], [least], LONGEST)
            assert together.made_WTK[kind, bound] == pytest.approx(alone.made_WTK[0, 0], abs=0.03)
            assert together.kept_WT[kind, bound] == pytest.approx(alone.kept_WT[0, 0], abs=0.1)
    assert together.made_WTK[1].sum() > together.made_WTK[0].sum()


def weigher(seconds: Seconds) -> StoppingWeigher:
    """Everything is known of all exit layers: the deeper, the surer."""
    record = AcceptanceRecord(num_layers=NUM_LAYERS, max_draft_length=LONGEST, first={4: 0.7})
    for layer in range(1, NUM_LAYERS):
        for drawn, kept in cycles(TRUE.with_refusals(3 / layer), 1500, seed=layer):
            record.confidence.record(layer, drawn, kept=kept, is_sampled=True)
    record.refresh()
    return StoppingWeigher(costs(seconds), record)


def rate(seconds: Seconds, candidate: Candidate, num_rows: int, record: AcceptanceRecord) -> float:
    """Tokens a second of many steps that are played with the chances that are believed."""
    table, layer = costs(seconds), candidate.exit_layer
    grades = record.confidence.grades(layer, is_sampled=True, mean=0.5)
    rng = np.random.default_rng(2)
    tokens = taken_s = 0.0
    for _ in range(400):
        chances, drafting, made = np.ones(num_rows), np.ones(num_rows, dtype=bool), 0
        standing = np.ones(num_rows, dtype=bool)
        for _ in range(max(candidate.lengths)):
            num_drafting = int(drafting.sum())
            taken_s += float(table.draft_s(layer, np.array([num_drafting]))[0])
            made += num_drafting
            chance = grades.chances_G[rng.choice(NUM_GRADES, p=grades.shares_G, size=num_rows)]
            standing &= drafting & (rng.random(num_rows) < chance)
            tokens += standing.sum()
            chances *= np.where(drafting, chance, 1.0)
            drafting &= chances >= candidate.least
            if not drafting.any():
                break
        tokens += num_rows
        taken_s += float(table.verify_s(layer, num_rows, np.array(num_rows + made)))
    return tokens / taken_s


@pytest.mark.parametrize("seconds", [flat, linear, dear_steps, linear_with_gain, not_monotone])
@pytest.mark.parametrize("num_rows", [1, 4])
def test_the_bound_and_exit_layer_it_finds_are_as_good_as_any(seconds: Seconds, num_rows: int) -> None:
    """Against bounds and lengths at several exit layers, each played out."""
    under_test = weigher(seconds)
    batch = Batch.of([1.0] * num_rows, longest=LONGEST, num_others=0, num_sampled=num_rows)
    layers = (2, 4, 8, 12)
    found = max(under_test.best_at(layers, batch), key=lambda each: each.rate)
    record = under_test._record
    reached = rate(seconds, found, num_rows, record)
    others = [
        rate(seconds, Candidate(layer, (LONGEST,), 0.0, least), num_rows, record)
        for layer in layers
        for least in (0.35, 0.6, 0.9)
    ]
    others += [
        rate(seconds, Candidate(layer, (length,), 0.0), num_rows, record)
        for layer in layers
        for length in (1, 2, 3, 5)
    ]
    assert reached > 0.95 * max(others)
    assert found.rate == pytest.approx(reached, rel=0.1)


def test_hopes_are_for_exit_layers_of_which_little_was_seen() -> None:
    under_test = weigher(linear_with_gain)
    batch = Batch.of([1.0], longest=LONGEST, num_others=0, num_sampled=1)
    for layer in (4, 8):
        under_test._record.record(layer, [(1, 1)] * 30 + [(1, 0)] * 20)
    for _ in range(400):
        under_test._record.record(8, [(1, 1)] * 3 + [(1, 0)] * 2)
    under_test._record.refresh()
    (little, much), (hoped_little, hoped_much) = (
        rates(under_test.best_at((4, 8), batch, hopes=hopes)) for hopes in (False, True)
    )
    assert hoped_little > little
    assert hoped_much == pytest.approx(much, rel=0.05)


def rates(candidates: Sequence[Candidate]) -> list[float]:
    return [candidate.rate for candidate in candidates]


def test_edges_rise() -> None:
    assert list(EDGES) == sorted(set(EDGES))


@pytest.mark.parametrize("true_chance", [0.03, 0.2, 0.9])
@pytest.mark.parametrize("first_grade", [0, 3, 10])
def test_drafts_that_are_kept_alike_whatever_their_margins_are_seen_to_be(
    true_chance: float, first_grade: int
) -> None:
    """Exits that are sure and wrong: margins that were never seen must not speak for those that were."""
    shares_G = (np.arange(NUM_GRADES) >= first_grade) / (NUM_GRADES - first_grade)
    record = taught(Grades(shares_G, np.full(NUM_GRADES, true_chance)))
    found = record.grades(4, is_sampled=True, mean=true_chance)
    assert found.mean == pytest.approx(true_chance, abs=0.06)
    assert found.chances_G[first_grade:] == pytest.approx(true_chance, abs=0.15)


def test_what_is_learned_of_one_exit_layer_changes_what_others_promise() -> None:
    record = AcceptanceRecord(num_layers=NUM_LAYERS, max_draft_length=LONGEST, first={4: 0.7})
    under_test = StoppingWeigher(costs(linear_with_gain), record)
    batch = Batch.of([1.0], longest=LONGEST, num_others=0, num_sampled=1)
    before = rates(under_test.best_at((2, 3, 4, 6), batch))
    record.record(4, [(1, 0)] * 200)
    for _ in range(200):
        record.confidence.record(4, (5,), kept=0, is_sampled=True)
    record.refresh()
    after = rates(under_test.best_at((2, 3, 4, 6), batch))
    assert after == pytest.approx(
        rates(StoppingWeigher(costs(linear_with_gain), record).best_at((2, 3, 4, 6), batch))
    )
    assert all(late < 0.96 * early for late, early in zip(after, before, strict=True))


@pytest.mark.parametrize("first_grade", [0, 3])
def test_drafts_that_never_pay_are_found_out_however_sure_they_are(first_grade: int) -> None:
    record = AcceptanceRecord(num_layers=NUM_LAYERS, max_draft_length=LONGEST, first={4: 0.7})
    under_test = Controller(
        costs(linear_with_gain),
        record,
        exit_layers=tuple(range(1, NUM_LAYERS)),
        first_exit_layer=4,
        max_draft_length=LONGEST,
        can_stop=True,
    )
    rng, drafting = np.random.default_rng(0), []
    row = DraftingRow(LONGEST, RowRecord())
    for _ in range(4000):
        chosen = under_test.choose([row], can_stop=True)
        drawn = rng.integers(first_grade, NUM_GRADES, size=LONGEST).tolist()
        length = chosen.draft_lengths[0]
        if length:
            refused = np.flatnonzero(rng.random(length) > 0.02)
            kept = int(refused[0]) if len(refused) else length
            fate = Fate(row.record, length, kept, drawn[:length], may_stop=chosen.stopping is not None)
            under_test.drafted(chosen.exit_layer, Drafter.EARLY_EXIT, [fate])
        for layer in chosen.surveyed:
            under_test.surveyed({layer: [Seen(bool(rng.random() < 0.02), drawn[0])]})
        drafting.append(length > 0)
    assert np.mean(drafting[-1000:]) < 0.05
    assert not under_test.pays


@pytest.mark.parametrize("rate", [0.5, 0.95])
def test_what_sampled_rows_show_at_one_exit_layer_is_expected_of_them_at_all(rate: float) -> None:
    """Greedy rows before them told otherwise."""
    first = {2: 0.6, 4: 0.8, 8: 0.9, 12: 0.95}
    record = AcceptanceRecord(num_layers=NUM_LAYERS, max_draft_length=LONGEST, first=first)
    rng = np.random.default_rng(0)
    for is_sampled, kept_rate in ((False, 0.8), (True, rate)):
        for kept in rng.random(300) < kept_rate:
            record.record(4, [(1, int(kept))])
            record.confidence.record(4, (7,), kept=int(kept), is_sampled=is_sampled)
    record.refresh()
    means = record.confidence.means(record.firsts(), is_sampled=True)
    assert means[4] == pytest.approx(rate, abs=0.05)
    assert 1 - means[8] == pytest.approx((1 - means[4]) / 2, rel=0.15)
    greedy = record.confidence.means(record.firsts(), is_sampled=False)
    assert greedy[[4, 8]] == pytest.approx([0.8, 0.9], abs=0.1)
