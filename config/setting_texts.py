"""What documentation says of each setting. `python -m config.setting_texts` prints the README's table."""

from __future__ import annotations

from typing import get_args, get_origin

from pydantic.fields import FieldInfo

from config.setting_sources import flag_name, variable_name
from config.settings import BUNDLED_CHECKPOINT, Settings


def takes_several(field: FieldInfo) -> bool:
    """Whether a setting is a list: its flag may be repeated, its variable separates values by commas."""
    return any(get_origin(kind) is tuple for kind in (field.annotation, *get_args(field.annotation)))


def default_text(name: str, field: FieldInfo) -> str:
    """A setting's default as documentation shows it, without a path of this machine."""
    if name == "model":
        return f"the bundled {BUNDLED_CHECKPOINT.name}"
    return "unset" if field.default is None else str(field.default)


def settings_table() -> str:
    """Every setting as a Markdown table: flag, environment variable, default, meaning."""
    rows = ["| flag | environment | default | meaning |", "|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        cells = (
            f"`{flag_name(name)}`",
            f"`{variable_name(name)}`",
            default_text(name, field),
            field.description,
        )
        rows.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(settings_table())
