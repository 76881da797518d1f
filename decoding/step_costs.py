"""What a cycle costs: seconds by its number of rows, its drafts and its exit layer, measured and kept current.

Knows times and shapes of steps; knows no model and no clock.

Shapes: R numbers of rows, W widths (tokens of a row that one pass verifies), L layers, M candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

import numpy as np

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Counts = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WIDTHS: Final = (1, 2, 3, 5, 9, 17)
"""Where times are kept; between them they are interpolated."""

_LEAST_S: Final = 1e-7
_PACE: Final = 0.1
"""Share of a step's surprise that is believed."""

_SHARED: Final = 0.5
"""Share of what is believed that tells of the whole machine, not only of steps of this shape."""

_MOST_SURPRISING: Final = 4.0
"""One step that took longer than this many times the expected was held up by something else."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """A cycle and its time: every row drafted `draft_length` tokens at `exit_layer`, then all were verified."""

    num_rows: int
    exit_layer: int
    draft_length: int
    draft_s: float
    verify_s: float


class StepCosts:
    """Expected seconds of draft steps and of verification passes; `observe` keeps them true to what steps take.

    A draft step of r rows at exit layer E costs `head[r] + E · layer[r]`. Verifying costs what was measured at one
    exit layer; at another, each layer more or less is one that the pass runs over the last draft alone instead of
    over all positions.
    """

    def __init__(self, head_s_R: Floats, layer_s_R: Floats, verify_s_LRW: Floats) -> None:
        self._head_s_R = head_s_R
        self._layer_s_R = layer_s_R
        self._verify_s_LRW = verify_s_LRW

    @classmethod
    def fit(cls, measured: Sequence[StepTime], *, num_layers: int) -> Self:
        """Costs that agree with what was measured, carried on to shapes that were not.

        Needs one row drafting 0 tokens and 1 token at some exit layer, the least that any server can do.
        """
        shallow = min(step.exit_layer for step in measured if step.draft_length)
        table_RW = _carried_on(
            _verify_table([s for s in measured if s.exit_layer == shallow or not s.draft_length])
        )
        head_s_R, layer_s_R = _draft_steps(measured, shallow, table_RW[:, 0] / num_layers)
        return cls(head_s_R, layer_s_R, _at_every_exit(table_RW, head_s_R, layer_s_R, shallow, num_layers))

    def draft_s(self, exit_layer: int, num_rows: Counts) -> Floats:
        """Seconds of one draft step of each of these numbers of rows; 0 for no rows."""
        step_s_R = self._head_s_R + exit_layer * self._layer_s_R
        return np.where(num_rows > 0, np.interp(_place(num_rows), np.arange(len(ROWS)), step_s_R), 0.0)

    def verify_s(self, exit_layer: int, num_rows: int, num_tokens_M: Counts) -> Floats:
        """Seconds of verifying so many tokens of `num_rows` rows together, drafts made at `exit_layer`."""
        place = float(_place(np.array(num_rows)))
        low = min(int(place), len(ROWS) - 2)
        table_RW = self._verify_s_LRW[exit_layer]
        of_rows_W: Floats = table_RW[low] + (place - low) * (table_RW[low + 1] - table_RW[low])
        seconds_M: Floats = np.interp(num_tokens_M / num_rows, WIDTHS, of_rows_W)
        return seconds_M

    def plain_s(self, num_rows: int) -> float:
        """Seconds of a step that gives each row one token without drafts."""
        return float(self.verify_s(1, num_rows, np.array(num_rows)))

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
            _believe(surprise, self._head_s_R, nearest)
            _believe(surprise, self._layer_s_R, nearest)
        num_tokens = np.array(num_rows + int(lengths.sum()))
        surprise = verify_s / float(self.verify_s(exit_layer, num_rows, num_tokens))
        row = round(float(_place(np.array(num_rows))))
        width = int(np.abs(np.array(WIDTHS) - num_tokens / num_rows).argmin())
        _believe(surprise, self._verify_s_LRW, (slice(None), row, width))


def _believe(surprise: float, times_s: Floats, nearest: int | tuple[slice | int, ...]) -> None:
    """Move all times a little towards what a step took, and those of its own shape more."""
    bounded = min(max(surprise, 1 / _MOST_SURPRISING), _MOST_SURPRISING)
    times_s *= bounded ** (_PACE * _SHARED)
    times_s[nearest] *= bounded ** (_PACE * (1 - _SHARED))


def _place(num_rows: Counts) -> Floats:
    """Where numbers of rows stand on the scale of ROWS, which doubles from one to the next."""
    return np.clip(np.log2(np.maximum(num_rows, 1)), 0, len(ROWS) - 1)


def _verify_table(measured: Sequence[StepTime]) -> Floats:
    """The fastest time of each shape, not a number where there is none."""
    table_RW = np.full((len(ROWS), len(WIDTHS)), np.nan)
    for step in measured:
        cell = ROWS.index(step.num_rows), WIDTHS.index(1 + step.draft_length)
        table_RW[cell] = np.fmin(table_RW[cell], max(step.verify_s, _LEAST_S))
    return table_RW


def _carried_on(table_RW: Floats) -> Floats:
    """Fill what was not measured: more positions cost in proportion, more rows as much more as plain steps do."""
    table_RW = table_RW.copy()
    for width in range(1, len(WIDTHS)):
        if np.isnan(table_RW[0, width]):
            table_RW[0, width] = table_RW[0, width - 1] * WIDTHS[width] / WIDTHS[width - 1]
    for row in range(1, len(ROWS)):
        if np.isnan(table_RW[row, 0]):
            table_RW[row, 0] = 2 * table_RW[row - 1, 0]
        gaps_W = np.isnan(table_RW[row])
        table_RW[row, gaps_W] = (table_RW[row - 1] * table_RW[row, 0] / table_RW[row - 1, 0])[gaps_W]
    return table_RW


def _draft_steps(measured: Sequence[StepTime], shallow: int, per_layer_s_R: Floats) -> tuple[Floats, Floats]:
    """Head and layer seconds of draft steps, from steps of one draft at two exit layers where there are two."""
    steps_s: dict[tuple[int, int], float] = {}
    for step in measured:
        if step.draft_length == 1:
            key = ROWS.index(step.num_rows), step.exit_layer
            steps_s[key] = min(step.draft_s, steps_s.get(key, np.inf))
    head_s_R, layer_s_R = np.empty(len(ROWS)), np.empty(len(ROWS))
    for row in range(len(ROWS)):
        deeper = [(layer, s) for (at, layer), s in steps_s.items() if at == row and layer > shallow]
        near_s = steps_s.get((row, shallow))
        if near_s is None:
            growth = per_layer_s_R[row] / per_layer_s_R[row - 1]
            head_s_R[row], layer_s_R[row] = growth * head_s_R[row - 1], growth * layer_s_R[row - 1]
            continue
        layer_s = (deeper[0][1] - near_s) / (deeper[0][0] - shallow) if deeper else per_layer_s_R[row]
        layer_s_R[row] = min(max(layer_s, _LEAST_S), near_s / shallow)
        head_s_R[row] = max(near_s - shallow * layer_s_R[row], _LEAST_S)
    return head_s_R, layer_s_R


def _at_every_exit(
    table_RW: Floats, head_s_R: Floats, layer_s_R: Floats, measured_at: int, num_layers: int
) -> Floats:
    """Verification at each exit layer 0 … L − 1; plain steps, of width 1, cost the same at all."""
    tokens_RW = np.outer(ROWS, WIDTHS)
    head_s_RW = np.interp(_place(tokens_RW), np.arange(len(ROWS)), head_s_R)
    alone_s_RW = np.broadcast_to(layer_s_R[:, None], table_RW.shape)
    late_s_RW = (table_RW - measured_at * alone_s_RW - head_s_RW) / (num_layers - measured_at)
    late_s_RW = np.clip(late_s_RW, alone_s_RW, table_RW / num_layers * tokens_RW)
    later_L = np.arange(num_layers)[:, None, None] - measured_at
    verify_s_LRW: Floats = np.maximum(table_RW - later_L * (late_s_RW - alone_s_RW), _LEAST_S)
    verify_s_LRW[:, :, 0] = table_RW[:, 0]
    return verify_s_LRW
