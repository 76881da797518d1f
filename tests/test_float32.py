"""In float32 a mixed, speculating batch parts from plain decoding only at ties."""

from __future__ import annotations

import pytest

from benchmarks.ties import BOUND, compare
from config.settings import BUNDLED_CHECKPOINT


@pytest.mark.slow
def test_float32_parts_from_plain_decoding_only_at_ties() -> None:
    found = compare(BUNDLED_CHECKPOINT, num_tokens=8_000)
    assert 0 < found.num_kept < found.num_drafted
    assert found.worst_margin <= BOUND
    assert len(found.divergences) <= 3
