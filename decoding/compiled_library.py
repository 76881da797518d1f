"""Builds the code that `--compile-layers` runs, for the CPU it runs on.

Knows sources, compilers and a cache of what they made; knows nothing of what the code computes.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from config.errors import SettingsError

_SOURCES: Final = tuple(
    Path(__file__).with_name(f"compiled_{name}")
    for name in ("layers.cpp", "choice.cpp", "drafts.cpp", "model.h", "vectors.h")
)
_COMPILERS: Final = ("g++", "clang++", "c++")
_FLAGS: Final = ("-O3", "-march=native", "-ffp-contract=fast", "-std=c++17", "-shared", "-fPIC")


def build(cache_folder: Path) -> ctypes.CDLL:
    """The compiled code for this CPU, from the cache if it is there. Raises SettingsError."""
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise SettingsError(f"compile_layers: no C++ compiler ({', '.join(_COMPILERS)}) was found")
    told = "\n".join(
        (
            compiler,
            _version(compiler),
            *_FLAGS,
            _cpu(),
            *(each.read_text(encoding="utf-8") for each in _SOURCES),
        )
    )
    key = hashlib.sha256(told.encode())
    path = cache_folder / "compiled" / f"layers-{key.hexdigest()[:16]}.so"
    if not path.is_file():
        _compile(compiler, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        # A folder that is mounted noexec, say.
        raise SettingsError(f"compile_layers: {path} cannot be loaded: {error}") from error


def _compile(compiler: str, path: Path) -> None:
    """In place at once, so that two servers that start together do not see half of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            units = [str(source) for source in _SOURCES if source.suffix == ".cpp"]
            command = [compiler, *_FLAGS, *units, "-o", str(made)]
            # The compiler's name was looked up, and nothing of a request is in it.
            subprocess.run(command, check=True, capture_output=True, text=True)
            made.replace(path)
    except subprocess.CalledProcessError as error:
        said = next(iter(error.stderr.splitlines()), "nothing")
        raise SettingsError(f"compile_layers: {compiler} failed and said: {said}") from error
    except OSError as error:
        raise SettingsError(f"compile_layers: {path.parent} cannot be written: {error.strerror}") from error


def _version(compiler: str) -> str:
    """What it says it is; nothing if it says nothing."""
    return subprocess.run([compiler, "--version"], check=False, capture_output=True, text=True).stdout


def _cpu() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
