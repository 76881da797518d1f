"""What steps cost before the first request came: from a few shapes that were measured, for all shapes.

Knows times and shapes of steps; `decoding.step_costs` learns the rest.

Shapes: R numbers of rows, W widths (tokens of a row that one pass verifies).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

import numpy as np

from decoding.step_costs import (
    LEAST_S,
    PLACES,
    ROWS,
    STEEPEST,
    WIDTHS,
    DraftSeconds,
    Floats,
    HostSeconds,
    StepCosts,
    place_of_each,
)

_LEAST_PART: Final = 0.25
_MOST_PART: Final = 0.95
"""Of one draft's time, a draft step takes so much at least and at most, and its start the rest."""


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


def fitted_costs(measured: Sequence[StepTime], *, num_layers: int) -> StepCosts:
    """Costs that agree with what was measured, carried on to shapes that were not.

    Drafts were made at one exit layer, and some at a deeper one, which tell what depth costs. Needs one row
    drafting 0 tokens and 1 token, the least that any server can do.
    """
    exit_layer = min(step.exit_layer for step in measured if step.draft_length)
    near = [step for step in measured if step.exit_layer == exit_layer or not step.draft_length]
    early = {(step.num_rows, step.draft_length): step for step in near if step.draft_length}
    deep = [
        step
        for step in measured
        if step.exit_layer > exit_layer and (step.num_rows, step.draft_length) in early
    ]
    table_RW = _carried_on(_verify_table(near))
    start_s_R, step_s_R = _draft_steps(near, table_RW[:, 0])
    if deep:
        layer_s_R = _layers(deep, early, step_s_R)
    else:
        layer_s_R = _layers_of_plain(step_s_R, exit_layer, table_RW[:, 0], num_layers)
    head_s_R = step_s_R - exit_layer * layer_s_R
    saved_s_RW = _saved(table_RW, head_s_R, layer_s_R, exit_layer, num_layers)
    saved_s_RW *= _share_saved(deep, table_RW, saved_s_RW, exit_layer)[:, None]
    whole_s_RW = table_RW + exit_layer * saved_s_RW
    return StepCosts(
        DraftSeconds(start_s_R, head_s_R, layer_s_R),
        whole_s_RW,
        saved_s_RW,
        _host(measured),
        exit_layer=float(exit_layer),
    )


def _verify_table(measured: Sequence[StepTime]) -> Floats:
    """The fastest time of each shape, not a number where there is none."""
    table_RW = np.full((len(ROWS), len(WIDTHS)), np.nan)
    for step in measured:
        cell = ROWS.index(step.num_rows), WIDTHS.index(1 + step.draft_length)
        table_RW[cell] = np.fmin(table_RW[cell], max(step.verify_s, LEAST_S))
    return table_RW


def _carried_on(table_RW: Floats) -> Floats:
    """Fill gaps between what was measured of as many rows, beyond that from what was measured with as many tokens
    in all; beyond the most, tokens cost in proportion.
    """
    tokens_RW = np.outer(ROWS, WIDTHS)
    is_known_RW = ~np.isnan(table_RW)
    order_M = np.argsort(tokens_RW[is_known_RW], kind="stable")
    tokens_M, seconds_M = tokens_RW[is_known_RW][order_M], _never_falling(table_RW[is_known_RW][order_M])
    filled_RW = np.interp(tokens_RW, tokens_M, seconds_M) * np.maximum(tokens_RW / tokens_M[-1], 1.0)
    whole_RW = np.where(is_known_RW, table_RW, filled_RW)
    for whole_W, is_known_W in zip(whole_RW, is_known_RW, strict=True):
        known = np.flatnonzero(is_known_W)
        if len(known):
            # More tokens of these rows take no less.
            np.maximum(whole_W, whole_W[known[-1]], out=whole_W, where=np.arange(len(WIDTHS)) > known[-1])
            inside = slice(known[-1])
            whole_W[inside] = np.interp(np.array(WIDTHS)[inside], np.array(WIDTHS)[known], whole_W[known])
    return _never_falling(_never_falling(whole_RW).T).T


def _never_falling(seconds_N: Floats) -> Floats:
    """No more than what comes later along the last axis: a step that was held up should not look dearer."""
    cleaned_N: Floats = np.minimum.accumulate(seconds_N[..., ::-1], axis=-1)[..., ::-1]
    return cleaned_N


def _host(measured: Sequence[StepTime]) -> HostSeconds:
    """What the host takes, and for each draft: what longer drafts of as many rows took more."""
    plain = [step for step in measured if not step.draft_length]
    drafting = [step for step in measured if step.draft_length]
    more_s: list[float] = []
    for num_rows in {step.num_rows for step in drafting}:
        fastest: dict[int, float] = {}
        for step in drafting:
            if step.num_rows == num_rows:
                fastest[step.draft_length] = min(step.host_s, fastest.get(step.draft_length, step.host_s))
        shortest, longest = min(fastest), max(fastest)
        if longest > shortest:
            num_more = num_rows * (longest - shortest)
            more_s.append((fastest[longest] - fastest[shortest]) / num_more)
    draft_s = max(median(more_s), 0.0) if more_s else 0.0
    return HostSeconds(np.stack([_host_s(plain, draft_s), _host_s(drafting, draft_s)]), draft_s)


def _host_s(measured: Sequence[StepTime], draft_s: float) -> Floats:
    """Host seconds by rows, without what drafts take; between and beyond, as measured nearest."""
    fastest = {
        rows: min(
            max(step.host_s - draft_s * rows * step.draft_length, 0.0)
            for step in measured
            if step.num_rows == rows
        )
        for rows in sorted({step.num_rows for step in measured})
    }
    known_s = np.interp(np.log2(ROWS), np.log2(list(fastest)), list(fastest.values()))
    return np.asarray(known_s, dtype=np.float64)


def _draft_steps(measured: Sequence[StepTime], plain_s_R: Floats) -> tuple[Floats, Floats]:
    """Seconds of the start of drafting, and of a draft step.

    How they part one draft's time is told by longer drafts; where there are none, it is as for other numbers of
    rows.
    """
    once_s_R, steps_s_R = np.full(len(ROWS), np.inf), np.full(len(ROWS), np.nan)
    for step in measured:
        if step.draft_length == 1:
            row = ROWS.index(step.num_rows)
            once_s_R[row] = min(once_s_R[row], max(step.draft_s, LEAST_S))
    for step in measured:
        if step.draft_length > 1:
            row = ROWS.index(step.num_rows)
            more_s = (step.draft_s - once_s_R[row]) / (step.draft_length - 1)
            steps_s_R[row] = np.fmin(steps_s_R[row], max(more_s, 0.0))
    once_s_R = np.minimum(_in_proportion(once_s_R / plain_s_R), 1.0) * plain_s_R
    if np.isnan(steps_s_R).all():
        return np.zeros(len(ROWS)), once_s_R
    step_s_R = np.clip(_in_proportion(steps_s_R / once_s_R), _LEAST_PART, _MOST_PART) * once_s_R
    return once_s_R - step_s_R, step_s_R


def _layers_of_plain(step_s_R: Floats, exit_layer: int, plain_s_R: Floats, num_layers: int) -> Floats:
    """Seconds of a layer of a draft step, if a plain step is one that leaves after the last layer."""
    layer_s_R = np.minimum((plain_s_R - step_s_R) / (num_layers - exit_layer), step_s_R / exit_layer)
    return np.maximum(layer_s_R, LEAST_S)


def _layers(deep: Sequence[StepTime], early: Mapping[tuple[int, int], StepTime], step_s_R: Floats) -> Floats:
    """Seconds of a layer of a draft step, from the longest drafts that left later and the same ones that left
    early: their starts are alike. For other numbers of rows in proportion.
    """
    layer_s_R = np.full(len(ROWS), np.nan)
    for late in sorted(deep, key=lambda step: step.draft_length):
        same, row = early[late.num_rows, late.draft_length], ROWS.index(late.num_rows)
        layer_s = (late.draft_s - same.draft_s) / (late.draft_length * (late.exit_layer - same.exit_layer))
        layer_s_R[row] = np.clip(layer_s, LEAST_S, STEEPEST * step_s_R[row] / same.exit_layer)
    return _in_proportion(layer_s_R / step_s_R) * step_s_R


def _share_saved(deep: Sequence[StepTime], table_RW: Floats, saved_s_RW: Floats, exit_layer: int) -> Floats:
    """How much of what layers should save a pass they do, from passes whose drafts left later."""
    share_R = np.full(len(ROWS), np.nan)
    for step in deep:
        cell = ROWS.index(step.num_rows), WIDTHS.index(1 + step.draft_length)
        foretold_s = saved_s_RW[cell] * (step.exit_layer - exit_layer)
        share = (table_RW[cell] - step.verify_s) / max(foretold_s, LEAST_S)
        share_R[cell[0]] = np.fmax(share_R[cell[0]], np.clip(share, 0.0, 1.0))
    return _in_proportion(share_R) if deep else np.ones(len(ROWS))


def _in_proportion(known_R: Floats) -> Floats:
    """Numbers that are known for some rows, and for others from those."""
    is_known_R = np.isfinite(known_R)
    whole_R: Floats = np.interp(PLACES, np.flatnonzero(is_known_R), known_R[is_known_R])
    return whole_R


def _saved(
    table_RW: Floats, head_s_R: Floats, layer_s_R: Floats, measured_at: int, num_layers: int
) -> Floats:
    """What each layer before the exit saves a pass: all positions but one. Plain steps save nothing."""
    head_s_RW = np.interp(place_of_each(np.outer(ROWS, WIDTHS)), PLACES, head_s_R)
    alone_s_RW = layer_s_R[:, None]
    late_s_RW = (table_RW - measured_at * alone_s_RW - head_s_RW) / (num_layers - measured_at)
    saved_s_RW: Floats = np.maximum(late_s_RW - alone_s_RW, 0.0)
    saved_s_RW[:, 0] = 0.0
    return saved_s_RW
