"""`layerskip sweep`: which exit layer and draft length serve a checkpoint best, on which prompts.

Knows flags and the order of work; what measures, writes and draws is imported by the function itself.
"""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from config.errors import SettingsError

_INTERRUPTED = 130


def sweep(
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint folder or hub id. [default: the bundled one]", show_default=False),
    ] = None,
    twin: Annotated[
        str | None,
        typer.Option(
            help="A second checkpoint of as many layers, such as the same one trained without early exits: "
            "swept in turns with the first and drawn against it.",
            show_default=False,
        ),
    ] = None,
    exit_layers: Annotated[
        str | None,
        typer.Option(
            metavar="E,E,…", help="Exit layers. [default: the first half of the layers]", show_default=False
        ),
    ] = None,
    draft_lengths: Annotated[str, typer.Option(metavar="γ,γ,…", help="Draft lengths.")] = "1,2,3,4,6",
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help='Lines {"domain": …, "prompt": …}. [default: Python code in five domains]',
            show_default=False,
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=8, help="Tokens decoded for every prompt.")] = 96,
    temperature: Annotated[float, typer.Option(min=0, help="How tokens are chosen; 0 is greedy.")] = 0.0,
    repeats: Annotated[
        int, typer.Option(min=1, help="Rounds over everything; from two on they tell noise from effect.")
    ] = 3,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads. [default: all cores but one]", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of sweep.csv, sweep.json and the plots.")
    ] = Path("sweep"),
    write_profile: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Also write the best setting as the profile that `layerskip serve` uses for checkpoints of "
            "this name.",
            show_default=False,
        ),
    ] = None,
    profile_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where the profile goes. [default: the package's own profiles]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Time every exit layer and draft length on prompts of several domains, against plain decoding of the same
    engine measured around them. Writes tables, plots and, if asked, a profile; Ctrl-C keeps what was measured.
    """
    if find_spec("matplotlib") is None:
        raise SettingsError("sweep: needs the package matplotlib; install layerskip-server[bench]")
    from benchmarks.sweep_inputs import BUNDLED_PROMPTS, Request, Work
    from benchmarks.sweep_report import write_profile as write
    from benchmarks.sweep_session import circumstances, prepare, run_with_progress, save
    from benchmarks.timing import Sampled
    from config.settings import BUNDLED_CHECKPOINT

    models = (model or str(BUNDLED_CHECKPOINT), *([twin] if twin else []))
    request = Request(
        models=models,
        exit_layers=_numbers("exit-layers", exit_layers) if exit_layers else None,
        draft_lengths=_numbers("draft-lengths", draft_lengths),
        prompts=prompts or BUNDLED_PROMPTS,
        work=Work(new_tokens, Sampled(temperature, top_p=1.0), repeats),
        threads=threads,
        device=device,
    )
    prepared = prepare(request, out)
    is_complete = run_with_progress(prepared)
    facts = circumstances(
        prepared, request, date=datetime.now(UTC).date().isoformat(), is_complete=is_complete
    )
    typer.echo(save(prepared, facts, out))
    if not is_complete:
        typer.echo("Interrupted: figures are partial and no profile is written.", err=True)
        raise typer.Exit(_INTERRUPTED)
    if write_profile:
        folder = {} if profile_dir is None else {"folder": profile_dir}
        typer.echo(f"wrote {write(write_profile, prepared.tables()[0], facts, **folder)}")


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise SettingsError(f"{flag} {text!r}: pass whole numbers with commas between, like 1,2,4") from error
