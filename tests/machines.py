"""Machines that no test runs on: how long their steps take, and tables of costs that say so exactly.

Knows nothing of the controller.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from decoding.step_costs import ROWS, WIDTHS, DraftSeconds, StepCosts

NUM_LAYERS = 16
Seconds = Callable[[int, int, int], float]


def flat(layers: int, rows: int, tokens: int) -> float:
    """A device bound by memory: tokens are free up to many."""
    return layers * (1.0 + 0.002 * tokens)


def linear(layers: int, rows: int, tokens: int) -> float:
    """A core bound by arithmetic: every token costs."""
    return layers * (0.2 + tokens)


def dear_steps(layers: int, rows: int, tokens: int) -> float:
    """Every call costs much before its first layer."""
    return 6.0 + layers * (1.0 + 0.05 * tokens)


def not_monotone(layers: int, rows: int, tokens: int) -> float:
    """Multiples of four tokens fit the kernel better than three or five."""
    return layers * (1.0 + (0.3 if tokens % 4 else 0.0) + 0.05 * tokens)


def linear_with_gain(layers: int, num_rows: int, tokens: int) -> float:
    return layers * (1.0 + 0.2 * tokens)


def costs(seconds: Seconds) -> StepCosts:
    """Exact at every exit layer for the shapes that are kept."""
    head = np.array([seconds(0, rows, rows) + 0.5 for rows in ROWS])
    layer = np.array([seconds(1, rows, rows) - seconds(0, rows, rows) for rows in ROWS])
    verify_s_LRW = np.array(
        [
            [[verify_s(seconds, layer, rows, width) for width in WIDTHS] for rows in ROWS]
            for layer in range(1, NUM_LAYERS)
        ]
    )
    # Each layer more saves as much.
    saved_s_RW = verify_s_LRW[0] - verify_s_LRW[1]
    assert np.allclose(np.diff(verify_s_LRW, axis=0), -saved_s_RW)
    drafting = DraftSeconds(np.zeros(len(ROWS)), head, layer)
    return StepCosts(drafting, verify_s_LRW[0] + saved_s_RW, saved_s_RW, exit_layer=4.0)


def verify_s(seconds: Seconds, exit_layer: int, rows: int, width: int) -> float:
    if width == 1:
        return seconds(NUM_LAYERS, rows, rows) + 0.5
    alone = seconds(exit_layer, rows, rows)
    return alone + seconds(NUM_LAYERS - exit_layer, rows, rows * width) + 0.5
