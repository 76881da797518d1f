"""What may be chosen for a step, who chooses, and what choosers learn from.

Knows exit layers and draft lengths; knows no tokens. No output depends on what is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from decoding.acceptance_record import RowRecord
from decoding.confidence import Stopping
from decoding.messages import Drafter
from decoding.reports import Beliefs

ExitLayers = tuple[int, ...]
"""Sorted; where it says which may be chosen, none means any."""


class DraftingRow(NamedTuple):
    """A row that may draft up to `limit` ≥ 1 tokens, how its drafts fared, and whether it has a temperature."""

    limit: int
    record: RowRecord
    is_sampled: bool = False


@dataclass(slots=True)
class Lease:
    """How many more steps a choice holds for, if they are of the same rows; who takes one says so."""

    num_steps: int
    num_taken: int = 0

    def take(self) -> bool:
        """Whether this step is one of them."""
        if self.num_taken >= self.num_steps:
            return False
        self.num_taken += 1
        return True


@dataclass(frozen=True, slots=True)
class Choice:
    """One exit layer for all rows, and a draft length for each, 0 or more.

    Where nobody drafts, exit layers may be `surveyed`: a head for each tells whether its draft would have been
    kept. Where rows stop drafting by themselves, `stopping` says when, and they make `expected_length` drafts on
    average. With a `lease` nobody has to ask again in the next steps of these rows, nor tell what became of them
    before.
    """

    exit_layer: int
    draft_lengths: tuple[int, ...]
    surveyed: ExitLayers = ()
    stopping: Stopping | None = None
    expected_length: float | None = None
    lease: Lease | None = field(default=None, compare=False)

    @property
    def mean_draft_length(self) -> float:
        """Drafts a row makes on average, 0 without rows."""
        if self.expected_length is not None:
            return self.expected_length
        return sum(self.draft_lengths) / max(1, len(self.draft_lengths))


class Fate(NamedTuple):
    """What became of a row's drafts in one cycle: `kept` of `drafted` ≥ 1 stood.

    `grades` tell how sure each was, where that is known. A row that `may_stop` made as many as it was sure of.
    Looked-up drafts were found by `num_matched` ids.
    """

    record: RowRecord
    drafted: int
    kept: int
    grades: Sequence[int] = ()
    is_sampled: bool = False
    may_stop: bool = False
    num_matched: int = 0


class Seen(NamedTuple):
    """What a survey says of a row: whether a draft would have been kept, and how sure it was if that is known."""

    is_kept: bool
    grade: int | None = None
    is_sampled: bool = False


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What a step of rows that only decoded took, each with so many drafts made at one exit layer."""

    exit_layer: int
    draft_lengths: tuple[int, ...]
    draft_s: float
    verify_s: float


class DraftChooser(Protocol):
    """Who chooses what requests leave open."""

    def choose(
        self,
        rows: Sequence[DraftingRow],
        *,
        among: ExitLayers = (),
        num_others: int = 0,
        can_stop: bool = False,
    ) -> Choice:
        """Exit layer, one of these, and draft lengths of rows that draft together, beside others in the step.

        Rows that `can_stop` may be told to draft until they are unsure.
        """

    def lookup_length(self, num_rows: int, limit: int, *, num_matched: int, may_exit: bool) -> int:
        """How many looked-up drafts to verify in a step of so many rows, found by so many ids that match; 0 where
        none pay, or others by early exit pay more and the row `may_exit`.
        """

    def drafted(self, exit_layer: int, drafter: Drafter, fates: Sequence[Fate]) -> None:
        """Learn how the drafts of one drafter fared in a step."""

    def surveyed(self, seen: Mapping[int, Sequence[Seen]]) -> None:
        """Learn by exit layer whether a draft made there would have been kept, row by row."""

    def observes(self, exit_layer: int, *, drafts: bool) -> bool:
        """Whether it should be told what a step took; asked once of every step that it chose for, or where others
        went on without asking, of the last of those."""

    def took(self, outcome: StepOutcome) -> None:
        """Learn what a step took."""

    def host_took(self, num_rows: int, host_s: float, *, num_drafts: int) -> None:
        """Learn what a step of so many rows and drafts took beside drafting and verifying."""

    def beliefs(self) -> Beliefs | None:
        """What choices rest on now; None where nothing is chosen. Takes time of a step: not for every one."""

    @property
    def exit_layer(self) -> int:
        """The exit layer chosen last."""

    @property
    def pays(self) -> bool:
        """Whether any drafting is worth its cost on this checkpoint, as far as is known."""


class FixedChoice:
    """Always the same exit layer and draft length."""

    pays = True

    def __init__(self, *, exit_layer: int, draft_length: int) -> None:
        self.exit_layer = exit_layer
        self._draft_length = draft_length

    def choose(
        self,
        rows: Sequence[DraftingRow],
        *,
        among: ExitLayers = (),
        num_others: int = 0,
        can_stop: bool = False,
    ) -> Choice:
        """The one choice, as far as each row may draft; of several exit layers the deepest, which drafts best."""
        lengths = tuple(min(self._draft_length, row.limit) for row in rows)
        return Choice(among[-1] if among else self.exit_layer, lengths)

    def lookup_length(self, num_rows: int, limit: int, *, num_matched: int, may_exit: bool) -> int:
        """The one draft length."""
        return min(self._draft_length, limit)

    def drafted(self, exit_layer: int, drafter: Drafter, fates: Sequence[Fate]) -> None:
        """Learn nothing."""

    def surveyed(self, seen: Mapping[int, Sequence[Seen]]) -> None:
        """Learn nothing."""

    def observes(self, exit_layer: int, *, drafts: bool) -> bool:
        """Never."""
        return False

    def took(self, outcome: StepOutcome) -> None:
        """Learn nothing."""

    def host_took(self, num_rows: int, host_s: float, *, num_drafts: int) -> None:
        """Learn nothing."""

    def beliefs(self) -> None:
        """None: nothing is chosen."""
