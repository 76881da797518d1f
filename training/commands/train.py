"""`layerskip train`: a LayerSkip checkpoint from scratch."""

from __future__ import annotations

import typer

from training.commands.options import Device, Out, RecipeName, SaveEvery, Steps, Threads, Until


def train(
    recipe: RecipeName,
    out: Out = None,
    steps: Steps = None,
    until: Until = None,
    device: Device = "auto",
    threads: Threads = None,
    save_every: SaveEvery = 50,
) -> None:
    """Train a checkpoint with layer dropout and early-exit loss. Killed at any time, it goes on when run again."""
    from training.recipe import Recipe

    # A recipe that cannot be followed is refused before torch is imported, which takes seconds.
    chosen = Recipe.find(recipe, num_steps=steps)
    from training.runs import RunOptions, usual_folder
    from training.runs import train as run

    options = RunOptions(out or usual_folder(chosen), device, threads, until, save_every)
    typer.echo(run(chosen, options))
