"""Where what can be made again is kept between starts.

Knows the operating system's custom; knows nothing of what is kept.
"""

from __future__ import annotations

import os
from pathlib import Path

from config.errors import SettingsError


def cache_folder() -> Path:
    """A folder of our own among the user's caches; it need not exist. Raises SettingsError."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "layerskip"
    try:
        return Path.home() / ".cache" / "layerskip"
    except RuntimeError as error:
        # A user id of a container that no list of users has.
        raise SettingsError("this user has no home folder for caches; set XDG_CACHE_HOME") from error
