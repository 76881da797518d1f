"""The keep rule against a loop that reads as its definition."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.acceptance import num_kept, num_kept_on_host

FEW_IDS = st.integers(0, 2)
"""So few ids that drafts often agree, and agree again after a refusal."""


@st.composite
def cycles(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Drafts [B, K], the full model's choices [B, K + 1] and draft lengths 0 … K."""
    num_rows, num_drafts = draw(st.integers(1, 5)), draw(st.integers(0, 8))

    def table(width: int) -> list[list[int]]:
        return draw(
            st.lists(st.lists(FEW_IDS, min_size=width, max_size=width), min_size=num_rows, max_size=num_rows)
        )

    lengths = draw(st.lists(st.integers(0, num_drafts), min_size=num_rows, max_size=num_rows))
    return table(num_drafts), table(num_drafts + 1), lengths


def kept_one_by_one(drafts: list[int], choices: list[int], draft_length: int) -> int:
    kept = 0
    while kept < draft_length and drafts[kept] == choices[kept]:
        kept += 1
    return kept


def kept(drafts: list[list[int]], choices: list[list[int]], lengths: list[int]) -> list[int]:
    tables = torch.tensor(drafts, dtype=torch.int64).reshape(len(lengths), -1), torch.tensor(choices)
    found = num_kept(*tables, torch.tensor(lengths)).tolist()
    assert num_kept_on_host(*(table.numpy() for table in tables), np.array(lengths)).tolist() == found
    return found


@settings(deadline=None, derandomize=True, max_examples=300)
@given(cycles())
def test_a_draft_stands_while_it_and_all_before_it_are_the_full_models_choices(
    cycle: tuple[list[list[int]], list[list[int]], list[int]],
) -> None:
    assert kept(*cycle) == [kept_one_by_one(*row) for row in zip(*cycle, strict=True)]


def test_agreement_after_a_refusal_counts_for_nothing() -> None:
    assert kept([[1, 2, 3, 4]], [[1, 9, 3, 4, 5]], [4]) == [1]


def test_drafts_past_a_rows_draft_length_are_not_kept() -> None:
    assert kept([[1, 2, 3]] * 4, [[1, 2, 3, 4]] * 4, [0, 1, 2, 3]) == [0, 1, 2, 3]


def test_a_draft_is_compared_with_the_choice_after_the_drafts_before_it() -> None:
    """Neither with the choice one position later nor with the one before."""
    assert kept([[1, 2, 3]], [[2, 3, 4, 5]], [3]) == [0]
    assert kept([[1, 2, 3]], [[0, 1, 2, 3]], [3]) == [0]


def test_a_batch_without_drafts_keeps_none() -> None:
    assert kept([[], []], [[5], [6]], [0, 0]) == [0, 0]
