"""Known checkpoints: the exit layer and draft length that were measured to serve them well.

Knows names, not files: whether a checkpoint exists is the loader's question.
"""

from __future__ import annotations

from importlib import resources
from pathlib import PurePath
from typing import Annotated

import yaml
from pydantic import BaseModel, Field


class Profile(BaseModel, frozen=True, extra="forbid"):
    """What is recommended for one checkpoint, and how that is known (`source`).

    `acceptance` is the share of first drafts that is kept at `exit_layer`; choosing begins with it, or with
    `acceptances`, the same by exit layer where several were measured.
    """

    checkpoints: tuple[str, ...] = Field(min_length=1)
    exit_layer: int = Field(ge=1)
    draft_length: int = Field(ge=0)
    acceptance: float = Field(default=0.7, ge=0, le=1)
    acceptances: dict[int, Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=dict)
    source: str = Field(min_length=1)


def known_profiles() -> tuple[Profile, ...]:
    """Every profile that ships with the package, in the order of their file names."""
    folder = resources.files("config") / "profiles"
    files = sorted(
        (entry for entry in folder.iterdir() if entry.name.endswith(".yaml")), key=lambda e: e.name
    )
    return tuple(Profile.model_validate(yaml.safe_load(file.read_text(encoding="utf-8"))) for file in files)


def find_profile(model: str) -> Profile | None:
    """The profile of a checkpoint folder or hub id, matched by its last name without regard to case."""
    name = PurePath(model).name.lower()
    matches = (p for p in known_profiles() if name in {checkpoint.lower() for checkpoint in p.checkpoints})
    return next(matches, None)
