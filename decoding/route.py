"""Which tokens of a step run in which layers: the indices that drafting and verification follow.

Depends on a step's shape alone — tokens fed, draft lengths, exit layers, rough context lengths — and on no
position or content, so that steps of the same rows share few routes.

Shapes: B rows, P rows still drafting, N tokens of a leg, M positions that choose, K drafts, Q = K + 1 choices.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import torch
from torch import Tensor

from decoding.attention import Arrangement, Attention, context_classes
from decoding.plan import Plan
from decoding.ragged import Ints, Ragged


@dataclass(frozen=True, slots=True)
class DraftLeg:
    """Layers first … last − 1 for one token of each of `rows`; the first `num_going_on` go on after it."""

    first: int
    last: int
    rows: Ints
    arrangement: Arrangement
    num_going_on: int


@dataclass(frozen=True, slots=True)
class DraftStep:
    """One early pass over the first `num_rows` rows. `order_P` puts deeper exits first, `back_P` undoes that;
    both are None where all exits are equal.
    """

    num_rows: int
    legs: tuple[DraftLeg, ...]
    order_P: Tensor | None
    back_P: Tensor | None


@dataclass(frozen=True, slots=True)
class VerifyLeg:
    """Layers first … last − 1 for the tokens that stand there: all of a row's, or only its last.

    `join_N` picks them from the tokens of the leg before and, behind those, the exit hiddens of all drafts; for
    the first leg, from the ids fed and, behind those, the ids of all drafts.
    """

    first: int
    last: int
    arrangement: Arrangement
    join_N: Tensor


@dataclass(frozen=True, slots=True)
class Places:
    """Where things lie, for the host, which looks after rows that ask for more than tokens.

    `firsts_B` is each row's first token in the last leg; choice m is row `rows_M[m]`'s, after `num_drafts_M[m]`
    of its drafts; `drafts_BK` as in the route.
    """

    firsts_B: Ints
    rows_M: Ints
    num_drafts_M: Ints
    drafts_BK: Ints


@dataclass(frozen=True, slots=True)
class Route:
    """A step's way through the layers.

    Drafts by early exit lie step after step in one list, and behind them likewise a draft model's. `last_fed_B`
    picks each row's last fed id; `choosing_M` the tokens of the last leg that choose (None: all), of rows
    `rows_M`, `ahead_M` positions after the row's first computed one; `choices_BQ` picks each row's choices and
    `drafts_BK`, from fed ids and drafted ids, its drafts, anything past its own.
    """

    places: Places
    last_fed_B: Tensor
    draft_steps: tuple[DraftStep, ...]
    verify_legs: tuple[VerifyLeg, ...]
    choosing_M: Tensor | None
    rows_M: Tensor
    ahead_M: Tensor
    choices_BQ: Tensor
    drafts_BK: Tensor


_KEPT_ROUTES: Final = 64
"""Rows that draft now more, now less come back to shapes that they had: more than so many are seldom met again."""


class Routes:
    """Makes routes, and keeps the latest: while a batch decodes, steps have few shapes."""

    def __init__(self, attention: Attention, *, num_layers: int, device: torch.device) -> None:
        self._attention = attention
        self._num_layers = num_layers
        self._device = device
        self._kept: OrderedDict[tuple[bytes, ...], Route] = OrderedDict()

    def of(self, plan: Plan) -> Route:
        """The route of this plan."""
        classes_B = context_classes(plan.num_computed_B + plan.num_fed_B + plan.num_made_B)
        arrays = (
            plan.num_fed_B,
            plan.num_looked_up_B,
            plan.draft_lengths_B,
            plan.exit_layers_B,
            plan.model_lengths_B,
            plan.chooses_B,
            classes_B,
        )
        shape = tuple(array.tobytes() for array in arrays)
        route = self._kept.pop(shape, None) or self._make(plan, classes_B)
        self._kept[shape] = route
        if len(self._kept) > _KEPT_ROUTES:
            self._kept.popitem(last=False)
        return route

    def _make(self, plan: Plan, classes_B: Ints) -> Route:
        lengths_B = plan.draft_lengths_B
        num_drafting_K = (lengths_B > np.arange(lengths_B[0])[:, None]).sum(1)
        drafts = _DraftList.of(plan)
        whole = Ragged.of(plan.num_fed_B + plan.num_made_B)
        # A row chooses after its last known token and after each of its drafts.
        last_known_B = plan.num_fed_B - plan.num_looked_up_B - 1
        is_choice_N = plan.chooses_B[whole.rows_N] & (whole.steps_N >= last_known_B[whole.rows_N])
        num_drafts_B = plan.num_drafts_B
        columns_Q = np.arange(num_drafts_B.max() + 1)
        choosing_M = np.flatnonzero(is_choice_N)
        num_choices_B = np.bincount(whole.rows_N[choosing_M], minlength=len(lengths_B))
        choices_BQ = (np.cumsum(num_choices_B) - num_choices_B)[:, None] + columns_Q
        drafts_BK = _drafted(plan, drafts)
        return Route(
            places=Places(
                firsts_B=whole.firsts_B,
                rows_M=whole.rows_N[choosing_M],
                num_drafts_M=(whole.steps_N - last_known_B[whole.rows_N])[choosing_M],
                drafts_BK=drafts_BK,
            ),
            last_fed_B=self._on_device(np.cumsum(plan.num_fed_B) - 1),
            draft_steps=self._draft_steps(plan, classes_B, num_drafting_K),
            verify_legs=self._verify_legs(plan, classes_B, drafts),
            choosing_M=None if is_choice_N.all() else self._on_device(choosing_M),
            rows_M=self._on_device(whole.rows_N[choosing_M]),
            ahead_M=self._on_device(whole.steps_N[choosing_M] + 1),
            choices_BQ=self._on_device(np.where(columns_Q < num_choices_B[:, None], choices_BQ, 0)),
            drafts_BK=self._on_device(drafts_BK),
        )

    def _draft_steps(self, plan: Plan, classes_B: Ints, num_drafting_K: Ints) -> tuple[DraftStep, ...]:
        distinct = {
            num_rows: self._draft_step(plan.exit_layers_B[:num_rows], classes_B[:num_rows])
            for num_rows in set(num_drafting_K.tolist())
        }
        return tuple(distinct[num_rows] for num_rows in num_drafting_K.tolist())

    def _draft_step(self, exit_layers_P: Ints, classes_P: Ints) -> DraftStep:
        # Deeper exits first, so that the rows that go on at a boundary are the first ones.
        order_P = np.argsort(-exit_layers_P, kind="stable")
        exits = np.unique(exit_layers_P).tolist()
        legs = []
        for first, last in zip([0, *exits], exits, strict=False):
            rows = order_P[: int((exit_layers_P > first).sum())]
            arrangement = self._attention.arrange(Ragged.of(np.ones_like(rows)), classes_P[rows])
            legs.append(DraftLeg(first, last, rows, arrangement, int((exit_layers_P > last).sum())))
        is_uniform = len(exits) == 1
        return DraftStep(
            num_rows=len(exit_layers_P),
            legs=tuple(legs),
            order_P=None if is_uniform else self._on_device(order_P),
            back_P=None if is_uniform else self._on_device(np.argsort(order_P)),
        )

    def _verify_legs(self, plan: Plan, classes_B: Ints, drafts: _DraftList) -> tuple[VerifyLeg, ...]:
        joins = np.unique(plan.exit_layers_B[plan.draft_lengths_B > 0]).tolist()
        legs: list[VerifyLeg] = []
        before: Ragged | None = None
        for first, last in zip([0, *joins], [*joins, self._num_layers], strict=True):
            standing = _standing(plan, first)
            join_N = (
                _entering(plan, standing, drafts) if before is None else _joining(before, standing, drafts)
            )
            arrangement = self._attention.arrange(standing, classes_B)
            legs.append(VerifyLeg(first, last, arrangement, self._on_device(join_N)))
            before = standing
        return tuple(legs)

    def _on_device(self, array: Ints) -> Tensor:
        return torch.from_numpy(array).to(self._device)


@dataclass(frozen=True, slots=True)
class _DraftList:
    """Where each draft lies in the list of all: row b's i-th at `places_BK[b, i]`."""

    places_BK: Ints

    @classmethod
    def of(cls, plan: Plan) -> Self:
        steps_K1 = np.arange(plan.num_made_B.max())[:, None]
        is_early_KB, is_foreign_KB = plan.draft_lengths_B > steps_K1, plan.model_lengths_B > steps_K1
        early_KB = np.cumsum(is_early_KB).reshape(is_early_KB.shape)
        foreign_KB = is_early_KB.sum() + np.cumsum(is_foreign_KB).reshape(is_early_KB.shape)
        return cls(np.where(is_foreign_KB, foreign_KB, early_KB).T - 1)

    def index(self, rows: Ints, steps: Ints) -> Ints:
        places: Ints = self.places_BK[rows, steps]
        return places


def _standing(plan: Plan, layer: int) -> Ragged:
    """Which tokens run in `layer`: below its exit layer a drafting row still lacks all but its last draft."""
    is_early_B = (plan.draft_lengths_B > 0) & (plan.exit_layers_B > layer)
    whole_B = plan.num_fed_B + plan.num_made_B
    return Ragged.of(np.where(is_early_B, 1, whole_B), np.where(is_early_B, whole_B - 1, 0))


def _drafted(plan: Plan, drafts: _DraftList) -> Ints:
    """Where each row's drafts lie, [B, K]: an index into fed ids, then drafted ids; 0 past a row's own."""
    columns_K = np.arange(plan.num_drafts_B.max())
    is_made_BK = columns_K < plan.num_made_B[:, None]
    is_looked_up_BK = columns_K < plan.num_looked_up_B[:, None]
    index_BK: Ints = np.zeros(is_made_BK.shape, dtype=np.int64)
    index_BK[is_made_BK] = plan.num_fed_B.sum() + drafts.index(*is_made_BK.nonzero())
    # Looked-up drafts are the last of the row's fed ids.
    firsts_B = np.cumsum(plan.num_fed_B) - plan.num_looked_up_B
    rows, steps = is_looked_up_BK.nonzero()
    index_BK[is_looked_up_BK] = firsts_B[rows] + steps
    return index_BK


def _entering(plan: Plan, standing: Ragged, drafts: _DraftList) -> Ints:
    """Fed tokens, the last draft by early exit of each row and all of a draft model's: an index into fed ids, then
    drafted ids.
    """
    rows_N, steps_N = standing.rows_N, standing.steps_N
    ahead_N = steps_N - plan.num_fed_B[rows_N]
    is_draft_N = ahead_N >= 0
    index_N = (np.cumsum(plan.num_fed_B) - plan.num_fed_B)[rows_N] + steps_N
    index_N[is_draft_N] = plan.num_fed_B.sum() + drafts.index(rows_N[is_draft_N], ahead_N[is_draft_N])
    return index_N


def _joining(before: Ragged, after: Ragged, drafts: _DraftList) -> Ints:
    """The tokens of the leg before, and the exit hiddens of the rows whose exit layer this is, in their places."""
    rows_N, steps_N = after.rows_N, after.steps_N
    joins_N = steps_N < before.skipped_B[rows_N]
    index_N = before.firsts_B[rows_N] + steps_N
    index_N[joins_N] = before.counts_B.sum() + drafts.index(rows_N[joins_N], steps_N[joins_N])
    return index_N
