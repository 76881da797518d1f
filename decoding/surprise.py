"""Whether more drafts were kept than chance alone explains.

Knows what was expected and what came; knows nothing of exit layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

_SURPRISING: Final = 1.0
"""So many more than expected, in units of the square root of their number: what chance alone seldom gives."""


class Surprise:
    """Adds up since it was made new."""

    def __init__(self) -> None:
        self._num_more = 0.0
        self._num_reached = 0

    def add(self, expected: Sequence[float], fates: Sequence[tuple[int, int]]) -> None:
        """Count drafted and kept tokens of rows; `expected[n]` of n drafts that are reached should be kept."""
        for drafted, kept in fates:
            reached = min(kept + 1, drafted, len(expected) - 1)
            self._num_more += kept - expected[reached]
            self._num_reached += reached

    @property
    def is_large(self) -> bool:
        """Whether it is worth another look."""
        return self._num_more > _SURPRISING * math.sqrt(self._num_reached)
