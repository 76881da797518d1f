"""`layerskip heal`: teach an existing checkpoint's early layers to speak."""

from __future__ import annotations

from typing import Annotated

import typer

from training.commands.options import Device, Out, RecipeName, SaveEvery, Steps, Threads, Until


def heal(
    recipe: RecipeName,
    model: Annotated[str, typer.Option(help="Checkpoint folder or hub id of a Llama-family model.")],
    out: Out = None,
    steps: Steps = None,
    until: Until = None,
    device: Device = "auto",
    threads: Threads = None,
    save_every: SaveEvery = 50,
) -> None:
    """Go on training a checkpoint with layer dropout and early-exit loss, whole or by low-rank updates.

    Killed at any time, it goes on when run again. Writes agreement with the last layer before and after.
    """
    from training.recipe import Recipe

    # A recipe that cannot be followed is refused before torch is imported, which takes seconds.
    chosen = Recipe.find(recipe, num_steps=steps)
    from training.healing import heal as run
    from training.runs import RunOptions, usual_folder

    options = RunOptions(out or usual_folder(chosen), device, threads, until, save_every)
    typer.echo(run(chosen, model, options))
