"""`layerskip inspect`: what every layer of a checkpoint would say along a prompt.

Knows flags and the order of work; what is computed and shown is imported by the function itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from config.errors import StartupError

if TYPE_CHECKING:
    from config.settings import EngineSettings
    from training.lens import Inspection

_TERMINAL_POSITIONS: Final = 24
_PAGE_POSITIONS: Final = 256


class PageError(StartupError):
    """The page cannot be written."""


def inspect(
    prompt: Annotated[str, typer.Argument(help="Text to read along.", show_default=False)],
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "--compare",
            "-m",
            help="Checkpoint folder or hub id; give it several times to see checkpoints side by side. "
            "[default: the bundled one]",
            show_default=False,
        ),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Leave out the final norm on all rows but the last, the output.")
    ] = False,
    new_tokens: Annotated[
        int,
        typer.Option(min=0, help="Tokens that the engine first adds to the prompt, greedily."),
    ] = 16,
    last: Annotated[
        int | None,
        typer.Option(
            "--last",
            "--max-positions",
            min=1,
            help="Show this many last positions at most. [default: 24 in the terminal, 256 in the page]",
            show_default=False,
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Also write one self-contained HTML page to this file.", show_default=False),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Number format; auto is float32 on a CPU, else the checkpoint's. [default: auto]",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or cuda:N. [default: auto]", show_default=False)
    ] = None,
) -> None:
    """Show what every layer would say at every position of PROMPT and its continuation, and where tokens settle.

    Row 0 is the embedding, row l what the model would say if it left after l layers, the last row its output.
    LAYERSKIP_* variables choose what has no flag here, as for `serve`.
    """
    from rich.console import Console

    from training.lens_page import page
    from training.lens_table import print_inspections
    from training.observations import observe

    if html is not None and not html.parent.is_dir():
        raise PageError(f"{html}: there is no folder {html.parent}; pass a path in one that exists")
    inspections = [
        _inspect(settings, name, prompt, num_new_tokens=new_tokens, is_raw=raw)
        for settings, name in _chosen(model, {"dtype": dtype, "device": device})
    ]
    observations = observe(inspections)
    console = Console(highlight=False)
    print_inspections(console, inspections, observations, num_last=last or _TERMINAL_POSITIONS)
    if html is not None:
        _write(html, page(prompt, inspections, observations, num_last=last or _PAGE_POSITIONS))
        console.print(f"\nwrote {html}", markup=False, soft_wrap=True)


def _chosen(models: list[str] | None, flags: dict[str, str | None]) -> list[tuple[EngineSettings, str]]:
    """Settings and name of each checkpoint; names are paths where folders are called the same."""
    from config.settings import Settings

    given = {key: value for key, value in flags.items() if value is not None}
    wanted = [{"model": model} for model in models] if models else [{}]
    chosen = [Settings.load(given | model) for model in wanted]
    names = [settings.model_name for settings in chosen]
    return [
        (settings.engine, name if names.count(name) == 1 else settings.model)
        for settings, name in zip(chosen, names, strict=True)
    ]


def _inspect(
    settings: EngineSettings, name: str, prompt: str, *, num_new_tokens: int, is_raw: bool
) -> Inspection:
    """One checkpoint, let go of before the next is read. A cache for one sequence is enough."""
    from training.lens import Lens

    lens = Lens.load(settings.model_copy(update={"max_num_seqs": 1}))
    return lens.inspect(prompt, name=name, num_new_tokens=num_new_tokens, is_raw=is_raw)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise PageError(f"{path}: cannot be written ({error.strerror}); pass another path") from error
