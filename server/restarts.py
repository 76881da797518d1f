"""When a worker that died is started again, and when no more.

Knows deaths and times; knows nothing of what a worker is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

_FIRST_WAIT_S: Final = 0.1
_LONGEST_WAIT_S: Final = 10.0
_HEALTHY_S: Final = 60.0
MAX_FRUITLESS_DEATHS: Final = 5
"""So many in a row, with no sequence decoded to its end and no minute of health between them, are enough."""


class RestartPolicy:
    """Waits longer after every death. A minute of health makes good what was before it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._served_since_s: float | None = None
        self._num_deaths = 0
        self._num_fruitless = 0

    def served(self) -> None:
        """A worker serves from now on."""
        self._served_since_s = self._clock()

    def finished(self) -> None:
        """A sequence was decoded to its end: whatever kills the worker, it is not every request."""
        self._num_fruitless = 0

    def died(self) -> float | None:
        """How many seconds to wait before the next start; None to give up."""
        since_s, self._served_since_s = self._served_since_s, None
        if since_s is not None and self._clock() - since_s >= _HEALTHY_S:
            self._num_deaths = self._num_fruitless = 0
        wait_s = min(_FIRST_WAIT_S * 2.0 ** min(self._num_deaths, 20), _LONGEST_WAIT_S)
        self._num_deaths += 1
        self._num_fruitless += 1
        return None if self._num_fruitless >= MAX_FRUITLESS_DEATHS else wait_s
