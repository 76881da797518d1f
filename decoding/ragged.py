"""Ragged tokens: rows that have different numbers of them, in one list, row after row.

Knows counts; knows nothing of positions, layers or what a token is.

Shapes: B rows, N tokens of all rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

LENGTH_CLASSES: Final = (8, 32)
"""Longest rows of the classes of length. Those of one class are cheap to pad to one another, but for the last."""


def length_classes(counts_B: Ints) -> Ints:
    """Which class each row's number of tokens falls in: 0 for decoding rows, up to `len(LENGTH_CLASSES)`."""
    classes_B: Ints = np.searchsorted(LENGTH_CLASSES, counts_B)
    return classes_B


@dataclass(frozen=True, slots=True)
class Ragged:
    """Row b has `counts_B[b]` tokens, the first of them its `skipped_B[b]`-th.

    `rows_N` is the row of each token, `steps_N` how many tokens of its row come before it, skipped ones included;
    `firsts_B` is where each row's 0-th token lies in the list, or would lie had it not been skipped.
    """

    counts_B: Ints
    skipped_B: Ints
    rows_N: Ints
    steps_N: Ints
    firsts_B: Ints

    @classmethod
    def of(cls, counts_B: Ints, skipped_B: Ints | None = None) -> Ragged:
        """Rows of these lengths, from which nothing is skipped unless said."""
        skipped_B = np.zeros_like(counts_B) if skipped_B is None else skipped_B
        rows_N = np.repeat(np.arange(len(counts_B)), counts_B)
        firsts_B = np.cumsum(counts_B) - counts_B - skipped_B
        return cls(counts_B, skipped_B, rows_N, np.arange(len(rows_N)) - firsts_B[rows_N], firsts_B)

    @property
    def ends_B(self) -> Ints:
        """Each row's tokens in all, skipped ones included."""
        return self.skipped_B + self.counts_B
