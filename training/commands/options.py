"""Flags that `train` and `heal` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe's YAML file, or the name of a bundled recipe.")
]
Out = Annotated[
    Path | None, typer.Option(help="Folder of the run: state, log and checkpoint. [default: runs/NAME]")
]
Steps = Annotated[int | None, typer.Option(min=1, help="Steps in all, instead of the recipe's.")]
Until = Annotated[
    int | None, typer.Option(min=1, help="Stop after this step; the same command goes on from there.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.")]
SaveEvery = Annotated[int, typer.Option(min=1, help="Steps between two states on disk.")]
