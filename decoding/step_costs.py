"""What a cycle costs: seconds by its number of rows, its drafts and its exit layer, measured and kept current.

Knows times and shapes of steps; knows no model and no clock.

Shapes: R numbers of rows, W widths (tokens of a row that one pass verifies). What is asked for has any shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

import numpy as np

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Counts = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WIDTHS: Final = (1, 2, 3, 5, 9, 17)
"""Where times are kept; between them they are interpolated."""

_PLACES: Final = np.arange(len(ROWS))

_LEAST_S: Final = 1e-7
_KNOWN: Final = 10
_PACE: Final = 0.1
_SHARED_PACE: Final = 0.05
"""Share of a step's surprise that is believed, of its shape and of the whole machine, once its shape is known."""

_NEAR: Final = 2.0
"""Exit layers so close to those mostly drafted at say how fast the machine is; others, what depth costs."""

_FIRST_WEIGHT: Final = 4
"""What was measured or guessed at the start counts like so many steps seen."""

_MOST_SURPRISING: Final = 2.0
"""One step that took longer than this many times the expected was held up by something else."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """A cycle and its time: every row drafted `draft_length` tokens at `exit_layer`, then all were verified.

    `host_s` is what the step took beside: planning, and committing what it gave.
    """

    num_rows: int
    exit_layer: int
    draft_length: int
    draft_s: float
    verify_s: float
    host_s: float = 0.0


class StepCosts:
    """Expected seconds of draft steps, of verification passes and of the host beside them; `observe` and
    `observe_host` keep them true to what steps take.

    A draft step of r rows at exit layer E costs `head[r] + E · layer[r]`. Verifying w tokens of each costs
    `verify[r, w] − E · saved[r, w]`: in each layer before the exit the pass runs over the last draft alone instead
    of over all positions.
    """

    def __init__(
        self,
        head_s_R: Floats,
        layer_s_R: Floats,
        verify_s_RW: Floats,
        saved_s_RW: Floats,
        host_s_R: Floats | None = None,
        *,
        exit_layer: float = 1.0,
    ) -> None:
        self._head_s_R = head_s_R
        self._layer_s_R = layer_s_R
        self._verify_s_RW = verify_s_RW
        self._saved_s_RW = saved_s_RW
        self._host_s_R = np.zeros(len(ROWS)) if host_s_R is None else host_s_R
        self._centre_R = np.full(len(ROWS), float(exit_layer))
        self._num_drafted_R = np.zeros(len(ROWS), dtype=np.int64)
        self._num_tilted_R = np.zeros(len(ROWS), dtype=np.int64)
        self._num_verified_RW = np.zeros((len(ROWS), len(WIDTHS)), dtype=np.int64)

    @classmethod
    def fit(cls, measured: Sequence[StepTime], *, num_layers: int) -> Self:
        """Costs that agree with what was measured, carried on to shapes that were not.

        All drafts were made at one exit layer. Needs one row drafting 0 tokens and 1 token, the least that any
        server can do.
        """
        (exit_layer,) = {step.exit_layer for step in measured if step.draft_length}
        table_RW = _carried_on(_verify_table(measured))
        head_s_R, layer_s_R = _draft_steps(measured, exit_layer, table_RW[:, 0], num_layers)
        saved_s_RW = _saved(table_RW, head_s_R, layer_s_R, exit_layer, num_layers)
        whole_s_RW = table_RW + exit_layer * saved_s_RW
        return cls(
            head_s_R, layer_s_R, whole_s_RW, saved_s_RW, _host_s(measured), exit_layer=float(exit_layer)
        )

    def draft_s(self, exit_layers: Counts | int, num_rows: Counts) -> Floats:
        """Seconds of one draft step of each of these numbers of rows at these exit layers; 0 for no rows."""
        places = _place(num_rows)
        head_s, layer_s = (np.interp(places, _PLACES, each_R) for each_R in (self._head_s_R, self._layer_s_R))
        step_s: Floats = (head_s + exit_layers * layer_s) * (num_rows > 0)
        return step_s

    def verify_s(self, exit_layers: Counts | int, num_rows: int, num_tokens: Counts) -> Floats:
        """Seconds of verifying so many tokens of `num_rows` rows together, drafts made at these exit layers."""
        widths = num_tokens / num_rows
        whole_s: Floats = np.interp(widths, WIDTHS, _between(self._verify_s_RW, num_rows))
        return whole_s - exit_layers * np.interp(widths, WIDTHS, _between(self._saved_s_RW, num_rows))

    def plain_s(self, num_rows: int) -> float:
        """Seconds of a step that gives each row one token without drafts."""
        return float(self.verify_s(1, num_rows, np.array(num_rows)))

    def host_s(self, num_rows: int) -> float:
        """Seconds of a step beside drafting and verifying."""
        return float(_between(self._host_s_R, num_rows))

    def observe_host(self, num_rows: int, host_s: float) -> None:
        """Learn from any step; one that was held up counts little."""
        nearest = round(_place_of(num_rows))
        known_s = self._host_s_R[nearest]
        self._host_s_R[nearest] += _PACE * (min(host_s, _MOST_SURPRISING * known_s + _LEAST_S) - known_s)

    def observe(
        self, exit_layer: int, draft_lengths: Sequence[int], *, draft_s: float, verify_s: float
    ) -> None:
        """Learn from a step of rows that only decoded, each with so many drafts."""
        lengths = np.array(draft_lengths)
        num_rows = len(lengths)
        drafting = np.array(
            [int((lengths > ahead).sum()) for ahead in range(int(lengths.max()))], dtype=np.int64
        )
        if len(drafting):
            surprise = draft_s / float(self.draft_s(exit_layer, drafting).sum())
            nearest = round(float(_place(drafting[:1])[0]))
            self._believe_drafts(surprise, exit_layer, nearest)
        num_tokens = np.array(num_rows + int(lengths.sum()))
        if num_tokens > WIDTHS[-1] * num_rows:
            # Wider than any time that is kept: the widest would be taken to cost so much.
            return
        surprise = verify_s / float(self.verify_s(exit_layer, num_rows, num_tokens))
        row = round(_place_of(num_rows))
        width = int(np.abs(np.array(WIDTHS) - num_tokens / num_rows).argmin())
        _believe(surprise, (self._verify_s_RW, self._saved_s_RW), (row, width), self._num_verified_RW)

    def _believe_drafts(self, surprise: float, exit_layer: int, row: int) -> None:
        """Near the exit layers that are mostly used the whole line moves; far from them it tilts about those."""
        centre = self._centre_R[row]
        self._centre_R[row] += _SHARED_PACE * (exit_layer - centre)
        if abs(exit_layer - centre) <= _NEAR:
            _believe(surprise, (self._head_s_R, self._layer_s_R), row, self._num_drafted_R)
            return
        there_s = self._head_s_R[row] + exit_layer * self._layer_s_R[row]
        there_s *= _bounded(surprise) ** max(_PACE, 1 / (1 + self._num_tilted_R[row]))
        at_centre_s = self._head_s_R[row] + centre * self._layer_s_R[row]
        tilted_s = (there_s - at_centre_s) / (exit_layer - centre)
        self._layer_s_R[row] = min(max(tilted_s, _LEAST_S), at_centre_s / centre)
        self._head_s_R[row] = max(at_centre_s - centre * self._layer_s_R[row], _LEAST_S)
        self._num_tilted_R[row] += 1


def _bounded(surprise: float) -> float:
    return min(max(surprise, 1 / _MOST_SURPRISING), _MOST_SURPRISING)


def _believe(
    surprise: float, times_s: Sequence[Floats], cell: int | tuple[int, int], num_seen: Counts
) -> None:
    """Move a cell's times towards what a step took, fast while few were seen; then all others a little too."""
    bounded = _bounded(surprise)
    own = max(_PACE, 1 / (_FIRST_WEIGHT + num_seen[cell]))
    shared = _SHARED_PACE if num_seen[cell] >= _KNOWN else 0.0
    for each_s in times_s:
        each_s[cell] *= bounded ** (own - shared)
        np.multiply(each_s, bounded**shared, out=each_s)
    num_seen[cell] += 1


def _place(num_rows: Counts) -> Floats:
    """Where numbers of rows stand on the scale of ROWS, which doubles from one to the next."""
    return np.minimum(np.log2(np.maximum(num_rows, 1)), len(ROWS) - 1)


def _place_of(num_rows: int) -> float:
    """The same of one number."""
    return min(math.log2(max(num_rows, 1)), len(ROWS) - 1.0)


def _between(table_R: Floats, num_rows: int) -> Floats:
    """What a table says of this number of rows: `table_R[r]` for any r, further axes kept."""
    place = _place_of(num_rows)
    low = min(int(place), len(ROWS) - 2)
    between: Floats = table_R[low] + (place - low) * (table_R[low + 1] - table_R[low])
    return between


def _verify_table(measured: Sequence[StepTime]) -> Floats:
    """The fastest time of each shape, not a number where there is none."""
    table_RW = np.full((len(ROWS), len(WIDTHS)), np.nan)
    for step in measured:
        cell = ROWS.index(step.num_rows), WIDTHS.index(1 + step.draft_length)
        table_RW[cell] = np.fmin(table_RW[cell], max(step.verify_s, _LEAST_S))
    return table_RW


def _carried_on(table_RW: Floats) -> Floats:
    """Fill gaps from what was measured with as many tokens in all; beyond the most, tokens cost in proportion."""
    tokens_RW = np.outer(ROWS, WIDTHS)
    is_known_RW = ~np.isnan(table_RW)
    order_M = np.argsort(tokens_RW[is_known_RW], kind="stable")
    tokens_M, seconds_M = tokens_RW[is_known_RW][order_M], _never_falling(table_RW[is_known_RW][order_M])
    filled_RW = np.interp(tokens_RW, tokens_M, seconds_M) * np.maximum(tokens_RW / tokens_M[-1], 1.0)
    whole_RW = np.where(is_known_RW, table_RW, filled_RW)
    return _never_falling(_never_falling(whole_RW).T).T


def _never_falling(seconds_N: Floats) -> Floats:
    """No more than what comes later along the last axis: a step that was held up should not look dearer."""
    cleaned_N: Floats = np.minimum.accumulate(seconds_N[..., ::-1], axis=-1)[..., ::-1]
    return cleaned_N


def _host_s(measured: Sequence[StepTime]) -> Floats:
    """Host seconds by rows, whatever was drafted; between and beyond, as measured nearest."""
    fastest = {
        rows: min(step.host_s for step in measured if step.num_rows == rows)
        for rows in sorted({step.num_rows for step in measured})
    }
    known_s = np.interp(np.log2(ROWS), np.log2(list(fastest)), list(fastest.values()))
    return np.asarray(known_s, dtype=np.float64)


def _draft_steps(
    measured: Sequence[StepTime], exit_layer: int, plain_s_R: Floats, num_layers: int
) -> tuple[Floats, Floats]:
    """Head and layer seconds of draft steps. A plain step is a draft step that leaves after the last layer."""
    step_s_R = np.full(len(ROWS), np.inf)
    for step in measured:
        if step.draft_length == 1:
            row = ROWS.index(step.num_rows)
            step_s_R[row] = min(step_s_R[row], step.draft_s)
    is_known_R = np.isfinite(step_s_R)
    share_R = np.interp(_PLACES, np.flatnonzero(is_known_R), (step_s_R / plain_s_R)[is_known_R])
    step_s_R = np.minimum(share_R, 1.0) * plain_s_R
    layer_s_R = np.minimum((plain_s_R - step_s_R) / (num_layers - exit_layer), step_s_R / exit_layer)
    layer_s_R = np.maximum(layer_s_R, _LEAST_S)
    return np.maximum(step_s_R - exit_layer * layer_s_R, _LEAST_S), layer_s_R


def _saved(
    table_RW: Floats, head_s_R: Floats, layer_s_R: Floats, measured_at: int, num_layers: int
) -> Floats:
    """What each layer before the exit saves a pass: all positions but one. Plain steps save nothing."""
    head_s_RW = np.interp(_place(np.outer(ROWS, WIDTHS)), _PLACES, head_s_R)
    alone_s_RW = layer_s_R[:, None]
    late_s_RW = (table_RW - measured_at * alone_s_RW - head_s_RW) / (num_layers - measured_at)
    saved_s_RW: Floats = np.maximum(late_s_RW - alone_s_RW, 0.0)
    saved_s_RW[:, 0] = 0.0
    return saved_s_RW
