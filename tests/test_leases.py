"""A choice that holds for some steps is not asked for in each of them; nothing that was seen meanwhile is lost."""

from __future__ import annotations

from collections.abc import Sequence

from decoding.acceptance_record import AcceptanceRecord
from decoding.choice import Choice, DraftingRow, ExitLayers, Fate, StepOutcome
from decoding.controller import Controller
from decoding.messages import Drafter, Generate
from tests.machines import costs, flat
from tests.mixes import Lab, one_request
from tests.test_controller import LONGEST, controller, record, rows

LEARNED_STEPS = 100
"""After so many steps there are leases."""


class Witness(Controller):
    """Counts what it is asked and told."""

    num_asked = 0
    num_told = 0
    num_timed = 0

    def took(self, outcome: StepOutcome) -> None:
        self.outcomes = [*getattr(self, "outcomes", []), outcome]
        super().took(outcome)

    def observes(self, exit_layer: int, *, drafts: bool) -> bool:
        self.num_timed += 1
        return super().observes(exit_layer, drafts=drafts)

    def choose(
        self,
        rows: Sequence[DraftingRow],
        *,
        among: ExitLayers = (),
        num_others: int = 0,
        can_stop: bool = False,
    ) -> Choice:
        self.num_asked += 1
        return super().choose(rows, among=among, num_others=num_others, can_stop=can_stop)

    def drafted(self, exit_layer: int, drafter: Drafter, fates: Sequence[Fate]) -> None:
        self.num_told += sum(fate.drafted for fate in fates)
        super().drafted(exit_layer, drafter, fates)


def witness() -> Witness:
    known = AcceptanceRecord(num_layers=5, max_draft_length=4, first={2: 0.7})
    return Witness(costs(flat), known, exit_layers=(1, 2), first_exit_layer=2, max_draft_length=4)


def open_request(number: int, num_tokens: int) -> Generate:
    return one_request(exit_layer=None, draft_length=None, max_new_tokens=num_tokens, sequence_id=number)


def test_it_is_asked_seldom_and_told_everything(lab: Lab) -> None:
    chooser = witness()
    engine = lab.fresh_engine(block_size=4, num_blocks=512, max_num_seqs=4, budget=64, chooser=chooser)
    num_steps = num_drafted = 0
    for number in range(5):
        engine.submit(open_request(number, 300))
        token_ids: list[int] = []
        while engine.has_work:
            for event in engine.step().decoded:
                num_steps += 1
                num_drafted += event.drafted
                token_ids += event.token_ids
    assert chooser.num_asked < num_steps / 2
    # The next request's first steps ask, and are told what came before.
    engine.generate([open_request(5, 4)])
    assert chooser.num_told >= num_drafted > 0
    plain = one_request(exit_layer=1, draft_length=0, max_new_tokens=300)
    alone = lab.fresh_engine(block_size=4, num_blocks=512, max_num_seqs=4, budget=64).generate([plain])[0]
    assert token_ids == [token_id for event in alone for token_id in event.token_ids]


def test_rows_that_come_or_go_end_a_lease(lab: Lab) -> None:
    chooser = witness()
    engine = lab.fresh_engine(block_size=4, num_blocks=512, max_num_seqs=4, budget=64, chooser=chooser)
    for number in range(3):
        engine.generate([open_request(number, 300)])
    engine.submit(open_request(3, 300))
    quiet: list[int] = []
    while len(quiet) < 3:
        before = chooser.num_asked
        engine.step()
        quiet = [*quiet, 1] if chooser.num_asked == before else []
    engine.submit(open_request(4, 8))
    before = chooser.num_asked
    for _ in range(3):
        engine.step()
    assert chooser.num_asked > before


def test_times_are_learned_from_steps_in_which_nobody_chose(lab: Lab) -> None:
    """Choosing leaves the rest of its step slower than others are."""
    chooser = witness()
    engine = lab.fresh_engine(block_size=4, num_blocks=512, max_num_seqs=4, budget=64, chooser=chooser)
    quiet: set[tuple[float, float]] = set()
    for number in range(6):
        engine.submit(open_request(number, 300))
        while engine.has_work:
            before = chooser.num_asked
            times = engine.step().times
            if times is not None and chooser.num_asked == before:
                quiet.add((times.draft_s, times.verify_s))
    # At first there are no leases.
    later = chooser.outcomes[len(chooser.outcomes) // 2 :]
    learned = [(outcome.draft_s, outcome.verify_s) for outcome in later]
    assert len(quiet.intersection(learned)) > len(learned) / 3 > 1


def test_where_rows_come_and_go_in_every_step_times_are_learned_from_those_that_chose(lab: Lab) -> None:
    """Leases are given, and nobody rests on them."""
    chooser = witness()
    engine = lab.fresh_engine(block_size=4, num_blocks=512, max_num_seqs=8, budget=64, chooser=chooser)
    for number in range(3):
        engine.generate([open_request(number, 300)])
    before = chooser.num_asked, chooser.num_timed
    for number in range(3, 160):
        engine.submit(open_request(number, 4))
        engine.step()
    asked, timed = chooser.num_asked - before[0], chooser.num_timed - before[1]
    assert asked > 100
    assert timed > 0.9 * asked


def test_steps_taken_on_a_lease_count() -> None:
    """Looks come as soon as if every step had asked."""

    def steps_until_survey(*, takes: bool) -> int:
        under_test, batch, num_steps = controller(costs(flat), record(lambda layer: 0.6)), rows(1), 0
        for _ in range(4000):
            chosen = under_test.choose(batch)
            under_test.observes(chosen.exit_layer, drafts=any(chosen.draft_lengths))
            num_steps += 1
            while takes and chosen.lease is not None and chosen.lease.take():
                num_steps += 1
            if num_steps > LEARNED_STEPS and not any(chosen.draft_lengths):
                return num_steps
        raise AssertionError

    with_leases, without = (steps_until_survey(takes=takes) for takes in (True, False))
    assert LONGEST < LEARNED_STEPS < with_leases
    assert abs(with_leases - without) <= 16
