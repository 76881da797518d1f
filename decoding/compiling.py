"""Decides whether layers run as code that is compiled for the CPU, and has it compiled.

Knows settings and what the compiled code can do; knows nothing of how it is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from config.caches import cache_folder
from config.errors import SettingsError
from config.setting_types import AttentionKind
from config.settings import EngineSettings
from decoding.checkpoint import ModelShape
from decoding.compiled import CACHED, HEAD_WIDTHS
from decoding.compiled_library import build
from decoding.panels import LANES
from decoding.weights import Placement, Progress

_SMALL_BYTES: Final = 64 << 20
"""Weights that stay in a CPU's caches: several threads would wait for one another more than for memory."""


def compiles_layers(
    settings: EngineSettings,
    shapes: Sequence[ModelShape],
    placement: Placement,
    progress: Progress,
    *,
    num_bytes: int,
    offloads: bool,
) -> bool:
    """Whether models of these shapes and `num_bytes` of weights run compiled; then the code is there.

    Raises SettingsError where that is asked for and cannot be.
    """
    if settings.compile_layers is False:
        return False
    if settings.compile_layers == "auto":
        is_faster = torch.get_num_threads() == 1 or num_bytes <= _SMALL_BYTES
        is_plain = settings.attention is AttentionKind.AUTO and placement.shard.size == 1
        if not is_faster or not is_plain or _hindrance(shapes, placement, offloads=offloads):
            return False
    elif hindrance := _hindrance(shapes, placement, offloads=offloads):
        raise SettingsError(hindrance)
    progress("compiling layers", 0.0)
    try:
        build(cache_folder())
    except SettingsError as error:
        if settings.compile_layers is True:
            raise
        progress(f"layers stay uncompiled: {error}", 1.0)
        return False
    return True


def _hindrance(shapes: Sequence[ModelShape], placement: Placement, *, offloads: bool) -> str | None:
    """What the compiled code does not do of this, in one line."""
    device, dtype = placement.device, placement.dtype
    if offloads:
        return "compile_layers: weights that are offloaded are not compiled for"
    if device.type != "cpu" or dtype not in CACHED:
        name = str(dtype).removeprefix("torch.")
        return f"compile_layers needs a CPU and dtype float32 or bfloat16, not {device} and {name}"
    for shape in shapes:
        has_lanes = shape.model_width % LANES == shape.mlp_width % LANES == 0
        if shape.head_width not in HEAD_WIDTHS or not has_lanes:
            return "compile_layers: this checkpoint's widths are not multiples of 16"
    return None
