"""Processes that end with the one that started them, however suddenly that dies.

Knows signals; knows nothing of what processes do.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
# At this signal a process writes the stack of every thread to standard error.
TELL_WHERE: Final = signal.SIGUSR1


def end_with_parent(parent_pid: int) -> None:
    """Ctrl-C is the API process's to handle; its death, however sudden, is this process's end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.register(TELL_WHERE)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(0)
