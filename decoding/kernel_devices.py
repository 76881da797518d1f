"""Which devices Triton's kernels run on.

Knows devices and packages; knows no kernel.
"""

from __future__ import annotations

import shutil
import sysconfig
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

_OLDEST_CUDA: Final = (8, 0)
"""Devices before this one multiply no bfloat16."""


def hindrance(device: torch.device) -> str | None:
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


def takes_kernels(tensor: Tensor) -> bool:
    """Whether kernels work on this tensor. Float64 is left to torch whatever its device: it is the reference."""
    return _has_kernels(tensor.device) and tensor.dtype != torch.float64


@lru_cache(maxsize=16)
def _has_kernels(device: torch.device) -> bool:
    return device.type in ("cpu", "cuda") and hindrance(device) is None
