"""Rows stop drafting where they are told to, and no text depends on it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from msgspec.structs import replace

from decoding.choice import Choice, DraftingRow, ExitLayers, Fate, FixedChoice
from decoding.confidence import NUM_GRADES, Stopping
from decoding.messages import Drafter
from tests.compiled_engines import engine, needs_compiler, requests, text, with_chooser


class Stopper(FixedChoice):
    """Lets rows draft until they are unsure, of any bound, and keeps what it is told."""

    def __init__(self, seed: int, least: float | None = None) -> None:
        super().__init__(exit_layer=4, draft_length=8)
        self._rng, self._least = np.random.default_rng(seed), least
        self.stopping: Stopping | None = None
        self.fates: list[tuple[Stopping, Fate]] = []

    def choose(
        self,
        rows: Sequence[DraftingRow],
        *,
        among: ExitLayers = (),
        num_others: int = 0,
        can_stop: bool = False,
    ) -> Choice:
        least = float(self._rng.uniform()) if self._least is None else self._least
        self.stopping = Stopping(self._rng.uniform(0.3, 1, (2, NUM_GRADES)).astype(np.float32), least)
        self.exit_layer = among[0] if among else int(self._rng.integers(1, 8))
        lengths = tuple(min(row.limit, int(self._rng.integers(0, 9))) for row in rows)
        return Choice(self.exit_layer, lengths, stopping=self.stopping if can_stop else None)

    def drafted(self, exit_layer: int, drafter: Drafter, fates: Sequence[Fate]) -> None:
        assert self.stopping is not None
        self.fates += [(self.stopping, fate) for fate in fates]


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_text_depends_on_where_rows_stop(dtype: str) -> None:
    """Rows that ask for more in between, which go part by part and never stop, and lengths that were asked for."""
    loaded = engine(compile_layers=True, dtype=dtype, max_num_seqs=6)
    plain = [text(loaded.generate([replace(r, draft_length=0)])[r.sequence_id]) for r in requests(12, 5)]
    for seed in range(4):
        chooser = Stopper(seed)
        asked = [
            replace(each, exit_layer=None, draft_length=None if each.sequence_id % 4 else 2)
            for each in requests(12, 5)
        ]
        asked[3] = replace(asked[3], logprobs=2)
        events = with_chooser(loaded, chooser).generate(asked)
        assert [text(events[number]) for number in range(12)] == plain
        assert any(0 < fate.drafted < len(fate.grades) + 1 for _, fate in chooser.fates if fate.may_stop)


@needs_compiler
def test_a_row_stops_behind_the_draft_with_which_too_little_is_left() -> None:
    chooser = Stopper(1, least=0.4)
    loaded = with_chooser(engine(compile_layers=True), chooser)
    loaded.generate(
        [replace(r, exit_layer=None, draft_length=None, max_new_tokens=24) for r in requests(6, 2)]
    )
    lengths = set()
    for stopping, fate in chooser.fates:
        assert len(fate.grades) == fate.drafted >= fate.kept
        chances = np.cumprod(stopping.chances_2G[int(fate.is_sampled)][list(fate.grades)])
        assert (chances[:-1] >= np.float32(0.4)).all()
        lengths.add(fate.drafted)
    assert len(lengths) > 3
    # Unless it was as long as planned, the last one was one too many.
    stopped = [
        fate
        for stopping, fate in chooser.fates
        if np.prod(stopping.chances_2G[int(fate.is_sampled)][list(fate.grades)]) < 0.4
    ]
    assert len(stopped) > len(chooser.fates) / 2


@needs_compiler
def test_a_length_that_was_asked_for_is_drafted_whatever_is_thought_of_it() -> None:
    chooser = Stopper(1, least=1.1)
    loaded = with_chooser(engine(compile_layers=True), chooser)
    fixed, free = requests(2, 3, draft_length=3)
    events = loaded.generate(
        [
            replace(fixed, exit_layer=None, max_new_tokens=20),
            replace(free, exit_layer=None, draft_length=None, max_new_tokens=20),
        ]
    )
    assert {event.drafted for event in events[0][1:-2]} == {3}
    assert {event.drafted for event in events[1]} <= {0, 1}
    assert any(event.drafted for event in events[1])


@needs_compiler
def test_fewer_tokens_are_reported_where_rows_stop() -> None:
    loaded = with_chooser(engine(compile_layers=True), Stopper(1, least=1.1))
    for request in requests(3, 3):
        loaded.submit(replace(request, exit_layer=None, draft_length=None, max_new_tokens=20))
    while loaded.has_work:
        report = loaded.step()
        if all(event.queued_s is None for event in report.decoded) and report.times:
            assert report.times.num_tokens == len(report.decoded) + sum(e.drafted for e in report.decoded)
