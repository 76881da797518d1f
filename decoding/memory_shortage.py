"""Says what would do where memory runs out while a model is put on its device.

Knows which errors mean that memory ran out; knows nothing of what needs it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

from config.errors import ShortOfMemory

_CPU_ALLOCATOR: Final = re.compile(r"not enough memory|can't allocate memory")
"""Of all that PyTorch raises as a RuntimeError, what its allocator for the CPU says."""

_ASKED_FOR: Final = re.compile(r"allocate (\d[\d.]* \w+)")


@contextmanager
def needing_memory(stage: str, *, remedy: str) -> Iterator[None]:
    """Around a stage of the start, such as "while …". Raises ShortOfMemory where memory runs out within it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not (_means_no_memory(error) or _means_no_memory(error.__cause__)):
            raise
        asked = _ASKED_FOR.search(str(error))
        amount = f" ({asked[1]} more were asked for)" if asked else ""
        raise ShortOfMemory(f"memory ran out {stage}{amount}: {remedy}") from error


def _means_no_memory(error: BaseException | None) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _CPU_ALLOCATOR.search(str(error)) is not None
