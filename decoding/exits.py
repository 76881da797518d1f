"""Which exit layers a server allows and what requests that name none get.

Knows settings, profiles and the number of layers; knows no weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from config.errors import SettingsError
from config.profiles import find_profile
from config.settings import EngineSettings

_SHARE_OF_LAYERS: Final = 4
"""Without a profile, drafts leave after a quarter of the layers, as the published settings do on average."""

_DRAFT_LENGTH: Final = 4
"""Without a profile: long enough to show acceptance, short enough not to hurt much where there is none."""


@dataclass(frozen=True, slots=True)
class Speculation:
    """Allowed exit layers, sorted, and the defaults, which are allowed."""

    allowed_exit_layers: tuple[int, ...]
    exit_layer: int
    draft_length: int


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
    wanted = settings.exit_layer
    if wanted is None:
        fallback = profile.exit_layer if profile else max(1, num_layers // _SHARE_OF_LAYERS)
        wanted = min(allowed, key=lambda layer: abs(layer - fallback))
    if wanted not in allowed:
        raise SettingsError(f"exit_layer {wanted} is not among the allowed exit layers {list(allowed)}")
    draft_length = settings.draft_length
    if draft_length is None:
        draft_length = min(profile.draft_length if profile else _DRAFT_LENGTH, settings.max_draft_length)
    if draft_length > settings.max_draft_length:
        raise SettingsError(
            f"draft_length {draft_length} exceeds max_draft_length {settings.max_draft_length}"
        )
    return Speculation(allowed_exit_layers=allowed, exit_layer=wanted, draft_length=draft_length)
