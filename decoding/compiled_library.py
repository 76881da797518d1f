"""Builds the code that `--compile-layers` runs, for the CPU it runs on.

Knows sources, compilers and a cache of what they made; knows nothing of what the code computes.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from config.errors import SettingsError

_SOURCES: Final = tuple(
    Path(__file__).with_name(f"compiled_{name}")
    for name in (
        *("layers.cpp", "choice.cpp", "drafts.cpp", "draft_head.cpp", "step.cpp"),
        *(
            "attention.h",
            "attention_pairs.h",
            "attention_parts.h",
            "model.h",
            "multiply.h",
            "step.h",
            "vectors.h",
        ),
    )
)
_COMPILERS: Final = ("g++", "clang++", "c++")
_FLAGS: Final = ("-O3", "-march=native", "-ffp-contract=fast", "-std=c++17", "-shared", "-fPIC")

_PATIENCE_S: Final = 300.0
"""A compiler takes a second or two; one that waits for something else must not hold the start for ever."""

_CPU_LINES: Final = ("flags", "Features", "model name", "CPU implementer", "CPU variant", "CPU part")


def build(cache_folder: Path) -> ctypes.CDLL:
    """The compiled code for this CPU, from the cache if it is there. Raises SettingsError."""
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise SettingsError(f"compile_layers: no C++ compiler ({', '.join(_COMPILERS)}) was found")
    try:
        folder = _own(cache_folder / "compiled")
        path = folder / f"layers-{_key(compiler)}.so"
        return _kept(path) or _compiled(compiler, path)
    except subprocess.CalledProcessError as error:
        said = next(iter(error.stderr.splitlines()), "nothing")
        raise SettingsError(f"compile_layers: {compiler} failed and said: {said}") from error
    except subprocess.TimeoutExpired as error:
        raise SettingsError(f"compile_layers: {compiler} did not end in {_PATIENCE_S:g} s") from error
    except OSError as error:
        # A folder that is not to be written or mounted noexec, a compiler for another machine.
        raise SettingsError(f"compile_layers with {compiler} and {cache_folder}: {error}") from error


def _own(folder: Path) -> Path:
    """The folder, made if need be. Raises SettingsError if it is anybody's: what lies in it is run."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid not in (os.geteuid(), 0) or status.st_mode & stat.S_IWOTH:
        raise SettingsError(f"compile_layers: {folder} is somebody else's or anybody's, not yours alone")
    return folder


def _kept(path: Path) -> ctypes.CDLL | None:
    """What was compiled before; None if nothing was, or a start that was cut short left half of it."""
    try:
        return ctypes.CDLL(str(path)) if path.is_file() else None
    except OSError:
        path.unlink(missing_ok=True)
        return None


def _compiled(compiler: str, path: Path) -> ctypes.CDLL:
    """In place at once, so that two servers that start together do not see half of it."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        units = [str(source) for source in _SOURCES if source.suffix == ".cpp"]
        _run(compiler, *_FLAGS, *units, "-o", str(made))
        made.replace(path)
    return ctypes.CDLL(str(path))


def _key(compiler: str) -> str:
    """Of all that the code depends on."""
    sources = (each.read_text(encoding="utf-8") for each in _SOURCES)
    told = "\n".join((compiler, _run(compiler, "--version"), *_FLAGS, _cpu(), *sources))
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _run(*command: str) -> str:
    """What a compiler says. Its name was looked up, and nothing of a request is in the command."""
    done = subprocess.run(
        command, check=True, capture_output=True, encoding="utf-8", errors="replace", timeout=_PATIENCE_S
    )
    return done.stdout


def _cpu() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine() + platform.processor() + platform.node()
    return "".join(sorted({line for line in lines if line.startswith(_CPU_LINES)}))
