"""What a cycle costs: seconds by its number of rows, its drafts and its exit layer, measured and kept current.

Knows times and shapes of steps; knows no model and no clock.

Shapes: R numbers of rows, W widths (tokens of a row that one pass verifies). What is asked for has any shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Counts = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WIDTHS: Final = (1, 2, 3, 4, 5, 7, 9, 12, 17)
"""Where times are kept; between them they are interpolated."""

PLACES: Final = np.arange(len(ROWS))
"""Where these stand on a scale that doubles from one to the next."""

STEEPEST: Final = 1.6
_LEAST_SHARE: Final = 0.6
"""A layer may cost so many times what each of the usual exit layer's does, since few layers stay in a near cache
that more leave. The line is then below nothing at its start; but layers cost so much of their price at least.
"""

LEAST_S: Final = 1e-7
"""No time is less: it may be divided by."""
_KNOWN: Final = 10
_PACE: Final = 0.1
_SHARED_PACE: Final = 0.05
"""Share of a step's surprise that is believed, of its shape and of the whole machine, once its shape is known."""

_NEAR: Final = 2.0
"""Exit layers so close to those mostly drafted at say how fast the machine is; others, what depth costs."""

_LEAST_LEFT: Final = 0.5
"""Of a pass without drafts, one with drafts takes so much at least, whatever layers save it."""

_FEW_DRAFTS: Final = 4
"""Steps of fewer drafts say little of what one takes the host."""

_FIRST_WEIGHT: Final = 4
"""What was measured or guessed at the start counts like so many steps seen."""

_MOST_SURPRISING: Final = 2.0
"""One step that took longer than this many times the expected was held up by something else."""


@dataclass(frozen=True, slots=True)
class DraftSeconds:
    """What drafting takes: its start, and the head and each layer of a draft step."""

    start_s_R: Floats
    head_s_R: Floats
    layer_s_R: Floats


@dataclass(frozen=True, slots=True)
class HostSeconds:
    """What the host takes beside: in a step without drafts and in one with them, and more for each draft."""

    whole_s_2R: Floats
    draft_s: float = 0.0


class StepCosts:
    """Expected seconds of draft steps, of verification passes and of the host beside them; `observe` and
    `observe_host` keep them true to what steps take.

    A draft step of r rows at exit layer E costs `head[r] + E · layer[r]`, and the first one `start[r]` more. A
    head below 0 says that layers cost more the more there are. Each draft takes the host some time, too.
    Verifying w tokens of each costs `verify[r, w] − E · saved[r, w]`: in each layer before the exit the pass runs
    over the last draft alone instead of over all positions. The host takes `host[0, r]` in a step without drafts,
    `host[1, r]` in one with them.
    """

    def __init__(
        self,
        drafting: DraftSeconds,
        verify_s_RW: Floats,
        saved_s_RW: Floats,
        host: HostSeconds | None = None,
        *,
        exit_layer: float = 1.0,
    ) -> None:
        self._start_s_R = drafting.start_s_R
        self._head_s_R = drafting.head_s_R
        self._layer_s_R = drafting.layer_s_R
        self._verify_s_RW = verify_s_RW
        self._saved_s_RW = saved_s_RW
        self._host_s_2R = np.zeros((2, len(ROWS))) if host is None else host.whole_s_2R
        self._host_draft_s = 0.0 if host is None else host.draft_s
        self._centre_R = np.full(len(ROWS), float(exit_layer))
        self._num_drafted_R = np.zeros(len(ROWS), dtype=np.int64)
        self._num_tilted_R = np.zeros(len(ROWS), dtype=np.int64)
        self._num_verified_RW = np.zeros((len(ROWS), len(WIDTHS)), dtype=np.int64)

    def draft_s(self, exit_layers: Counts | int, num_rows: Counts) -> Floats:
        """Seconds of one draft step of each of these numbers of rows at these exit layers, and of the host for
        its drafts; 0 for no rows.
        """
        step_s: Floats = self._computing_s(exit_layers, num_rows) + self._host_draft_s * num_rows
        return step_s

    def _computing_s(self, exit_layers: Counts | int, num_rows: Counts) -> Floats:
        places = place_of_each(num_rows)
        head_s, layer_s = (np.interp(places, PLACES, each_R) for each_R in (self._head_s_R, self._layer_s_R))
        step_s: Floats = _line_s(head_s, layer_s, exit_layers) * (num_rows > 0)
        return step_s

    def start_s(self, num_rows: int) -> float:
        """Seconds of drafting beside its draft steps, in a step of so many rows."""
        return float(_between(self._start_s_R, num_rows))

    def verify_s(self, exit_layers: Counts | int, num_rows: int, num_tokens: Counts) -> Floats:
        """Seconds of verifying so many tokens of `num_rows` rows together, drafts made at these exit layers."""
        # Wherever drafts left, one token of each row passes all layers.
        least_s = max(float(_between(self._verify_s_RW, num_rows)[0]), LEAST_S)
        left_s: Floats = np.maximum(self._pass_s(exit_layers, num_rows, num_tokens), least_s)
        return left_s

    def _pass_s(self, exit_layers: Counts | int, num_rows: int, num_tokens: Counts) -> Floats:
        """As it was learned: a little less than a pass without drafts may be true of what was timed elsewhere."""
        widths = num_tokens / num_rows
        whole_s: Floats = np.interp(widths, WIDTHS, _between(self._verify_s_RW, num_rows))
        saved_s = exit_layers * np.interp(widths, WIDTHS, _between(self._saved_s_RW, num_rows))
        left_s: Floats = np.maximum(whole_s - saved_s, LEAST_S)
        return left_s

    def plain_s(self, num_rows: int) -> float:
        """Seconds of a step that gives each row one token without drafts."""
        return float(self.verify_s(1, num_rows, np.array(num_rows)))

    def host_s(self, num_rows: int, *, drafts: bool) -> float:
        """Seconds of a step beside drafting and verifying, with drafts or without; what each draft takes the host
        counts with drafting.
        """
        return float(_between(self._host_s_2R[int(drafts)], num_rows))

    @property
    def host_draft_s(self) -> float:
        """Seconds that a draft takes the host, by whomever it was made."""
        return self._host_draft_s

    def observe_host(self, num_rows: int, host_s: float, *, num_drafts: int) -> None:
        """Learn from any step; one that was held up counts little."""
        place = int(num_drafts > 0), round(_place_of(num_rows))
        known_s = self._host_s_2R[place] + num_drafts * self._host_draft_s
        more_s = _PACE * (min(host_s, _MOST_SURPRISING * known_s + LEAST_S) - known_s)
        self._host_s_2R[place] = max(self._host_s_2R[place] + more_s, 0.0)
        # Steps of many drafts and of few tell together what one takes.
        more_draft_s = more_s * num_drafts / (num_drafts**2 + _FEW_DRAFTS**2)
        self._host_draft_s = max(self._host_draft_s + more_draft_s, 0.0)

    def observe(
        self, exit_layer: int, draft_lengths: Sequence[int], *, draft_s: float, verify_s: float
    ) -> None:
        """Learn from a step of rows that only decoded, each with so many drafts."""
        lengths = np.array(draft_lengths)
        num_rows = len(lengths)
        drafting = np.array(
            [int((lengths > ahead).sum()) for ahead in range(int(lengths.max()))], dtype=np.int64
        )
        row = round(_place_of(num_rows))
        centre = float(self._centre_R[row])
        if len(drafting):
            expected_s = self.start_s(num_rows) + float(self._computing_s(exit_layer, drafting).sum())
            surprise = draft_s / expected_s
            nearest = round(float(place_of_each(drafting[:1])[0]))
            self._believe_start(surprise, len(drafting), row=row)
            self._believe_drafts(surprise, exit_layer, nearest)
        num_tokens = np.array(num_rows + int(lengths.sum()))
        if num_tokens > WIDTHS[-1] * num_rows:
            # Wider than any time that is kept: the widest would be taken to cost so much.
            return
        width = int(np.abs(np.array(WIDTHS) - num_tokens / num_rows).argmin())
        self._keep_positive(exit_layer, (row, width))
        surprise = verify_s / float(self._pass_s(exit_layer, num_rows, num_tokens))
        if width and abs(exit_layer - centre) > _NEAR:
            self._tilt_saved(surprise, exit_layer, centre, (row, width))
        else:
            _believe(surprise, (self._verify_s_RW, self._saved_s_RW), (row, width), self._num_verified_RW)

    def _keep_positive(self, exit_layer: int, cell: tuple[int, int]) -> None:
        """Lines that were tilted elsewhere may have come below 0 here, where no factor would raise them."""
        least_s = max(_LEAST_LEFT * float(self._verify_s_RW[cell[0], 0]), LEAST_S)
        left_s = float(self._verify_s_RW[cell]) - exit_layer * float(self._saved_s_RW[cell])
        self._verify_s_RW[cell] += max(least_s - left_s, 0.0)

    def _tilt_saved(self, surprise: float, exit_layer: int, centre: float, cell: tuple[int, int]) -> None:
        """What passes take whose drafts left far from the usual says what a layer saves them."""
        at_centre_s = self._verify_s_RW[cell] - centre * self._saved_s_RW[cell]
        there_s = self._verify_s_RW[cell] - exit_layer * self._saved_s_RW[cell]
        there_s *= _bounded(surprise) ** _PACE
        self._saved_s_RW[cell] = max((at_centre_s - there_s) / (exit_layer - centre), 0.0)
        self._verify_s_RW[cell] = at_centre_s + centre * self._saved_s_RW[cell]

    def _believe_start(self, surprise: float, num_steps: int, *, row: int) -> None:
        """One draft says as much of the start as of a draft step, many say little."""
        self._start_s_R[row] *= _bounded(surprise) ** (_PACE / num_steps)

    def _believe_drafts(self, surprise: float, exit_layer: int, row: int) -> None:
        """Near the exit layers that are mostly used the whole line moves; far from them it tilts about those."""
        centre = self._centre_R[row]
        self._centre_R[row] += _SHARED_PACE * (exit_layer - centre)
        if abs(exit_layer - centre) <= _NEAR:
            _believe(surprise, (self._head_s_R, self._layer_s_R), row, self._num_drafted_R)
            return
        there_s = self._believed_s(row, exit_layer)
        there_s *= _bounded(surprise) ** max(_PACE, 1 / (1 + self._num_tilted_R[row]))
        at_centre_s = self._believed_s(row, centre)
        tilted_s = (there_s - at_centre_s) / (exit_layer - centre)
        self._layer_s_R[row] = min(max(tilted_s, LEAST_S), STEEPEST * at_centre_s / centre)
        self._head_s_R[row] = at_centre_s - centre * self._layer_s_R[row]
        self._num_tilted_R[row] += 1

    def _believed_s(self, row: int, exit_layer: float) -> float:
        return max(float(_line_s(self._head_s_R[row], self._layer_s_R[row], exit_layer)), LEAST_S)


def _line_s(head_s: Floats, layer_s: Floats, exit_layers: Counts | float) -> Floats:
    """A draft step at these exit layers, of one head and one price of a layer for each number of rows."""
    layers_s = exit_layers * layer_s
    line_s: Floats = np.maximum(head_s + layers_s, _LEAST_SHARE * layers_s)
    return line_s


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


def place_of_each(num_rows: Counts) -> Floats:
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
