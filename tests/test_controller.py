"""The controller's choices are the best that its numbers allow, follow what it sees, and never show in a text."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from config.settings import EngineSettings
from decoding.acceptance_record import AcceptanceRecord, RowRecord
from decoding.choice import Choice, DraftingRow, Fate, Seen, StepOutcome
from decoding.controller import Controller
from decoding.engine import Engine
from decoding.messages import Drafter
from decoding.step_costs import StepCosts
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
from tests.mixes import Lab, one_request
from tests.tiny import make_checkpoint

LONGEST = 8
LAYERS = range(1, NUM_LAYERS)


def record(rates: Callable[[int], float]) -> AcceptanceRecord:
    """A long memory of drafts that were kept at these rates, whatever their position."""
    known = AcceptanceRecord(num_layers=NUM_LAYERS, max_draft_length=LONGEST, first={4: 0.7})
    rng = np.random.default_rng(0)
    for layer in LAYERS:
        for _ in range(400):
            refused = np.flatnonzero(rng.random(LONGEST) > rates(layer))
            known.record(layer, [(LONGEST, int(refused[0]) if len(refused) else LONGEST)])
    return known


def controller(step_costs: StepCosts, known: AcceptanceRecord) -> Controller:
    return Controller(
        step_costs, known, exit_layers=tuple(LAYERS), first_exit_layer=4, max_draft_length=LONGEST
    )


def rows(count: int, limit: int = LONGEST) -> list[DraftingRow]:
    return [DraftingRow(limit, RowRecord()) for _ in range(count)]


def rate(step_costs: StepCosts, known: AcceptanceRecord, choice: Choice) -> float:
    """Expected tokens a second of a choice, in plain loops over rows and drafts."""
    lengths, layer = choice.draft_lengths, choice.exit_layer
    curve = known.curve(layer).tolist()
    tokens = sum(1 + sum(float(np.prod(curve[:k])) for k in range(1, length + 1)) for length in lengths)
    seconds = float(step_costs.verify_s(layer, len(lengths), np.array(len(lengths) + sum(lengths))))
    for ahead in range(max(lengths)):
        seconds += float(step_costs.draft_s(layer, np.array([sum(length > ahead for length in lengths)]))[0])
    return tokens / seconds


@pytest.mark.parametrize("seconds", [flat, linear, dear_steps, not_monotone])
@pytest.mark.parametrize("num_rows", [1, 4, 32])
@pytest.mark.parametrize("best_rate", [0.9, 0.6, 0.2])
def test_its_choice_equals_brute_force(seconds: Seconds, num_rows: int, best_rate: float) -> None:
    step_costs, known = costs(seconds), record(lambda layer: best_rate * (1 - 0.5 ** (layer / 3)))
    chosen = controller(step_costs, known).choose(rows(num_rows))
    uniform = [Choice(layer, (length,) * num_rows) for layer in LAYERS for length in range(LONGEST + 1)]
    best = max(rate(step_costs, known, choice) for choice in uniform)
    plain = num_rows / step_costs.plain_s(num_rows)
    # Drafts that gain less than the margin are not made.
    assert rate(step_costs, known, chosen) >= (best if best > 1.04 * plain else plain) * (1 - 1e-9)


def test_brute_force_finds_different_answers_to_these_tables() -> None:
    """Otherwise the test above could not fail."""
    known = record(lambda layer: 0.9 * (1 - 0.5 ** (layer / 3)))
    chosen = {
        (choice.exit_layer, choice.draft_lengths[0])
        for seconds in (flat, linear, dear_steps, not_monotone)
        for choice in [controller(costs(seconds), known).choose(rows(1))]
    }
    assert len(chosen) >= 3


@pytest.mark.parametrize("can_stop", [False, True])
def test_no_step_takes_much_longer_than_one_without_drafts(can_stop: bool) -> None:
    """Though on this machine longer ones would give more tokens a second, streams would come in bursts."""
    step_costs, known = costs(flat), record(lambda layer: 0.98)
    under_test = Controller(
        *(step_costs, known),
        exit_layers=(8,),
        first_exit_layer=8,
        max_draft_length=LONGEST,
        can_stop=can_stop,
    )
    chosen = under_test.choose(rows(2), can_stop=can_stop)
    plain_s = step_costs.plain_s(2)

    def step_s(length: int) -> float:
        draft_s = length * float(step_costs.draft_s(8, np.array([2]))[0])
        return draft_s + float(step_costs.verify_s(8, 2, np.array(2 * (1 + length))))

    assert step_s(LONGEST) > 4.5 * plain_s
    assert rate(step_costs, known, Choice(8, (LONGEST,) * 2)) > rate(step_costs, known, Choice(8, (4, 4)))
    made = chosen.mean_draft_length
    assert 3 <= made < LONGEST
    assert step_s(int(made)) <= 4 * plain_s


def test_a_row_whose_drafts_are_kept_drafts_more_than_one_whose_are_not() -> None:
    known = record(lambda layer: 0.8)
    lucky, unlucky = RowRecord(), RowRecord()
    for _ in range(20):
        lucky.record(known.expected(4), drafted=6, kept=6)
        unlucky.record(known.expected(4), drafted=6, kept=0)
    chosen = controller(costs(linear_with_gain), known).choose(
        [DraftingRow(8, lucky), DraftingRow(8, unlucky)]
    )
    assert chosen.draft_lengths[0] > chosen.draft_lengths[1]


def test_rows_draft_no_more_than_they_may() -> None:
    chosen = controller(costs(flat), record(lambda layer: 0.95)).choose([*rows(1, limit=2), *rows(1)])
    assert chosen.draft_lengths[0] <= 2 < chosen.draft_lengths[1]


def test_an_exit_layer_that_was_asked_for_is_used() -> None:
    assert controller(costs(flat), record(lambda layer: 0.9)).choose(rows(3), among=(9,)).exit_layer == 9


def test_of_several_exit_layers_the_most_promising_is_used() -> None:
    rates = record(lambda layer: 0.9 if layer == 5 else 0.3)
    assert controller(costs(flat), rates).choose(rows(3), among=(2, 5, 9)).exit_layer == 5
    assert controller(costs(flat), rates).choose(rows(3), among=(2, 9)).exit_layer in (2, 9)


def test_what_the_host_takes_makes_drafting_pay() -> None:
    """Every step pays it, so that steps which give more tokens gain."""

    def dear_tokens(layers: int, num_rows: int, tokens: int) -> float:
        return layers * tokens

    for host_s, drafts in [(0.0, False), (1000.0, True)]:
        step_costs = costs(dear_tokens)
        for _ in range(1200):
            # A step that took much longer than expected is believed bit by bit.
            for drafting in (False, True):
                step_costs.observe_host(1, host_s, num_drafts=int(drafting))
        chosen = controller(step_costs, record(lambda layer: 0.7)).choose(rows(1))
        assert any(chosen.draft_lengths) is drafts


def test_drafts_that_pay_no_more_give_way_to_others_that_do_and_not_to_none() -> None:
    step_costs, known = costs(linear_with_gain), record(lambda layer: 0.5)
    under_test, row = controller(step_costs, known), rows(1)
    (before,) = under_test.choose(row, among=(4,)).draft_lengths
    assert 1 <= before <= 2
    for _ in range(900):
        # Short drafts are not worth what the host takes for them, long ones are.
        for num_drafts in (1, LONGEST):
            step_costs.observe_host(1, 30.0, num_drafts=num_drafts)
    known.record(4, [(LONGEST, LONGEST)] * 2000)
    # As long as the first choice stands, and then the next.
    chosen = [under_test.choose(row, among=(4,)).draft_lengths for _ in range(30)]
    assert chosen[-1] > (before,)
    # A look at none is short.
    assert chosen.count((0,)) <= 4


def test_an_exit_layer_that_was_never_tried_must_promise_more() -> None:
    """Deep exits are guessed to be kept nearly always: a guess that is worth less than what was seen."""
    known = AcceptanceRecord(num_layers=NUM_LAYERS, max_draft_length=LONGEST, first={4: 0.7})
    for _ in range(100):
        known.record(4, [(LONGEST, 2)])
    chosen = controller(costs(linear), known).choose(rows(1))
    assert chosen.exit_layer == 4 or not any(chosen.draft_lengths)


def test_drafting_stops_by_itself_when_tokens_cost_too_much() -> None:
    """What pays for one row on a device bound by memory does not for so many that arithmetic binds it."""

    def saturating(layers: int, num_rows: int, tokens: int) -> float:
        return layers * max(1.0, tokens / 24)

    under_test = controller(costs(saturating), record(lambda layer: 0.6))
    assert sum(under_test.choose(rows(1)).draft_lengths) > 0
    assert sum(under_test.choose(rows(64)).draft_lengths) == 0


def test_a_row_that_drafts_beside_many_others_counts_them() -> None:
    """Long draft steps for one row would hold up all the others."""
    step_costs, known = costs(dear_steps), record(lambda layer: 0.8)
    alone = controller(step_costs, known).choose(rows(1))
    beside = controller(step_costs, known).choose(rows(1), num_others=63)
    assert alone.draft_lengths[0] > beside.draft_lengths[0] == 0


def test_acceptance_that_changes_changes_the_choice_and_back() -> None:
    known = AcceptanceRecord(num_layers=NUM_LAYERS, max_draft_length=LONGEST, first={4: 0.7})
    under_test = controller(costs(linear_with_gain), known)
    assert share_drafting(under_test, kept_rate=0.95, num_steps=2000) > 0.9
    assert share_drafting(under_test, kept_rate=0.02) < 0.1
    assert share_drafting(under_test, kept_rate=0.95, num_steps=6000) > 0.9


def share_drafting(
    under_test: Controller, *, kept_rate: float, num_steps: int = 9000, num_rows: int = 1, latest: int = 1000
) -> float:
    """Share of the latest steps that drafted, each draft kept at this rate whoever made it."""
    rng = np.random.default_rng(1)
    drafting = []
    for _ in range(num_steps):
        batch = rows(num_rows)
        chosen = under_test.choose(batch)
        fates = []
        for row, length in zip(batch, chosen.draft_lengths, strict=True):
            refused = np.flatnonzero(rng.random(length) > kept_rate)
            fates.append(Fate(row.record, length, int(refused[0]) if len(refused) else length))
        drafting.append(any(chosen.draft_lengths))
        if drafting[-1]:
            under_test.drafted(chosen.exit_layer, Drafter.EARLY_EXIT, fates)
        if chosen.surveyed:
            under_test.surveyed(
                {layer: [Seen(rng.random() < kept_rate) for _ in batch] for layer in chosen.surveyed}
            )
    return float(np.mean(drafting[-latest:]))


def test_drafting_ends_before_it_is_slower_than_none() -> None:
    """What is in use may stay where another promises a little more, but not where drafting none does."""
    step_costs, known = costs(linear_with_gain), record(lambda layer: 0.8)
    under_test, batch, gains, num_plain = controller(step_costs, known), rows(1), [], 0
    while num_plain < 8:
        chosen = under_test.choose(batch, among=(4,))
        gain = rate(step_costs, known, chosen) / rate(step_costs, known, Choice(4, (0,)))
        is_drafting = any(chosen.draft_lengths)
        gains += [gain] if is_drafting else []
        num_plain = 0 if is_drafting else num_plain + 1
        known.record(4, [(8, 0)] * (len(gains) % 8 == 0))
    assert 1 < gains[-1] < 1.04


@pytest.mark.parametrize("num_rows", [1, 6])
def test_a_checkpoint_whose_drafts_never_pay_is_found_out_and_runs_plain(num_rows: int) -> None:
    known = AcceptanceRecord(num_layers=NUM_LAYERS, max_draft_length=LONGEST, first={4: 0.7})
    under_test = controller(costs(linear_with_gain), known)
    assert under_test.pays
    # A draft that is kept by chance is soon followed by others: not all of these steps are so unlucky.
    assert share_drafting(under_test, kept_rate=0.02, num_steps=7000, num_rows=num_rows, latest=5000) < 0.02
    assert not under_test.pays


def test_rows_of_which_no_draft_was_kept_where_none_was_expected_to_be_are_weighed_too() -> None:
    known = AcceptanceRecord(num_layers=NUM_LAYERS, max_draft_length=LONGEST, first={4: 0.7})
    under_test, batch = controller(costs(linear), known), rows(2)
    under_test.drafted(4, Drafter.EARLY_EXIT, [Fate(RowRecord(), 2, 0)] * 300)
    under_test.choose(batch)
    assert max(known.expected(2)) == 0
    under_test.drafted(2, Drafter.EARLY_EXIT, [Fate(row.record, 2, 0) for row in batch])
    assert under_test.choose(batch, among=(2,)).exit_layer == 2


def test_drafts_that_do_not_pay_for_many_rows_may_pay_for_one() -> None:
    def saturating(layers: int, num_rows: int, tokens: int) -> float:
        return layers * max(1.0, tokens / 24)

    under_test = controller(costs(saturating), record(lambda layer: 0.6))
    assert share_drafting(under_test, kept_rate=0.6, num_rows=40, num_steps=3000) < 0.1
    assert under_test.pays


def test_a_real_engine_chooses_and_the_text_is_that_of_any_other_choice(tmp_path, lab: Lab) -> None:
    """The later layers add nothing, so that drafts from there on are always kept and drafting must pay."""
    make_checkpoint(tmp_path, num_layers=12, vocab=61, hidden=64, transparent_from=2)
    settings = EngineSettings(
        model=str(tmp_path), dtype="float64", num_threads=1, num_blocks=256, max_model_len=512
    )
    engine = Engine.load(settings)
    open_request = one_request(max_new_tokens=300, exit_layer=None, draft_length=None)
    events = engine.generate([open_request])[0]
    plain = engine.generate([one_request(max_new_tokens=300, exit_layer=3, draft_length=0)])[0]
    assert [t for e in events for t in e.token_ids] == [t for e in plain for t in e.token_ids]
    assert sum(event.drafted for event in events) > 0
    assert engine.report().load.is_drafting_worthwhile


def test_it_learns_from_steps_of_rows_that_only_decode(lab: Lab) -> None:
    outcomes: list[StepOutcome] = []

    class Recorder(Controller):
        def took(self, outcome: StepOutcome) -> None:
            outcomes.append(outcome)

    under_test = Recorder(
        costs(flat), record(lambda layer: 0.5), exit_layers=(1, 2), first_exit_layer=1, max_draft_length=4
    )
    engine = lab.fresh_engine(block_size=4, num_blocks=512, max_num_seqs=4, budget=64, chooser=under_test)
    engine.generate([one_request(exit_layer=None, draft_length=None, max_new_tokens=20)])
    assert outcomes
    assert all(len(outcome.draft_lengths) == 1 for outcome in outcomes)
