"""Notices a worker that says nothing for too long.

Knows times; knows neither processes nor what a worker says.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

_LOOKS: Final = 10
"""So often within the longest silence it is looked whether that is over."""


class HangWatch:
    """Calls `on_hang` once the silence has lasted `longest_s`; 0 means that it may last for ever.

    Runs on the event loop, from `start` to `stop` or to that call.
    """

    def __init__(
        self, longest_s: float, *, silent_s: Callable[[], float], on_hang: Callable[[], None]
    ) -> None:
        self._longest_s = longest_s
        self._silent_s = silent_s
        self._on_hang = on_hang
        self._next_look: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Watch from now on."""
        self.stop()
        if self._longest_s:
            self._look_again()

    def stop(self) -> None:
        """Watch no more."""
        if self._next_look is not None:
            self._next_look.cancel()
            self._next_look = None

    def _look_again(self) -> None:
        loop, pause_s = asyncio.get_running_loop(), self._longest_s / _LOOKS
        self._next_look = loop.call_later(pause_s, self._look, loop.time() + 2 * pause_s)

    def _look(self, at_latest_s: float) -> None:
        # What comes late comes after this process stood still itself: what was said meanwhile is yet to be heard.
        is_late = asyncio.get_running_loop().time() > at_latest_s
        if self._silent_s() < self._longest_s or is_late:
            self._look_again()
        else:
            self._next_look = None
            self._on_hang()
