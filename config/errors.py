"""Faults of the operator that stop a start: each is one line that says what is wrong and what would do.

Knows nothing of how the line reaches the terminal.
"""

from __future__ import annotations


class StartupError(Exception):
    """The server cannot start, and the operator can mend it; the message is one line, shown as it is."""


class ShortOfMemory(StartupError):
    """Memory ran out during the start. Who follows another worker is tried again: that one may hold it still."""


class SettingsError(StartupError):
    """A setting is unknown, malformed or contradicts another; the message names key, value and remedy."""
