"""`layerskip bench`: how fast a checkpoint decodes here, with every kind of assistant or in a short comparison.

Knows flags and the order of work; what measures is imported by the function itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from config.errors import SettingsError

if TYPE_CHECKING:
    from benchmarks.variants import TableRequest

_SHORT: Final = [
    "--quick",
    "--batch",
    "1",
    "8",
    "--temperatures",
    "0",
    "--new-tokens",
    "64",
    "--draft-lengths",
    "3",
    "5",
]


def bench(
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint folder or hub id. [default: the bundled one]", show_default=False),
    ] = None,
    table: Annotated[
        bool, typer.Option("--table", help="Print the table of assistants, beside published figures.")
    ] = False,
    draft_model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of a separate draft model with the same tokenizer, for one more row.",
            show_default=False,
        ),
    ] = None,
    exit_layers: Annotated[
        str | None,
        typer.Option(metavar="E,E,…", help="Rows of early exit. [default: by depth]", show_default=False),
    ] = None,
    draft_length: Annotated[int, typer.Option(min=1, max=16, help="Of all assistants but auto.")] = 4,
    tokens: Annotated[int, typer.Option(min=16, max=256, help="Tokens decoded for every prompt.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which all take turns.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write the line of JSON there.", show_default=False),
    ] = None,
) -> None:
    """Time a checkpoint against plain decoding of the same engine and, without --table, against transformers.

    Without --table it is a short run on a CPU, of two or three minutes; `python -m benchmarks.decode` is the whole
    one. Both end with one line of JSON.
    """
    from config.settings import BUNDLED_CHECKPOINT

    chosen = model or str(BUNDLED_CHECKPOINT)
    if not table:
        from benchmarks.decode import main
        from benchmarks.variants import usual_exit_layers

        chosen_layers = usual_exit_layers(chosen) if exit_layers is None else _numbers(exit_layers)
        layers = ["--exit-layers", *map(str, chosen_layers)]
        given = ["--draft-model", draft_model] if draft_model else []
        file = ["--json", str(out)] if out else []
        number_format = [] if dtype == "auto" else ["--dtype", dtype]
        main(["--model", chosen, "--threads", str(threads), *_SHORT, *layers, *given, *number_format, *file])
        return

    from benchmarks.variants import TableRequest

    request = TableRequest(
        model=chosen,
        draft_model=draft_model,
        exit_layers=() if exit_layers is None else _numbers(exit_layers),
        draft_length=draft_length,
        tokens=tokens,
        rounds=rounds,
        threads=threads,
        device=device,
        dtype=dtype,
    )
    line = _print_table(request)
    if out is not None:
        out.write_text(line + "\n", encoding="utf-8")
    typer.echo(line)


def _print_table(request: TableRequest) -> str:
    """Measure and print; returns the line of JSON."""
    from tqdm import tqdm

    from benchmarks.report import hardware
    from benchmarks.sweep_inputs import read_prompts
    from benchmarks.variants import TASKS, Witness, prepare
    from benchmarks.variants_table import PUBLISHED_UNDER, Subject, as_text

    prepared = prepare(request, read_prompts(TASKS))
    witness = Witness()
    total = (len(prepared.tasks) + 1) * len(prepared.variants)
    rows = list(tqdm(prepared.measure(witness), total=total, unit="row", mininterval=1, dynamic_ncols=True))
    machine = hardware()
    dtype = prepared.variants[0].engine.ready.dtype
    folder = Path(request.model)
    subject = Subject(
        model=folder.name if folder.is_dir() else request.model,
        num_parameters=prepared.costs.num_parameters,
        circumstances=f"{machine['cpu']}, {machine['threads']} threads, {dtype}, greedy, batch 1",
    )
    typer.echo(as_text(rows, subject))
    typer.echo(f"\n{witness.num_tokens} tokens compared, {witness.num_different} texts different\n")
    document = {
        "benchmark": "table",
        "hardware": machine,
        "model": subject.model,
        "parameters": subject.num_parameters,
        "dtype": dtype,
        "settings": {
            "draft_length": request.draft_length,
            "tokens": request.tokens,
            "rounds": request.rounds,
        },
        "tokens_compared": witness.num_tokens,
        "texts_different": witness.num_different,
        "rows": [row.as_json() for row in rows],
        "published_under": PUBLISHED_UNDER,
    }
    return json.dumps(document, ensure_ascii=False)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise SettingsError(
            f"exit-layers {text!r}: pass whole numbers with commas between, like 2,4"
        ) from error
