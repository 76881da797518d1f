"""Where what can be made again is kept between starts.

Knows the operating system's custom; knows nothing of what is kept.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """A folder of our own among the user's caches; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layerskip"
