"""Chooses the attention that serves a device.

Knows devices and packages; knows nothing of how attention is computed.
"""

from __future__ import annotations

import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from config.errors import SettingsError
from config.setting_types import AttentionKind
from decoding.attention import Attention, AttentionShape, GatherAttention
from decoding.kv_cache import KVCache

_OLDEST_CUDA: Final = (8, 0)
"""Devices before this one multiply no bfloat16."""


def make_attention(
    kind: AttentionKind, *, shape: AttentionShape, cache: KVCache, rotations_TF: Tensor, block_size: int
) -> Attention:
    """The attention of this kind over the cache, ready to be used. Raises SettingsError.

    Float64 is gathered whatever is asked for: it is the reference.
    """
    device, dtype = rotations_TF.device, cache.layer(0).dtype
    wants_triton = kind is AttentionKind.TRITON or (kind is AttentionKind.AUTO and device.type == "cuda")
    hindrance = _hindrance(device) if wants_triton else None
    if kind is AttentionKind.TRITON and hindrance:
        raise SettingsError(f"attention triton: {hindrance}; pass --attention auto")
    if not wants_triton or hindrance or dtype == torch.float64:
        return GatherAttention(shape=shape, cache=cache, rotations_TF=rotations_TF, dtype=dtype)
    from decoding.attention_triton import TritonAttention

    attention = TritonAttention(shape=shape, cache=cache, rotations_TF=rotations_TF, block_size=block_size)
    attention.warm_up()
    return attention


def _hindrance(device: torch.device) -> str | None:
    """Why Triton's kernels do not run on this device."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    import triton

    if triton.knobs.runtime.interpret:
        return None
    if device.type != "cuda":
        return f"its kernels need a CUDA device, not {device}"
    if torch.cuda.get_device_capability(device) < _OLDEST_CUDA:
        return f"its kernels need compute capability 8.0, not that of {torch.cuda.get_device_name(device)}"
    if not any(map(shutil.which, ("gcc", "clang"))):
        return "it starts kernels by code that gcc or clang compiles, and neither is installed"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "it starts kernels by code that needs Python's C headers, which are not installed"
    return None
