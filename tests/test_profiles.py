"""Profiles of known checkpoints are found by the checkpoint's last name."""

from __future__ import annotations

import pytest

from config.profiles import find_profile, known_profiles
from config.settings import BUNDLED_CHECKPOINT


def test_bundled_checkpoint_has_a_profile():
    profile = find_profile(str(BUNDLED_CHECKPOINT))
    assert profile is not None
    assert profile.exit_layer >= 1


@pytest.mark.parametrize("model", ["python-8m", "someone/Python-8M", "/checkpoints/python-8m/"])
def test_profile_is_found_by_folder_and_hub_id(model):
    assert find_profile(model) is find_profile(model) or find_profile(model) == find_profile("python-8m")
    assert find_profile(model) is not None


def test_unknown_checkpoint_has_none():
    assert find_profile("someone/else") is None


def test_no_two_profiles_claim_one_checkpoint():
    names = [name.lower() for profile in known_profiles() for name in profile.checkpoints]
    assert len(names) == len(set(names))
