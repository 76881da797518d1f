"""The packages keep plain names, so nothing else installed may claim them."""

from __future__ import annotations

from importlib.metadata import packages_distributions

import pytest


@pytest.mark.parametrize("package", ["config", "decoding", "server"])
def test_no_other_distribution_claims_the_package(package: str) -> None:
    assert set(packages_distributions().get(package, [])) <= {"layerskip-server"}


def test_another_distributions_package_would_be_noticed() -> None:
    assert set(packages_distributions()["pytest"]) - {"layerskip-server"}
