"""Which exit layers are allowed, and where the defaults of requests come from."""

from __future__ import annotations

import pytest

from config.errors import SettingsError
from config.profiles import known_profiles
from config.settings import EngineSettings
from decoding.exits import Speculation, resolve_speculation
from decoding.messages import Drafter

UNKNOWN = "someone/else"


def resolve(num_layers: int = 16, model: str = UNKNOWN, **choices: object) -> Speculation:
    return resolve_speculation(EngineSettings(model=model, **choices), num_layers=num_layers)


def refusal(**choices: object) -> str:
    with pytest.raises(SettingsError) as caught:
        resolve(**choices)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("num_layers", [2, 3, 16, 80])
def test_without_a_choice_every_early_layer_is_allowed(num_layers: int) -> None:
    """Layer 0 is no exit and the last layer saves nothing."""
    speculation = resolve(num_layers)
    assert speculation.allowed_exit_layers == tuple(range(1, num_layers))
    assert speculation.first_exit_layer in speculation.allowed_exit_layers
    assert (speculation.exit_layer, speculation.draft_length) == (None, None)


@pytest.mark.parametrize("profile", known_profiles(), ids=lambda profile: profile.checkpoints[0])
def test_a_known_checkpoint_gets_its_profile(profile) -> None:
    for model in (f"owner/{profile.checkpoints[0]}", f"/somewhere/{profile.checkpoints[0].upper()}"):
        speculation = resolve(model=model, num_layers=profile.exit_layer + 1)
        assert (
            speculation.first_exit_layer,
            speculation.first_draft_length,
            speculation.first_acceptances[profile.exit_layer],
        ) == (
            profile.exit_layer,
            profile.draft_length,
            profile.acceptances.get(profile.exit_layer, profile.acceptance),
        )
        assert (speculation.exit_layer, speculation.draft_length) == (None, None)


def test_only_exit_layers_that_the_checkpoint_has_are_known_beforehand() -> None:
    profile = next(each for each in known_profiles() if each.acceptances)
    model = profile.checkpoints[0]
    assert dict(resolve(num_layers=99, model=model).first_acceptances) == profile.acceptances
    few = resolve(num_layers=4, model=model).first_acceptances
    assert dict(few) == {layer: profile.acceptances[layer] for layer in (1, 2, 3)}
    assert list(resolve(num_layers=2, model="unheard-of").first_acceptances) == [1]


def test_settings_win_over_a_profile() -> None:
    profile = known_profiles()[0]
    speculation = resolve(
        num_layers=99, model=f"owner/{profile.checkpoints[0]}", exit_layer=90, draft_length=0
    )
    assert (speculation.exit_layer, speculation.draft_length) == (90, 0)
    assert speculation.first_exit_layer == 90


def test_a_default_is_drawn_to_the_nearest_layer_that_is_allowed() -> None:
    """An operator who allows only some layers need not name a default as well."""
    assert resolve(allowed_exit_layers=(12, 9, 9)).first_exit_layer == 9
    assert resolve(allowed_exit_layers=(12, 9, 9)).allowed_exit_layers == (9, 12)
    assert resolve(allowed_exit_layers=(1,)).first_exit_layer == 1


@pytest.mark.parametrize("strange", [16, 17, 1000])
def test_exit_layers_that_the_checkpoint_lacks_are_refused_with_its_range(strange: int) -> None:
    message = refusal(allowed_exit_layers=(4, strange))
    assert str(strange) in message
    assert "1 to 15" in message
    assert str(strange) in refusal(exit_layer=strange)


def test_a_default_outside_the_allowed_layers_is_refused() -> None:
    message = refusal(exit_layer=5, allowed_exit_layers=(4, 8))
    assert "5" in message
    assert "[4, 8]" in message


def test_a_default_draft_length_stays_within_the_longest_allowed() -> None:
    """A profile's or the fallback's is lowered; one that the operator named is refused."""
    assert resolve(max_draft_length=2).first_draft_length == 2
    assert resolve(max_draft_length=0).first_draft_length == 0
    assert resolve(max_draft_length=64).first_draft_length > 0
    assert "max_draft_length 2" in refusal(draft_length=3, max_draft_length=2)
    assert resolve(draft_length=3, max_draft_length=3).draft_length == 3


def test_a_default_drafter_without_its_model_is_refused() -> None:
    assert "--draft-model" in refusal(drafter="model")
    resolve(drafter="model", draft_model=UNKNOWN)
    for drafter in set(Drafter) - {Drafter.MODEL}:
        resolve(drafter=drafter)


def test_a_checkpoint_of_one_layer_is_refused_in_one_line() -> None:
    """It has no layer to leave early from."""
    assert "layer" in refusal(num_layers=1)
