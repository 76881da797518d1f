"""Which device a model runs on, and in which number format.

Knows what was asked for and what torch finds; knows nothing of models.
"""

from __future__ import annotations

import torch

from config.errors import SettingsError


def pick_device(wanted: str) -> torch.device:
    """The device asked for; "auto" takes CUDA where there is one. Raises SettingsError."""
    has_cuda = torch.cuda.is_available()
    if wanted == "auto":
        return torch.device("cuda" if has_cuda else "cpu")
    if wanted.startswith("cuda") and not has_cuda:
        raise SettingsError(f"device {wanted!r}: torch finds no CUDA device; pass --device cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(
            f"device {wanted!r}: torch finds {torch.cuda.device_count()} CUDA devices, from cuda:0 on"
        )
    return device


def pick_dtype(wanted: str, stored: str, device: torch.device) -> torch.dtype:
    """The dtype asked for; "auto" is the checkpoint's own on CUDA and float32 on a CPU."""
    name = wanted if wanted != "auto" else stored if device.type == "cuda" else "float32"
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
