"""Carries a sweep through: checkpoints are loaded, measured under a progress bar, and the findings saved.

Knows the order of work and where files lie; knows no timing and no drawing.
"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import ValidationError
from tqdm import tqdm

from benchmarks.report import hardware
from benchmarks.sweep import Sweep, load_subject
from benchmarks.sweep_inputs import Axes, Request, read_prompts
from benchmarks.sweep_plots import draw_curves, draw_grids
from benchmarks.sweep_report import Circumstances, in_words, write_csv, write_json
from benchmarks.sweep_table import ALL_DOMAINS
from config.errors import SettingsError
from config.settings import EngineSettings
from decoding.checkpoint import open_checkpoint
from decoding.devices import pick_device


def prepare(request: Request, out: Path) -> Sweep:
    """Load what is to be measured, and make the folder of the findings. Raises StartupError."""
    request.work.check(request.draft_lengths)
    _check_device(request.device)
    prompts = read_prompts(request.prompts)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"out {out}: cannot be made ({error.strerror}); pass another folder") from error
    names = _names(request.models)
    # What can be refused is refused before the weights are read.
    axes = Axes.chosen(request.exit_layers, request.draft_lengths, num_layers=_num_layers(request.models))
    subjects = tuple(
        load_subject(model, prompts, request, name=name)
        for model, name in zip(request.models, names, strict=True)
    )
    return Sweep(subjects, axes, request.work)


def run_with_progress(sweep: Sweep) -> bool:
    """Measure with a bar and the time left on stderr; False if Ctrl-C cut it short."""
    with tqdm(total=sweep.num_trials, unit="run", mininterval=1, dynamic_ncols=True) as bar:

        def advance(trial: str) -> None:
            bar.set_postfix_str(trial, refresh=False)
            bar.update()

        try:
            sweep.run(advance)
        except KeyboardInterrupt:
            return False
    return True


def circumstances(sweep: Sweep, request: Request, *, date: str, is_complete: bool) -> Circumstances:
    """What was asked for and the machine, without a path of it."""
    ready = sweep.subjects[0].engine.ready
    machine = hardware()
    is_cuda = ready.device.startswith("cuda")
    machine["device"] = torch.cuda.get_device_name(ready.device) if is_cuda else machine["cpu"]
    return Circumstances(
        date=date,
        hardware=machine,
        settings={
            "checkpoints": [subject.name for subject in sweep.subjects],
            "exit_layers": list(sweep.axes.exit_layers),
            "draft_lengths": list(sweep.axes.draft_lengths),
            "prompts": request.prompts.name,
            "domains": {domain: len(prompts) for domain, prompts in sweep.subjects[0].prompts.items()},
            "new_tokens": sweep.work.new_tokens,
            "temperature": sweep.work.sampled.temperature,
            "repeats": sweep.work.repeats,
            "dtype": ready.dtype,
            "batch": 1,
        },
        is_complete=is_complete,
    )


def save(sweep: Sweep, found_under: Circumstances, out: Path) -> str:
    """Write tables and plots of all that was measured into `out`, and return the findings in words."""
    tables = sweep.tables()
    write_csv(tables, out / "sweep.csv")
    write_json(tables, found_under, out / "sweep.json")
    if any(table.rows for table in tables):
        draw_curves(tables, out / "curves.png")
    if any(table.of(ALL_DOMAINS) for table in tables):
        draw_grids(tables, out / "grid.png")
    return "\n\n".join(map(in_words, tables))


def _check_device(device: str) -> None:
    try:
        EngineSettings(device=device)
    except ValidationError as error:
        raise SettingsError(f"device {device!r}: pass auto, cpu, cuda or cuda:N") from error
    pick_device(device)


def _names(models: tuple[str, ...]) -> list[str]:
    """Folders by their last name, hub ids as they are; a second checkpoint of the same name says so."""
    names = [Path(model).resolve().name if Path(model).is_dir() else model for model in models]
    return [name if name not in names[:index] else f"{name} (twin)" for index, name in enumerate(names)]


def _num_layers(models: tuple[str, ...]) -> int:
    """The depth that all checkpoints share. Raises StartupError."""
    depths = [open_checkpoint(model, revision=None).shape.num_layers for model in models]
    if depths[0] != depths[-1]:
        raise SettingsError(
            f"twin {models[-1]}: it has {depths[-1]} layers, the first checkpoint {depths[0]}; pass one of as many"
        )
    return depths[0]
