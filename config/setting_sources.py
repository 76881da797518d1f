"""Where settings come from: how each is named, how a file is read, and what is refused on the way.

Knows names and files; knows nothing of what a setting means.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Final

import yaml
from pydantic import ValidationError

from config.errors import SettingsError

ENV_PREFIX: Final = "LAYERSKIP_"


def flag_name(field: str) -> str:
    """The command-line flag of a setting."""
    return "--" + field.replace("_", "-")


def variable_name(field: str) -> str:
    """The environment variable of a setting."""
    return ENV_PREFIX + field.upper()


def read_yaml(path: Path, known: Collection[str]) -> dict[str, object]:
    """Values of the `known` settings that a file gives. Raises SettingsError."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(
            f"config {path}: cannot be read ({error.strerror}); pass a readable YAML file"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        # Not the library's whole message: it quotes the file, and the file may hold keys.
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark else "its encoding"
        raise SettingsError(f"config {path}: not YAML ({where}); mend it") from error
    if not isinstance(content, dict | None):
        raise SettingsError(f"config {path}: must hold `key: value` lines, found a {type(content).__name__}")
    values = {str(key).replace("-", "_"): value for key, value in (content or {}).items()}
    for key in values:
        refuse_unknown(key, known, f"setting in {path}")
    return values


def refuse_unknown_variables(environment: Mapping[str, str], fields: Iterable[str]) -> None:
    """Raise a SettingsError for a variable of ours that sets no field."""
    known = {variable_name(field) for field in fields}
    for name in sorted(environment):
        if name.upper().startswith(ENV_PREFIX):
            refuse_unknown(name.upper(), known, "environment variable")


def refuse_unknown(key: str, known: Collection[str], kind: str) -> None:
    """Raise a SettingsError that names the nearest of `known`, unless `key` is one of them."""
    if key in known:
        return
    nearest = get_close_matches(key, list(known), n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else "`layerskip serve --help` lists them all"
    raise SettingsError(f"unknown {kind} {key}: {hint}")


def under_one_name(values: object, name: str, *, alias: str) -> object:
    """Values of settings, with what is given under an alias under its name. Raises SettingsError for both."""
    if not isinstance(values, dict) or values.get(alias) is None:
        return values
    if values.get(name) is not None:
        raise SettingsError(f"{alias} {values[alias]}: {name} is given, too; give one of the two")
    return values | {name: values[alias], alias: None}


def as_settings_error(error: ValidationError) -> SettingsError:
    """One line that names the first setting at fault, and how to give it; keys are not shown."""
    first = error.errors(include_url=False, include_context=False)[0]
    key = str(first["loc"][0])
    value = "(not shown)" if key == "api_key" else repr(first["input"])
    reason = first["msg"].removeprefix("Value error, ")
    remedy = reason[0].lower() + reason[1:]
    name = flag_name(key).removeprefix("--")
    return SettingsError(f"{name} {value}: {remedy} (flag {flag_name(key)}, variable {variable_name(key)})")
