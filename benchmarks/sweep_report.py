"""What a sweep found: in words, as CSV and JSON, and as a profile that `serve` takes its defaults from.

Knows rows and files; measures and draws nothing.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import yaml

from benchmarks.machine import aligned
from benchmarks.sweep_table import ALL_DOMAINS, Row, Shape, Table
from config.errors import SettingsError
from config.profiles import Profile

PROFILES: Final = Path(__file__).parent.parent / "config" / "profiles"
"""Where `serve` looks for profiles."""

_COLUMNS: Final = (
    "tokens_per_s",
    "plain_tokens_per_s",
    "speed_up",
    "predicted_speed_up",
    "acceptance_rate",
    "tokens_per_cycle",
    "draft_step_ms",
    "verify_ms",
    "plain_step_ms",
    "drafted",
    "kept",
    "tokens_compared",
    "tokens_different",
)


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What the figures mean nothing without. `date` is ISO; `is_complete` is False for a sweep cut short."""

    date: str
    hardware: Mapping[str, object]
    settings: Mapping[str, object]
    is_complete: bool


def write_csv(tables: Sequence[Table], path: Path) -> None:
    """One line for every checkpoint, domain, exit layer and draft length; means over all domains at the end."""
    head = ["checkpoint", "domain", "exit_layer", "draft_length", *_COLUMNS, "deviation", "repeats"]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(head)
        for table in tables:
            for row in (*table.rows, *table.of(ALL_DOMAINS)):
                place = [table.checkpoint, row.domain, row.exit_layer, row.draft_length]
                figures = [_rounded(getattr(row, column)) for column in _COLUMNS]
                writer.writerow([*place, *figures, _rounded(row.deviation), len(row.speed_ups)])


def write_json(tables: Sequence[Table], circumstances: Circumstances, path: Path) -> None:
    """Everything, with what was asked for and the machine."""
    document = {
        "benchmark": "sweep",
        **asdict(circumstances),
        "checkpoints": [_table_json(table) for table in tables],
    }
    path.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def in_words(table: Table) -> str:
    """The best setting of each domain, whether there is a hump, the overall best, and whether texts agree."""
    head = ["", "E", "γ", "speed-up", "predicted", "kept", "tokens/cycle", "tokens/s", "plain"]
    names = [*table.domains, ALL_DOMAINS]
    rows = [[name, *_cells(row)] for name in names if (row := table.best(name))]
    if not rows:
        return f"{table.checkpoint}: nothing was measured."
    lines = [f"{table.checkpoint}: the best setting of each domain", aligned(head, rows)]
    if overall := table.best(ALL_DOMAINS):
        lines += [_recommendation(overall), Shape.of(table.curve(ALL_DOMAINS)).in_words()]
    compared = sum(row.tokens_compared for row in table.rows)
    different = sum(row.tokens_different for row in table.rows)
    lines.append(f"Texts against plain decoding: {compared:,} tokens compared, {different:,} different.")
    return "\n".join(lines)


def write_profile(name: str, table: Table, circumstances: Circumstances, folder: Path = PROFILES) -> Path:
    """Write the overall best as the profile of the checkpoint `name`, with draft length 0 if plain is fastest, and
    what choosing begins with: acceptance by exit layer, where single drafts were measured.

    Replaces that checkpoint's own file; raises SettingsError where a file of another name speaks for it.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise SettingsError(f"write-profile {name!r}: pass the last part of a checkpoint's folder or hub id")
    best = table.best(ALL_DOMAINS)
    assert best is not None
    path = folder / f"{name}.yaml"
    _refuse_second(name, path)
    acceptances = {layer: round(rate, 3) for layer, rate in sorted(table.first_acceptances().items())}
    known = {"acceptance": acceptances[best.exit_layer]} if best.exit_layer in acceptances else {}
    profile = Profile(
        checkpoints=(name,),
        exit_layer=best.exit_layer,
        draft_length=best.draft_length if best.speed_up >= 1 else 0,
        acceptances=acceptances,
        **known,
        source=_source(best, circumstances),
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        document = profile.model_dump(mode="json") | {"acceptances": acceptances}
        text = yaml.safe_dump(document, sort_keys=False, width=1000, allow_unicode=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SettingsError(
            f"profile-dir {folder}: cannot be written ({error.strerror}); pass another"
        ) from error
    return path


def _refuse_second(name: str, own: Path) -> None:
    for path in own.parent.glob("*.yaml"):
        held = Profile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))).checkpoints
        if path != own and name.lower() in {checkpoint.lower() for checkpoint in held}:
            raise SettingsError(f"write-profile {name}: {path.name} already speaks for it; edit or remove it")


def _source(best: Row, circumstances: Circumstances) -> str:
    machine, asked = circumstances.hardware, circumstances.settings
    where = f"{machine['device']}, CPU threads: {machine['threads']}, {asked['dtype']}"
    how = f"temperature {asked['temperature']}, {asked['new_tokens']} new tokens, batch 1"
    found = f"{best.speed_up:.2f} times plain decoding"
    if best.speed_up < 1:
        found = f"nothing beats plain decoding, the best setting gives {found}"
    return f"layerskip sweep of {circumstances.date} on {where}: {found} ({how})"


def _recommendation(best: Row) -> str:
    setting = f"exit layer {best.exit_layer}, draft length {best.draft_length}"
    gain = f"{best.speed_up:.2f}x plain decoding"
    if best.speed_up < 1:
        return f"Nothing beats plain decoding: {setting} comes nearest with {gain}. Use draft length 0."
    return f"Overall best: {setting}, {gain} (predicted {best.predicted_speed_up:.2f}x)."


def _cells(row: Row) -> list[str]:
    return [
        str(row.exit_layer),
        str(row.draft_length),
        f"{row.speed_up:.2f}",
        f"{row.predicted_speed_up:.2f}",
        f"{row.acceptance_rate:.2f}",
        f"{row.tokens_per_cycle:.2f}",
        f"{row.tokens_per_s:.1f}",
        f"{row.plain_tokens_per_s:.1f}",
    ]


def _table_json(table: Table) -> dict[str, object]:
    names = [*table.domains, ALL_DOMAINS]
    best = {name: row for name in names if (row := table.best(name))}
    curve = table.curve(ALL_DOMAINS)
    return {
        "name": table.checkpoint,
        "num_layers": table.num_layers,
        "best": {name: _row_json(row) for name, row in best.items()},
        "shape": _shape_json(Shape.of(curve)) if curve else None,
        "means": [_row_json(row) for row in table.of(ALL_DOMAINS)],
        "rows": [_row_json(row) for row in table.rows],
    }


def _row_json(row: Row) -> dict[str, object]:
    return {**asdict(row), "speed_up": row.speed_up, "deviation": row.deviation}


def _shape_json(shape: Shape) -> dict[str, object]:
    return {
        **asdict(shape),
        "sweet_spot": shape.sweet_spot,
        "margin": shape.margin,
        "rises": shape.rises,
        "falls": shape.falls,
        "is_hump": shape.is_hump,
        "in_words": shape.in_words(),
    }


def _rounded(value: float | None) -> object:
    return round(value, 4) if isinstance(value, float) else value
