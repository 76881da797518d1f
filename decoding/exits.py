"""Which exit layers a server allows, what requests that name none get, and where choosing begins.

Knows settings, profiles and the number of layers; knows no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from config.errors import SettingsError
from config.profiles import Profile, find_profile
from config.settings import EngineSettings

_SHARE_OF_LAYERS: Final = 4
"""Without a profile, drafts leave after a quarter of the layers, as the published settings do on average."""

_DRAFT_LENGTH: Final = 4
"""Without a profile: long enough to show acceptance, short enough not to hurt much where there is none."""

_ACCEPTANCE: Final = 0.7
"""Without a profile; the published checkpoints lie between 0.6 and 0.9."""


@dataclass(frozen=True, slots=True)
class Speculation:
    """Allowed exit layers, sorted, and what requests that name none get: None where that is chosen step by step.

    Choosing begins with the first exit layer and draft length, expecting those shares of first drafts to be kept
    at the exit layers that they name, one at least.
    """

    allowed_exit_layers: tuple[int, ...]
    exit_layer: int | None
    draft_length: int | None
    first_exit_layer: int
    first_draft_length: int
    first_acceptances: Mapping[int, float]


def resolve_speculation(settings: EngineSettings, *, num_layers: int) -> Speculation:
    """Settings first, then the checkpoint's profile, then a share of its layers. Raises SettingsError."""
    profile = find_profile(settings.model)
    possible = range(1, num_layers)
    if not possible:
        raise SettingsError(
            f"model {settings.model}: a checkpoint of {num_layers} layer has none to leave early from"
        )
    allowed = tuple(sorted(set(settings.allowed_exit_layers or possible)))
    strange = [layer for layer in allowed if layer not in possible]
    if strange:
        raise SettingsError(
            f"allowed_exit_layers {strange}: this checkpoint's exit layers are 1 to {num_layers - 1}"
        )
    begin = settings.exit_layer
    if begin is None:
        fallback = profile.exit_layer if profile else max(1, num_layers // _SHARE_OF_LAYERS)
        begin = min(allowed, key=lambda layer: abs(layer - fallback))
    if begin not in allowed:
        raise SettingsError(f"exit_layer {begin} is not among the allowed exit layers {list(allowed)}")
    if settings.draft_length is not None and settings.draft_length > settings.max_draft_length:
        raise SettingsError(
            f"draft_length {settings.draft_length} exceeds max_draft_length {settings.max_draft_length}"
        )
    if settings.drafter == "model" and settings.draft_model is None:
        raise SettingsError("drafter model: there is none; pass --draft-model, or another drafter")
    known_length = profile.draft_length if profile else _DRAFT_LENGTH
    return Speculation(
        allowed_exit_layers=allowed,
        exit_layer=settings.exit_layer,
        draft_length=settings.draft_length,
        first_exit_layer=begin,
        first_draft_length=min(known_length, settings.max_draft_length),
        first_acceptances=_first_acceptances(profile, begin, possible),
    )


def _first_acceptances(profile: Profile | None, begin: int, possible: range) -> dict[int, float]:
    measured = (profile.acceptances or {profile.exit_layer: profile.acceptance}) if profile else {}
    return {layer: rate for layer, rate in measured.items() if layer in possible} or {begin: _ACCEPTANCE}
