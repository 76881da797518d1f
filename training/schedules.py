"""The LayerSkip recipe as numbers: how often a layer is skipped, and how much each exit's loss weighs.

Knows layer indices, steps and formulas (arXiv 2404.16710, equations 1 to 6); knows no tensors.

Layers are counted from 0 to L − 1 here, as in the paper: what leaves layer l is exit layer E = l + 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Final

LN2: Final = math.log(2)


class OverTime(StrEnum):
    """How layer dropout grows over training: all at once (healing), or exponentially (from scratch)."""

    CONSTANT = "constant"
    EXPONENTIAL = "exponential"


class ExitScale(StrEnum):
    """How the loss of an exit depends on its layer: the paper's sum of depths, or alike for all."""

    DEPTH_SUM = "depth_sum"
    UNIFORM = "uniform"


class Curriculum(StrEnum):
    """Which exits have a loss at a step."""

    ALL = "all"
    ROTATIONAL = "rotational"
    GRADUAL = "gradual"


def dropout_depth(layer: int, num_layers: int) -> float:
    """D(l) = exp(l·ln 2 / (L − 1)) − 1: 0 at the first layer, 1 at the last (equation 2)."""
    return math.expm1(layer * LN2 / (num_layers - 1)) if num_layers > 1 else 0.0


def dropout_time(step: int, num_steps: int, over_time: OverTime) -> float:
    """S(t): 1 throughout, or exp(t·ln 2 / (T − 1)) − 1 from the first step's 0 to the last one's 1."""
    if over_time is OverTime.CONSTANT:
        return 1.0
    return math.expm1(step * LN2 / (num_steps - 1)) if num_steps > 1 else 1.0


def exit_scale(layer: int, num_layers: int, e_scale: float, scale: ExitScale = ExitScale.DEPTH_SUM) -> float:
    """e(l), before normalisation (equation 5).

    The paper's: e_scale · Σ_{i ≤ l} i below the last layer, which itself has L − 1 + e_scale · Σ_{i ≤ L−2} i.
    Uniform: e_scale below the last layer, which has 1; it gives shallow exits a weight that early exit feels.
    """
    is_last = layer == num_layers - 1
    if scale is ExitScale.UNIFORM:
        return 1.0 if is_last else e_scale
    if is_last:
        return num_layers - 1 + e_scale * _sum_to(num_layers - 2) if num_layers > 1 else 1.0
    return e_scale * _sum_to(layer)


def rotational(layer: int, step: int, rotation: int) -> bool:
    """C_rot,R(t, l): every R-th layer, shifted by one each step."""
    return (layer - step) % rotation == 0


def gradual(layer: int, step: int, *, num_layers: int, num_steps: int) -> bool:
    """C_grad(t, l): from the last layer down, one more every T / 2L steps."""
    return step * 2 * num_layers >= (num_layers - 1 - layer) * num_steps


def exit_weights(
    num_layers: int, scale_of: Callable[[int], float], is_on: Callable[[int], bool]
) -> Mapping[int, float]:
    """ẽ(t, l) = C(t, l) e(l) / Σ_i C(t, i) e(i) of the layers where it is not 0; the last layer is always on.

    Equation 6; the weights add up to 1.
    """
    last = num_layers - 1
    scales = {layer: scale_of(layer) for layer in range(num_layers) if layer == last or is_on(layer)}
    whole = sum(scales.values())
    return {layer: scale / whole for layer, scale in scales.items() if scale}


def learning_rate_factor(step: int, num_steps: int, *, num_warmup: int, decay_share: float) -> float:
    """Warm-up, plateau, then a straight fall to zero over the last `decay_share` of all steps.

    A plateau lets a run be prolonged from where it stands, which a cosine does not.
    """
    num_decay = max(1, round(num_steps * decay_share))
    rising = (step + 1) / (num_warmup + 1)
    falling = (num_steps - step) / num_decay
    return max(0.0, min(1.0, rising, falling))


def _sum_to(layer: int) -> int:
    return layer * (layer + 1) // 2
